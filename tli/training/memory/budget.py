"""What a training will need of memory, and whether that is there, before its model is loaded."""

import torch

from tli.config import TrainConfig
from tli.data.packing import TokenisedWords
from tli.model.checkpoint import Checkpoint
from tli.model.shape import Shape
from tli.runtime import environment
from tli.runtime.device import Placement
from tli.training.memory import estimate, fit


def needed(
    config: TrainConfig, checkpoint: Checkpoint, words: TokenisedWords, trained: int, token_norm: str, placement: Placement
) -> estimate.Run:
    """The run as far as memory goes, with the nodes and the tokens that the words have."""
    batch = -(-trained // -(-trained // config.batch))
    tokenizer = checkpoint.path("tokenizer.json", optional=True)
    own = {name: getattr(config, name) for name in ("arm", "layer", "rank", "targets", "dropout", "checkpointing", "micro_batch")}
    return estimate.Run(
        shape=Shape.from_config(checkpoint.config.to_dict(), checkpoint.name),
        part=fit.largest_part(words, trained, batch, config.micro_batch, config.pool_bos),
        batch=batch,
        list_pairs=trained,
        rows=len(words.rows),
        weights="full" if placement.ops.exact else config.weights,
        exact=placement.ops.exact,
        eager_attention=placement.attention == "eager",
        in_float32=placement.ops.matmul is not None and placement.ops.matmul.in_float32,
        device="gpu" if placement.device.type == "cuda" else "cpu",
        element=placement.dtype.itemsize,
        token_norm=token_norm != "none",
        tokenizer_bytes=None if tokenizer is None else tokenizer.stat().st_size,
        **own,
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
