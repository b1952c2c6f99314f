"""Which tensors of a Hugging Face checkpoint are needed, and reading only those.

A checkpoint is a local folder or a hub name. Of its safetensors only the shards that hold a wanted tensor are opened (or
downloaded); shards that nobody asks for may be missing. Of the embedding table only the rows that the words use are read.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import re
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tli.model import hub
from tli.model.families import FAMILIES, family_of
from tli.model.safetensors_io import advise_random_access, read_tensor
from tli.model.shape import Layer
from tli.runtime import ops
from tli.runtime.errors import TliError, one_line

# of the embedding table, enough to tell two models apart
_HASHED_ROWS = 64
_FIRST_BLOCK_KEY = re.compile(r"^(?P<prefix>(?!.*vision).*?)layers\.0\.self_attn\.q_proj\.weight$")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its config, and for each tensor the file that holds it.

    name      what the user called it
    folder    the local folder, or None for a hub name
    config    the transformers config of the text decoder
    shard_of  file name by tensor name
    prefix    what stands before ``layers.0.`` and ``embed_tokens.`` in this checkpoint's tensor names
    """

    name: str
    folder: pathlib.Path | None
    config: Any
    shard_of: dict[str, str]
    prefix: str

    @property
    def blocks(self) -> int:
        """N, the number of blocks of the whole model."""
        return self.config.num_hidden_layers

    @overload
    def path(self, file: str, optional: Literal[False] = False) -> pathlib.Path: ...

    @overload
    def path(self, file: str, optional: bool) -> pathlib.Path | None: ...

    def path(self, file: str, optional: bool = False) -> pathlib.Path | None:
        """The local path of one of the checkpoint's files, downloaded first where it is a hub name's; None for an optional one it lacks."""
        return _fetch(self.name, self.folder, file, optional)

    def read(self, names: dict[str, tuple[int, ...]]) -> dict[str, Tensor | ops.NF4Weight]:
        """Read whole tensors, each opened shard once.

        Args:
            names: tensor name without ``prefix`` -> the shape that it must have

        Returns:
            The tensors under the same names, in the checkpoint's dtype; weights that it holds in NF4 as they are.
        """
        packed = {name: parts for name in names if (parts := self._packed_parts(name))}
        plain = {name: shape for name, shape in names.items() if name not in packed}
        wanted: dict[str, tuple[int, ...] | None] = {**plain, **{part: None for parts in packed.values() for part in parts}}
        tensors = {}
        for file in dict.fromkeys(self._shard(name) for name in wanted):
            with _open(self.path(file)) as shard:
                for name, shape in wanted.items():
                    if self._shard(name) == file:
                        tensors[name] = self._tensor(shard, file, name, shape)
        found = {name: tensors[name] for name in plain}
        return found | {name: self._nf4(name, {part: tensors[part] for part in parts}, names[name]) for name, parts in packed.items()}

    def _packed_parts(self, name: str) -> list[str]:
        """The tensors that make up a weight stored in four bits; none for one that is not."""
        beside = [key.removeprefix(self.prefix) for key in self.shard_of if key.startswith(f"{self.prefix}{name}.")]
        return [name, *beside] if beside else []

    def _nf4(self, name: str, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> ops.NF4Weight:
        try:
            weight = ops.NF4Weight.from_state_dict(tensors, name)
        except ValueError as error:
            raise TliError(
                f"{self.name}, {self.prefix}{name}", "the 4-bit weight must be NF4", one_line(error), "use the original checkpoint"
            ) from error
        self._require_shape(self._shard(name), name, weight.shape, shape)
        return weight

    def embedding_rows(self, rows: Tensor | None) -> Tensor:
        """The embedding table's ``rows`` (int64 [V], or None for all of it): [V, width] in the checkpoint's dtype."""
        name = "embed_tokens.weight"
        shape = (self.config.vocab_size, self.config.hidden_size)
        file = self._shard(name)
        with _open(self.path(file)) as shard:
            # the tensor is a view of the mapped file: only the pages of these rows are read
            table = self._tensor(shard, file, name, shape)
            if rows is None:
                return table.clone()
            advise_random_access(table, rows)
            return table[rows]

    def final_norm(self) -> tuple[Tensor, float]:
        """The final norm's effective weight, fp32 [width], and its epsilon.

        Sharded checkpoints keep it in their last shard, of which a hub sends its few bytes alone.
        """
        if self.folder is None and not self.at_hand("norm.weight"):
            # the folder of a downloaded file is named after its commit
            revision = self.path("config.json").parent.name
            weight = hub.fetch_tensor(self.name, revision, self._shard("norm.weight"), f"{self.prefix}norm.weight").float()
        else:
            weight = self._small("norm.weight", (self.config.hidden_size,)).float()
        # Gemma stores its norms' weights less one
        return weight + FAMILIES[self.config.model_type].norm_offset, self.config.rms_norm_eps

    def _small(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a few pages, read without those around it."""
        with contextlib.suppress(OSError, ValueError):
            tensor = read_tensor(self.path(self._shard(name)), self.prefix + name)
            if tuple(tensor.shape) == shape:
                return tensor
        # the usual way says what is wrong
        return self.read({name: shape})[name]

    def absent(self, names: list[str]) -> list[str]:
        """The shards among those of ``names`` that are not on disk (hub names: always empty, they can be downloaded)."""
        if self.folder is None:
            return []
        files = dict.fromkeys(self._shard(name) for name in names)
        return [file for file in files if not (self.folder / file).is_file()]

    def sha256(self, layer: Layer) -> str:
        """One hash over the tensors of the blocks below ``layer`` as they are stored, in order of their names, and the first embeddings.

        It is of numbers, not of files: reading it touches nothing that training does not read, but for those rows, and a copy of the
        model in other shards has the same.
        """
        parts = tuple(f"{self.prefix}layers.{index}." for index in range(self.blocks if layer == "output" else int(layer)))
        names = sorted(name for name in self.shard_of if name.startswith(parts))
        digest = hashlib.sha256()
        for name in [*names, f"{self.prefix}embed_tokens.weight"]:
            # one by one: as long as a file is open, all of it that was read counts as this process's memory
            with _open(self.path(self.shard_of[name])) as shard:
                embedding = name.endswith("embed_tokens.weight")
                tensor = shard.get_tensor(name)
                if embedding:
                    tensor = tensor[:_HASHED_ROWS]
                    advise_random_access(tensor)
                digest.update(f"{name.removeprefix(self.prefix)} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
                del tensor
        return digest.hexdigest()

    def at_hand(self, name: str) -> bool:
        """Whether reading this tensor downloads nothing: its shard is on disk, or is one that the embedding needs anyway."""
        if self.folder is None:
            return self._shard(name) == self._shard("embed_tokens.weight") or hub.cached(self.name, self._shard(name)) is not None
        return not self.absent([name])

    def tokenizer(self):
        """The checkpoint's fast tokenizer."""
        from transformers import AutoTokenizer

        try:
            # what looks like a control token in a text is text
            tokenizer = AutoTokenizer.from_pretrained(
                self.folder or self.name, use_fast=True, split_special_tokens=True, trust_remote_code=False
            )
        except Exception as error:
            raise TliError(
                self.name, "the tokenizer must be readable", one_line(error), "download the model's tokenizer files again"
            ) from error
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise TliError(self.name, "the tokenizer must have a BOS or EOS token to serve as the sink", "neither", "choose another model")
        return tokenizer

    def _shard(self, name: str) -> str:
        try:
            return self.shard_of[self.prefix + name]
        except KeyError:
            raise TliError(
                self.name,
                f"the checkpoint must hold the tensor {self.prefix + name}",
                f"{len(self.shard_of)} others",
                "check that it is complete",
            ) from None

    def _tensor(self, shard, file: str, name: str, shape: tuple[int, ...] | None) -> Tensor:
        try:
            tensor = shard.get_tensor(self.prefix + name)
        except SafetensorError as error:
            raise TliError(self.path(file), f"the file must hold {self.prefix + name}", one_line(error), "download it again") from error
        if shape is not None:
            self._require_shape(file, name, tensor.shape, shape)
        return tensor

    def _require_shape(self, file: str, name: str, got: torch.Size, shape: tuple[int, ...]) -> None:
        if tuple(got) != tuple(shape):
            raise TliError(
                self.path(file),
                f"{self.prefix + name} must have the shape {'x'.join(map(str, shape))} that config.json implies",
                "x".join(map(str, got)),
                "use the config.json that belongs to these weights",
            )


def context_length(checkpoint: Checkpoint) -> int:
    """How many tokens the model sees at once, in every block."""
    return min(checkpoint.config.max_position_embeddings, getattr(checkpoint.config, "sliding_window", None) or math.inf)


def open_checkpoint(name: str) -> Checkpoint:
    """Open a local folder or hub name; reads config and tensor names, no weights.

    Raises:
        TliError: no such folder, no config, a family that tli does not know, quantised weights other than NF4, or no safetensors.
    """
    folder = pathlib.Path(name).expanduser() if pathlib.Path(name).expanduser().exists() or name.startswith((".", "/", "~")) else None
    if folder is not None and not folder.is_dir():
        raise TliError("--model", "the model must be a folder or a hub name", f"{name}, which is no folder", "check the path")
    if folder is not None and not (folder / "config.json").is_file():
        raise TliError(folder, "the folder must hold a config.json", "none", "name a Hugging Face checkpoint's folder")
    config = _read_config(name, folder)
    shard_of = _shard_of(name, folder)
    prefixes = [match["prefix"] for match in map(_FIRST_BLOCK_KEY.match, shard_of) if match]
    if not prefixes:
        raise TliError(
            name, "the checkpoint must hold a decoder's layers.0.self_attn.q_proj.weight", "none", "use a checkpoint of a decoder"
        )
    return Checkpoint(name, folder, config, shard_of, prefixes[0])


def _read_config(name: str, folder: pathlib.Path | None):
    from transformers import AutoConfig

    _fetch(name, folder, "config.json")
    try:
        config = AutoConfig.from_pretrained(folder or name)
    except Exception as error:
        raise TliError(name, "config.json must describe a model that transformers knows", one_line(error), "check the file") from error
    # a model of text and images keeps its decoder's config inside, and has the head, which the decoder's class does not
    tied, config = config.tie_word_embeddings, config.get_text_config()
    config.tie_word_embeddings = tied
    family_of(config.model_type, name)
    _require_causal(config, name)
    stored = getattr(config, "quantization_config", None) or {}
    if stored and (stored.get("quant_method") != "bitsandbytes" or stored.get("bnb_4bit_quant_type") != "nf4"):
        got = f"quantization_config {stored.get('quant_method')}, {stored.get('bnb_4bit_quant_type') or 'no NF4'}"
        raise TliError(name, "the weights must be unquantised or bitsandbytes' NF4", got, "use the model's original checkpoint")
    return config


def _require_causal(config, name: str) -> None:
    """Refuse a decoder whose tokens see those behind them: words packed into one trie would not be computed as it computes them."""
    for key, value in config.to_dict().items():
        # of images alone: "vision"
        if ("bidirectional" in key and value and value != "vision") or (re.search(r"(^|_)causal($|_)", key) and value is False):
            must = "the model's attention must be causal, as words share the computation of their common beginnings"
            raise TliError(name, must, f"{key} {value} in config.json", "take the causal model that this one was made from")


def _shard_of(name: str, folder: pathlib.Path | None) -> dict[str, str]:
    index = _fetch(name, folder, "model.safetensors.index.json", optional=True)
    if index is None:
        with _open(_fetch(name, folder, "model.safetensors")) as single:
            return dict.fromkeys(single.keys(), "model.safetensors")
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise TliError(index, "the index must be JSON with a weight_map", one_line(error), "download it again") from error


@overload
def _fetch(name: str, folder: pathlib.Path | None, file: str, optional: Literal[False] = False) -> pathlib.Path: ...


@overload
def _fetch(name: str, folder: pathlib.Path | None, file: str, optional: bool) -> pathlib.Path | None: ...


def _fetch(name: str, folder: pathlib.Path | None, file: str, optional: bool = False) -> pathlib.Path | None:
    if folder is not None:
        if (folder / file).is_file():
            return folder / file
        if optional:
            return None
        raise TliError(folder, f"the folder must hold {file}", "none", "download the missing file or name another folder")
    return hub.download(name, file, optional)


@contextlib.contextmanager
def _open(path: pathlib.Path):
    try:
        shard = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise TliError(path, "the file must be whole safetensors", one_line(error), "download it again") from error
    with shard as opened:
        yield opened


def model_facts(name: str, checkpoint: Checkpoint, sha256: str) -> dict:
    """What the model is called and is; ``sha256``: ``checkpoint.sha256`` of the blocks that were read."""
    return {
        "name": name,
        "family": checkpoint.config.model_type,
        "blocks": checkpoint.blocks,
        "width": checkpoint.config.hidden_size,
        "sha256": sha256,
    }
