"""The sink's share: how much of a word's states the first position would make up, were it pooled."""

import torch
from torch import Tensor

from tli.data.batch import Batch


def sink_share(states: Tensor, batch: Batch) -> Tensor:
    """The sink's share of the summed lengths of a word's states, were the sink pooled: fp32 [words]."""
    sink, own, _ = token_lengths(states, batch)
    return sink / (sink + own)


def token_lengths(states: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of each word: the length of the sink's state, its own tokens' summed lengths, and their summed squares; fp32 [words] each."""
    lengths = states.float().norm(dim=1)
    sink = lengths[batch.sinks]
    owner = torch.arange(len(sink), device=sink.device).repeat_interleave(batch.indptr.diff())
    words_own = batch.indices != batch.sinks[owner]
    owner, tokens = owner[words_own], lengths[batch.indices[words_own]]
    own, squares = (torch.zeros_like(sink).index_add_(0, owner, values) for values in (tokens, tokens.square()))
    return sink, own, squares
