"""A training's memory: what it will need, whether that is there, and what it was, in the terms of ``memory_model``."""

import pathlib

from torch import nn

from tli import figures
from tli import profiling as profiling_module
from tli.model.lora import trainable
from tli.tables import show
from tli.training.memory import estimate
from tli.training.memory import profile as profiling


def measured(run: estimate.Run, profile: profiling.Profile, decoder: nn.Module, words: int, output: pathlib.Path, console) -> dict:
    """Memory by category, predicted and measured, as shown and drawn."""
    found, curves = profile.measured(decoder, trainable(decoder), words)
    memory = profiling_module.record(estimate.predict(run), found, profile)
    figures.save_figure(output / profiling.FIGURE_FILE, figures.draw_memory(curves, profile.spans()))
    show([profiling_module.table(memory)], console)
    return memory
