"""What a training will need of memory, and whether that is there, before its model is loaded."""

from typing import Any

import torch

from tli.data.packing import TokenisedWords
from tli.model.checkpoint import Checkpoint
from tli.model.shape import Shape
from tli.runtime import environment
from tli.runtime.device import Placement
from tli.training.memory import estimate, fit


def needed(
    checkpoint: Checkpoint,
    words: TokenisedWords,
    trained: int,
    placement: Placement,
    *,
    batch: int,
    micro_batch: int | None,
    pool_bos: bool,
    **options: Any,
) -> estimate.Run:
    """The run as far as memory goes, with the nodes and the tokens that the words have.

    Args:
        checkpoint:   an open checkpoint
        words:        all words, sources of all pairs first, then targets
        trained:      trained pairs
        placement:    device, dtype and ops of the run
        batch:        pairs a batch, at most
        micro_batch:  pairs a micro-batch, at most; None: the whole batch
        pool_bos:     pool the first position into every word
        options:      arm, layer, rank, targets, dropout, checkpointing and token_norm, as ``estimate.Run`` has them
    """
    batch = -(-trained // -(-trained // batch))
    tokenizer = checkpoint.path("tokenizer.json", optional=True)
    return estimate.Run(
        shape=Shape.from_config(checkpoint.config.to_dict(), checkpoint.name),
        part=fit.largest_part(words, trained, batch, micro_batch, pool_bos),
        batch=batch,
        micro_batch=micro_batch,
        list_pairs=trained,
        rows=len(words.rows),
        weights="full" if placement.ops.exact else placement.weights,
        exact=placement.ops.exact,
        eager_attention=placement.attention == "eager",
        in_float32=placement.ops.matmul is not None and placement.ops.matmul.in_float32,
        device="gpu" if placement.device.type == "cuda" else "cpu",
        element=placement.dtype.itemsize,
        tokenizer_bytes=None if tokenizer is None else tokenizer.stat().st_size,
        **options,
    )


def require_room(run: estimate.Run, placement: Placement) -> None:
    """Raise ``TliError`` for a run that will not fit, before its model is loaded."""
    available: int | None
    if placement.device.type == "cuda":
        available, held = torch.cuda.mem_get_info(placement.device)[0], estimate.CUDA_CONTEXT_BYTES
    else:
        available, held = environment.available_bytes(), estimate.process_bytes(run)
    if available is not None:
        # exact ops hold NF4 weights dequantised
        fit.require_room(run, available, held, frozenset({"weights"}) if placement.ops.exact else frozenset())
