"""All layers' states of packed words, with one block's weights in memory at a time.

transformers' own forward runs over a decoder whose blocks are stand-ins: each reads its block from the checkpoint when its
turn comes, sends every stream of states through it, and drops it. Streams differ in the adapter they wear (None: the
base), so a comparison before and after training reads the weights once.
"""

import typing
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tli.data.batch import Batch
from tli.model.checkpoint import Checkpoint
from tli.model.decoder import block_tensors, init_empty_decoder, load_block, load_norm, run, states_of, use_eager_attention
from tli.model.families import blocks_of, norm_of
from tli.model.lora import Adapter, detach
from tli.runtime import cpu
from tli.runtime.device import DeviceConfig
from tli.runtime.environment import return_freed_memory

if typing.TYPE_CHECKING:
    from tli.model.decoder import Decoder

# a block's largest activations, the MLP's, stay small at this many nodes
_CHUNK_NODES = 2048


class _StreamedBlock(nn.Module):
    """Stands where block ``index`` would: takes and gives states [streams·bins, width, D]."""

    def __init__(
        self, block: nn.Module, index: int, checkpoint: Checkpoint, device_config: DeviceConfig, streams: Sequence[Adapter | None], visit
    ):
        super().__init__()
        # in a list, so that the block's parameters are nobody's but its own
        self.block = [block]
        self.index, self.checkpoint, self.device_config, self.streams, self.visit = index, checkpoint, device_config, streams, visit
        self.gives_tuples = False
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, states: Tensor, *arguments, **named) -> Tensor | tuple[Tensor, None]:
        block = self.block.pop()
        if self.index == 0:
            self.visit(0, states.chunk(len(self.streams)))
        return_freed_memory()
        load_block(self.checkpoint, block, self.index, self.device_config)
        results = []
        for part, (adapter, stream) in enumerate(zip(self.streams, states.chunk(len(self.streams)), strict=True)):
            wrapped = {} if adapter is None else adapter.attach(block, f"{self.checkpoint.family.blocks}.{self.index}.")
            results.append(self._chunked(block, stream, part * len(stream), arguments, named))
            detach(block, wrapped)
        states = torch.cat(results)
        self.visit(self.index + 1, states.chunk(len(self.streams)))
        # as the block itself
        return (states, None) if self.gives_tuples else states

    def _chunked(self, block: nn.Module, stream: Tensor, offset: int, arguments: tuple, named: dict) -> Tensor:
        bins = max(1, _CHUNK_NODES // stream.shape[1])
        total = len(stream) * len(self.streams)
        chunks = []
        for start in range(0, len(stream), bins):
            rows = slice(offset + start, offset + min(start + bins, len(stream)))
            mine = [_rows(value, rows, total) for value in arguments]
            mine_named = {name: _rows(value, rows, total) for name, value in named.items()}
            output = block(stream[start : start + bins], *mine, **mine_named)
            self.gives_tuples = isinstance(output, tuple)
            chunks.append(states_of(output))
        return torch.cat(chunks)


def _rows(value, rows: slice, total: int):
    """What a chunk of bins gets of an argument that a block takes: its rows where there is one, or one a head, per bin, else all of it."""
    if isinstance(value, tuple):
        return tuple(_rows(item, rows, total) for item in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) % total:
        return value
    each = len(value) // total
    return value[rows.start * each : rows.stop * each]


@torch.no_grad()
def stream_layers(
    checkpoint: Checkpoint,
    batch: Batch,
    vocab_ids: np.ndarray | None,
    device_config: DeviceConfig,
    streams: Sequence[Adapter | None],
    visit: Callable[[int | str, Sequence[Tensor]], None],
) -> str | None:
    """Call ``visit(layer, states)`` for layer 0, 1, ... N and ``output``, with the states [T, D] of each stream.

    Args:
        checkpoint:     an open checkpoint
        batch:          the packed words
        vocab_ids:      the embedding rows that input ids count in, as for ``load_truncated_decoder``
        device_config:  as for ``load_truncated_decoder``
        streams:        adapters to compare; None is the base.
        visit:          gets a layer and its states; keeps what it wants of them

    Returns:
        None, or, where shards are absent, why the pass ended before ``output``.
    """
    whole = init_empty_decoder(checkpoint, checkpoint.blocks, vocab_ids, device_config)
    # eager attention holds width x width for each head: of a text's windows too much to be the faster way alone
    if device_config.attention == "eager" and not cpu.attends("sdpa", device_config.facts["dtype"]):
        use_eager_attention(whole)
    available, reason = _available(checkpoint, whole)
    width = batch.input_ids.shape[1]

    def flat_visit(layer, states):
        visit(layer, [stream.reshape(-1, stream.shape[-1]) for stream in states])

    stand_ins = [_StreamedBlock(blocks_of(whole)[i], i, checkpoint, device_config, streams, flat_visit) for i in range(available)]
    setattr(whole, checkpoint.family.blocks, nn.ModuleList(stand_ins))
    whole.config.num_hidden_layers = available
    if reason is None:
        # in its turn, as a block: of a hub's model a pass that ends before must not fetch its shard
        norm_of(whole).register_forward_pre_hook(lambda *_: load_norm(checkpoint, whole, device_config))
    else:
        setattr(whole, checkpoint.family.norm, nn.Identity())
    copies = len(streams)
    repeated = Batch(
        batch.input_ids.repeat(copies, 1),
        batch.position_ids.repeat(copies, 1),
        batch.mask.repeat(copies, 1, 1, 1),
        batch.indptr,
        batch.indices,
        batch.sinks,
    )
    states = run(whole, repeated)
    if reason is None:
        flat_visit("output", states.view(copies, -1, width, states.shape[-1]).unbind())
    return reason


def _available(checkpoint: Checkpoint, whole: "Decoder") -> tuple[int, str | None]:
    """How many blocks can be read, and why not all."""
    blocks = blocks_of(whole)
    for index, block in enumerate(blocks):
        absent = checkpoint.absent(list(block_tensors(checkpoint.family, block, index)))
        if absent:
            return index, f"{absent[0]} is absent, which holds block {index} and what follows"
    absent = checkpoint.absent([checkpoint.norm])
    return len(blocks), f"{absent[0]} is absent, which holds the final norm" if absent else None
