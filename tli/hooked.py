"""The whole model, and hidden state L of it by a forward hook: the arms that the truncated model is compared with.

``full`` runs every block and aligns the output, after the final norm, with adapters in all blocks. ``full-hook`` runs every block,
too, but its loss reads hidden state L, caught on its way, and its adapters lie below: what those who train an early layer with
other tools do, and what must give the losses and gradients of the model that ends at L. Blocks, linear layers, embedding rows and
packed words are the truncated model's own, so the arms differ in nothing else.
"""

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from tli.checkpoint import Checkpoint
from tli.data.batch import Batch
from tli.runtime.device import Placement
from tli.truncated import load_block, load_norm, run, shell


def whole(checkpoint: Checkpoint, rows: np.ndarray | None, placement: Placement) -> nn.Module:
    """transformers' decoder with all its blocks and its final norm: its last hidden state is ``output``.

    Each tensor is read once, and no more than one block is held twice while it is.

    Args:
        checkpoint:  an open checkpoint
        rows:        as for ``truncate``
        placement:   as for ``truncate``

    Returns:
        The decoder, frozen and in evaluation mode. Adapters go into it in place.

    Raises:
        TliError: an absent shard, a missing or misshapen tensor.
    """
    decoder = shell(checkpoint, checkpoint.blocks, rows, placement)
    for index, block in enumerate(decoder.layers):
        load_block(checkpoint, block, index, placement)
    load_norm(checkpoint, decoder, placement)
    return decoder


@contextlib.contextmanager
def caught(block: nn.Module) -> Iterator[list[Tensor]]:
    """The states that ``block`` gives while the context is open; its hook is gone afterwards, whatever happened inside."""
    states = []
    handle = block.register_forward_hook(lambda module, arguments, output: states.append(output))
    try:
        yield states
    finally:
        handle.remove()


def run_hooked(decoder: nn.Module, batch: Batch, layer: int) -> Tensor:
    """Hidden state ``layer`` of each node, [T, D] as from ``run``, out of a pass through all blocks."""
    with caught(decoder.layers[layer - 1]) as states:
        run(decoder, batch)
    return states[0].flatten(0, 1)


def recompute_blocks(decoder: nn.Module) -> None:
    """Keep of each block only what goes in, from now on, and compute the rest anew in the backward pass (gradient checkpointing).

    Gradients are those without it: dropout is a function of its step's seed, so it drops the same entries again. (transformers'
    own switch changes its name and its place among the hooks from version to version, and its reentrant form loses the gradients
    of adapters above frozen embeddings.)
    """
    for block in decoder.layers:
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
