"""All layers' states of packed words, with one block's weights in memory at a time.

transformers' own forward runs over a decoder whose blocks are stand-ins: each reads its block from the checkpoint when its
turn comes, sends every stream of states through it, and drops it. Streams differ in the adapter they wear (None: the
base), so a comparison before and after training reads the weights once.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tli.alignment import Alignment, measure
from tli.data.batch import Batch, to_batch
from tli.data.packing import TokenisedWords
from tli.model.checkpoint import Checkpoint
from tli.model.hidden_states import stream_layers
from tli.model.lora import Adapter
from tli.model.pooling import Pooling
from tli.runtime.device import Placement


def align_layers(
    checkpoint: Checkpoint,
    words: TokenisedWords,
    splits: dict[str, tuple[np.ndarray, np.ndarray]],
    pooling: Pooling,
    placement: Placement,
    streams: dict[str, Adapter | None],
    pool_bos: bool = False,
    done: Callable[[], None] = lambda: None,
) -> tuple[dict[tuple[str, str, int | str], Alignment], str | None]:
    """Measure the alignment of word pairs at every layer, for each split of the pairs and each stream, in one pass.

    Args:
        checkpoint:  an open checkpoint
        words:       all words, sources of all pairs first, then targets
        splits:      name -> (int64 pair numbers, their ``same_meaning``); words of no other pair are looked at
        pooling:     token states -> word states; at ``output``, where states are normalised already, without its norm
        placement:   as for ``truncate``
        streams:     name -> adapter, or None for the base
        pool_bos:    pool the sink, too
        done:        called when a layer is measured

    Returns:
        The alignment by (split, stream, layer), and why the pass ended before ``output``, or None.
    """
    measured = np.concatenate([pairs for pairs, _ in splits.values()])
    packed = words.pack(np.concatenate([measured, measured + len(words) // 2]), pool_bos)
    batch = to_batch(packed, placement.dtype, placement.device)
    ends = list(itertools.accumulate((len(pairs) for pairs, _ in splits.values()), initial=0))
    alignments = {}

    def visit(layer: int | str, states: Sequence[Tensor]) -> None:
        for stream, nodes in zip(streams, states, strict=True):
            source, target = pooling.at(layer)(nodes, batch).chunk(2)
            share = sink_share(nodes, batch).view(2, -1).mean(0).cpu().numpy()
            for (split, (_, same)), *part in zip(splits.items(), ends, ends[1:]):
                own = slice(*part)
                alignments[split, stream, layer] = measure(source[own], target[own], same, share[own])
        done()

    return alignments, stream_layers(checkpoint, batch, words.rows, placement, list(streams.values()), visit)


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
