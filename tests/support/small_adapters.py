"""Adapters for small models, with values in them as if they had been trained; and models that cannot be read."""

import json
import pathlib
import shutil

import numpy as np
import torch

from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder
from tli.runtime.device import resolve_device


def save_adapter(
    model: pathlib.Path, folder: pathlib.Path, *, layer: int = 2, seed: int = 0, size: float = 0.1, **settings
) -> pathlib.Path:
    """Write to ``folder`` an adapter of rank 3 on the first ``layer`` blocks of a model."""
    decoder = load_truncated_decoder(open_checkpoint(str(model)), layer, np.arange(4), resolve_device("cpu", "float32"))
    config = lora.LoRAConfig(rank=3, alpha=6.0, **settings)
    lora.inject(decoder, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for adapter in lora.adapters(decoder).values():
        adapter.lora_B.data.normal_(std=size, generator=generator)
    lora.save(decoder, config, folder, str(model))
    return folder


# what ``unreadable`` can spoil -> what is said of it
UNREADABLE = {
    "unknown family": "the model's family must be one that is known to truncate exactly",
    "no first shard": "is absent",
    "half a shard": "the file must be whole safetensors",
    "no tensor": "the checkpoint must hold the tensor",
}


def unreadable(make_model, folder: pathlib.Path, how: str) -> pathlib.Path:
    """A copy of a model whose layers cannot be streamed."""
    shutil.copytree(make_model("llama", shards=True), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    if how == "unknown family":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "mpt"}))
    elif how == "no first shard":
        shard.unlink()
    elif how == "half a shard":
        shard.write_bytes(shard.read_bytes()[:-200])
    else:
        del index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
