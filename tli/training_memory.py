"""A training's memory: what it will need, whether that is there, and what it was, in the terms of ``memory_model``."""

import pathlib

import torch
from torch import nn

from tli import figures, memory_fit, memory_model, profiling
from tli.config import TrainConfig
from tli.data.packing import TokenisedWords
from tli.model.checkpoint import Checkpoint
from tli.model.lora import trainable
from tli.model.shape import Shape
from tli.runtime import environment
from tli.runtime.device import Placement
from tli.tables import show


def needed(
    config: TrainConfig, checkpoint: Checkpoint, words: TokenisedWords, trained: int, token_norm: str, placement: Placement
) -> memory_model.Run:
    """The run as far as memory goes, with the nodes and the tokens that the words have."""
    batch = -(-trained // -(-trained // config.batch))
    tokenizer = checkpoint.path("tokenizer.json", optional=True)
    own = {name: getattr(config, name) for name in ("arm", "layer", "rank", "targets", "dropout", "checkpointing", "micro_batch")}
    return memory_model.Run(
        shape=Shape.from_config(checkpoint.config.to_dict(), checkpoint.name),
        part=memory_fit.largest_part(words, trained, batch, config.micro_batch, config.pool_bos),
        batch=batch,
        list_pairs=trained,
        rows=len(words.rows),
        weights=config.weights if placement.ops.supports_nf4 else "full",
        exact=not placement.ops.supports_token_tables,
        eager_attention=placement.attention == "eager",
        device="gpu" if placement.device.type == "cuda" else "cpu",
        element=placement.dtype.itemsize,
        token_norm=token_norm != "none",
        tokenizer_bytes=None if tokenizer is None else tokenizer.stat().st_size,
        **own,
    )


def require_room(run: memory_model.Run, placement: Placement) -> None:
    """Raise ``TliError`` for a run that will not fit, before its model is loaded."""
    if placement.device.type == "cuda":
        available, held = torch.cuda.mem_get_info(placement.device)[0], memory_model.CUDA_CONTEXT_BYTES
    else:
        available, held = environment.available_bytes(), memory_model.process_bytes(run)
    if available is not None:
        # packed weights help only where the ops compute from them
        memory_fit.require_room(run, available, held, frozenset() if placement.ops.supports_nf4 else frozenset({"weights"}))


def measured(run: memory_model.Run, profile: profiling.Profile, decoder: nn.Module, words: int, output: pathlib.Path, console) -> dict:
    """Memory by category, predicted and measured, as shown and drawn."""
    found, curves = profile.measured(decoder, trainable(decoder), words)
    memory = profiling.record(memory_model.predict(run), found, profile)
    figures.save_figure(output / profiling.FIGURE_FILE, figures.draw_memory(curves, profile.spans()))
    show([profiling.table(memory)], console)
    return memory
