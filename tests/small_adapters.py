"""Adapters for small models, with values in them as if they had been trained."""

import pathlib

import numpy as np
import torch

from tli import lora
from tli.checkpoint import open_checkpoint
from tli.truncated import place, truncate


def save_adapter(
    model: pathlib.Path, folder: pathlib.Path, *, layer: int = 2, seed: int = 0, size: float = 0.1, **settings
) -> pathlib.Path:
    """Write to ``folder`` an adapter of rank 3 on the first ``layer`` blocks of a model."""
    decoder = truncate(open_checkpoint(str(model)), layer, np.arange(4), place("cpu", "float32"))
    config = lora.LoRAConfig(rank=3, alpha=6.0, **settings)
    lora.inject(decoder, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for adapter in lora.adapters(decoder).values():
        adapter.lora_B.data.normal_(std=size, generator=generator)
    lora.save(decoder, config, folder, str(model))
    return folder
