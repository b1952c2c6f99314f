"""What a training will need of memory, and whether that is there, before its model is loaded."""

from typing import Any

import torch

from tli.data.packing import TokenisedWords
from tli.model.checkpoint import Checkpoint
from tli.model.shape import Shape
from tli.runtime import environment
from tli.runtime.device import DeviceConfig
from tli.training.memory import estimate, fit


def needed(
    checkpoint: Checkpoint,
    words: TokenisedWords,
    trained: int,
    device_config: DeviceConfig,
    *,
    batch: int,
    micro_batch: int | None,
    pool_bos: bool,
    **options: Any,
) -> estimate.Run:
    """The run as far as memory goes, with the nodes and the tokens that the words have.

    Args:
        checkpoint:     an open checkpoint
        words:          all words, sources of all pairs first, then targets
        trained:        trained pairs
        device_config:  device, dtype and ops of the run
        batch:          pairs a batch, at most
        micro_batch:    pairs a micro-batch, at most; None: the whole batch
        pool_bos:       pool the first position into every word
        options:        arm, layer, rank, targets, dropout, checkpointing and token_norm, as ``estimate.Run`` has them
    """
    batch = -(-trained // -(-trained // batch))
    tokenizer = checkpoint.path("tokenizer.json", optional=True)
    return estimate.Run(
        shape=Shape.from_config(checkpoint.config.to_dict(), checkpoint.name),
        part=fit.largest_part(words, trained, batch, micro_batch, pool_bos),
        batch=batch,
        micro_batch=micro_batch,
        list_pairs=trained,
        rows=len(words.vocab_ids),
        weights="full" if device_config.ops.exact else device_config.weights,
        exact=device_config.ops.exact,
        eager_attention=device_config.attention == "eager",
        in_float32=device_config.ops.matmul is not None and device_config.ops.matmul.in_float32,
        device="gpu" if device_config.device.type == "cuda" else "cpu",
        element=device_config.dtype.itemsize,
        tokenizer_bytes=None if tokenizer is None else tokenizer.stat().st_size,
        **options,
    )


def require_room(run: estimate.Run, device_config: DeviceConfig) -> None:
    """Raise ``TliError`` for a run that will not fit, before its model is loaded."""
    available: int | None
    if device_config.device.type == "cuda":
        available, held = torch.cuda.mem_get_info(device_config.device)[0], estimate.CUDA_CONTEXT_BYTES
    else:
        available, held = environment.available_bytes(), estimate.process_bytes(run)
    if available is not None:
        # exact ops hold NF4 weights dequantised
        fit.require_room(run, available, held, frozenset({"weights"}) if device_config.ops.exact else frozenset())
