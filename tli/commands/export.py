"""``python -m tli.export ADAPTER OUTPUT``: merge an adapter into a copy of its whole model, which transformers loads without peft.

    W' = round(W + s·B·A)     W as it is stored, or dequantised from NF4; summed in fp32, rounded once

Weights that the adapter leaves alone are rounded once, too. Names, config, tokenizer and generation files are the model's own, so
tied embeddings stay tied. The model is written file by file, with one of them in memory at a time, into a folder beside OUTPUT that
takes its name at the end: a kill leaves no half model, and the next export clears away what it left.
"""

import contextlib
import fnmatch
import functools
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tli.config import ExportConfig
from tli.model.checkpoint import Checkpoint, open_checkpoint, require_plain
from tli.model.linear_map import FittedMap, save_map
from tli.model.lora import Adapter
from tli.model.trained_adapter import check_compatible, load_adapter
from tli.runtime import environment, ops
from tli.runtime.cli import as_dict
from tli.runtime.console import open_console
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError
from tli.runtime.files import SCHEMA, atomic_folder, atomic_write, write_text

# what a model needs beside its weights and config.json
_BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
_INDEX = "model.safetensors.index.json"
_NF4_STATE = ".quant_state.bitsandbytes__nf4"


def export(config: ExportConfig) -> dict:
    """Merge an adapter into a copy of its whole model, W + s·B·A in fp32 rounded once, and write it to ``config.output``.

    Args:
        config:  adapter, output folder, dtype; every field is a flag of ``python -m tli.export``

    Returns:
        What the merged model was made of, as plain JSON values: ``model``, ``adapter``, ``tensors``, ``merged`` (how many of them the
        adapter changed), ``bytes`` (of the weight files).

    Raises:
        TliError: an adapter that is not this model's, an absent shard, no room, an output folder that holds something.

    Example:
        >>> from tli import ExportConfig, TrainConfig, export, train
        >>> run = train(TrainConfig(rank=4, layer=1, batch=256, epochs=1, no_report=True, output="adapter"))
        >>> export(ExportConfig(adapter="adapter", output="merged"))["merged"]
        7
        >>> from transformers import AutoModelForCausalLM
        >>> AutoModelForCausalLM.from_pretrained("merged").config.num_hidden_layers
        30
    """
    console = open_console()
    output = pathlib.Path(config.output).expanduser().resolve()
    _require_new(output)
    recorded = load_adapter(config.adapter)
    checkpoint = open_checkpoint(config.model or recorded.model())
    source = _Weights(checkpoint)
    hashed = functools.cache(checkpoint.sha256)
    check_compatible(recorded, checkpoint, resolve_device("cpu", "float32"), hashed)

    dtype = getattr(torch, config.dtype)
    sizes = source.sizes(dtype)
    _require_room(output, sum(sizes.values()))
    files = _files(sizes, config.shard_gb * 1e9)
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "config": as_dict(config),
        "model": {
            "name": config.model or recorded.peft.get("base_model_name_or_path"),
            "family": checkpoint.config.model_type,
            "sha256": hashed("output"),
        },
        "adapter": {key: value for key, value in recorded.facts().items() if key in ("name", "sha256", "rank", "parameters")},
        "tensors": len(sizes),
        "merged": len(recorded.adapter.factors),
        "bytes": sum(sizes.values()),
        "versions": environment.versions(),
    }
    with atomic_folder(output, "OUTPUT") as folder:
        _write_weights(source, recorded.adapter, files, dtype, folder, console)
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            _write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))})
        _write_json(folder / "config.json", _plain_config(checkpoint, config.dtype))
        for path in _beside(checkpoint):
            shutil.copyfile(path, folder / path.name)
        if recorded.fitted is not None:
            _write_map(recorded.fitted, folder, output)
        _write_json(folder / "export.json", facts)
    console.print(f"{facts['merged']} of {facts['tensors']} tensors merged; {facts['bytes'] / 1e9:.2f} GB in {config.dtype}")
    console.print(f"in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    return facts


def _write_map(fitted: FittedMap, folder: pathlib.Path, output: pathlib.Path) -> None:
    """The adapter's map beside the merged model, whose states it is of: ``embed(words, map=OUTPUT, language=...)`` reads both there."""
    checkpoint, layer = open_checkpoint(str(folder)), fitted.report["map"]["layer"]
    weights = checkpoint.sha256(layer)
    told = {
        "config": {**fitted.report["config"], "model": str(output), "weights": "full"},
        "model": {**fitted.report["model"], "name": str(output), "sha256": weights},
    }
    save_map(folder, fitted.linear, {**fitted.report, **told})


class _Weights:
    """A checkpoint's tensors by their full names, read from their files while those are open."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.shard_of = checkpoint, checkpoint.shard_of
        # every file must be there before the first is written; those of a hub name are downloaded
        self.paths = {file: checkpoint.path(file) for file in sorted(set(self.shard_of.values()))}
        packed = [name.removesuffix(_NF4_STATE) for name in self.shard_of if name.endswith(_NF4_STATE)]
        self.parts = {name: [key for key in self.shard_of if key == name or key.startswith(f"{name}.")] for name in packed}
        self._open: dict[str, Any] = {}

    @contextlib.contextmanager
    def opened(self, names: list[str]) -> Iterator[None]:
        """Have the files of these tensors open; outside, nothing of them stays in memory."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._open.clear)
            for file in {self.shard_of[part] for name in names for part in self.parts.get(name, [name])}:
                with _damage(self.paths[file]):
                    self._open[file] = stack.enter_context(safe_open(self.paths[file], framework="pt"))
            yield

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, a view of its file; or in fp32 where that is in NF4."""
        if name not in self.parts:
            return self._plain(name)
        try:
            return ops.dequantise(
                ops.NF4Weight.from_state_dict({part: self._stored(part) for part in self.parts[name]}, name), torch.float32
            )
        except ValueError as error:
            raise TliError(
                f"{self.checkpoint.name}, {name}", "the 4-bit weight must be NF4", error, "use the original checkpoint"
            ) from error

    def sizes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of each tensor of the output, its floating-point numbers in ``dtype``, in the order of the files."""
        parts = {part for name, found in self.parts.items() for part in found if part != name}
        names = sorted((name for name in self.shard_of if name not in parts), key=lambda name: (self.shard_of[name], name))
        with self.opened(names):
            sizes = {}
            for name in names:
                stored = self._stored(name)
                # two numbers lie in a byte
                numbers = 2 * stored.nbytes if name in self.parts else stored.numel()
                sizes[name] = numbers * dtype.itemsize if name in self.parts or stored.is_floating_point() else stored.nbytes
        return sizes

    def _plain(self, name: str) -> Tensor:
        tensor = self._stored(name)
        # other tensors may be of integers: numbers of positions, for instance
        if name.endswith(".weight"):
            require_plain(self.paths[self.shard_of[name]], name, tensor)
        return tensor

    def _stored(self, name: str) -> Tensor:
        file = self.shard_of[name]
        with _damage(self.paths[file]):
            return self._open[file].get_tensor(name)


@contextlib.contextmanager
def _damage(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise TliError(path, "the file must be whole safetensors", error, "download it again") from error


def _files(sizes: dict[str, int], limit: float) -> dict[str, list[str]]:
    """Tensors by the file that they go to, in order, none above ``limit`` bytes unless one tensor alone is."""
    groups: list[list[str]] = []
    room = 0.0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, start=1)}


def _write_weights(source: _Weights, adapter: Adapter, files: dict[str, list[str]], dtype: torch.dtype, folder: pathlib.Path, console):
    from rich.progress import Progress

    adapted = {f"{source.checkpoint.prefix}{path}.weight": path for path in adapter.factors}
    turned = source.checkpoint.family.transposed
    with Progress(console=console) as bar:
        task = bar.add_task("merging", total=sum(map(len, files.values())))

        def merged(name: str) -> Tensor:
            bar.advance(task)
            weight = source.read(name)
            if name in adapted:
                # Conv1D's are stored as [K, N]
                weight = adapter.merge(adapted[name], weight.T).T.contiguous() if turned else adapter.merge(adapted[name], weight)
            return _rounded(weight, dtype, name)

        for file, names in files.items():
            with source.opened(names), atomic_write(folder / file) as temporary:
                _save({name: merged(name) for name in names}, temporary)


def _rounded(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not weight.is_floating_point():
        return weight
    rounded = weight.to(dtype)
    # the extremes of numbers with a NaN are NaN
    if rounded.numel() and not torch.stack(rounded.aminmax()).isfinite().all():
        raise TliError(
            name, f"every weight must be finite in {ops.name_of(dtype)}", "infinity or nan", "check the adapter, or choose another --dtype"
        )
    return rounded


def _save(tensors: dict[str, Tensor], path: pathlib.Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise TliError(path.parent, "the weights must be written whole", error, "free some space and run again") from error


def _plain_config(checkpoint: Checkpoint, dtype: str) -> dict:
    """The model's own config.json with the new dtype, and without what it says of 4-bit weights."""
    config = json.loads(checkpoint.path("config.json").read_text(encoding="utf-8"))
    # a model of text and images has a config in its config
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("quantization_config", None)
        part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    return {**config, "dtype": dtype}


def _beside(checkpoint: Checkpoint) -> list[pathlib.Path]:
    """The model's other files that its users need."""
    folder = checkpoint.folder
    if folder is None:
        from huggingface_hub import snapshot_download

        try:
            folder = pathlib.Path(snapshot_download(checkpoint.name, allow_patterns=list(_BESIDE)))
        except Exception as error:
            raise TliError(
                "--model", "the model's tokenizer must be in reach", " ".join(str(error).split()), "check the network"
            ) from error
    return sorted(path for path in folder.iterdir() if path.is_file() and any(fnmatch.fnmatch(path.name, like) for like in _BESIDE))


def _write_json(path: pathlib.Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _require_new(output: pathlib.Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise TliError("OUTPUT", "the output must be a new or empty folder", output, "name another")


def _require_room(output: pathlib.Path, needed_bytes: int) -> None:
    there = next(parent for parent in output.parents if parent.exists())
    free_bytes = shutil.disk_usage(there).free
    if needed_bytes > free_bytes:
        raise TliError(
            output,
            f"the disk must have room for {needed_bytes / 1e9:.2f} GB",
            f"{free_bytes / 1e9:.2f} GB free",
            "free some space, or name another",
        )
