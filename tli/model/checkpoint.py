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
import shlex
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tli.model import hub
from tli.model.families import FAMILIES, Family, family_of
from tli.model.safetensors_io import advise_random_access, describe, read_tensor
from tli.model.shape import QUANTISED, Layer, original_of, require_unquantised
from tli.runtime import ops
from tli.runtime.errors import TliError, one_line

# of the embedding table, enough to tell two models apart
_HASHED_ROWS = 64
# what the names of a decoder's tensors end in: weights, biases, an activation's numbers, old models' frequencies and masks, and the parts
# of an NF4 weight
_UNDERSTOOD = re.compile(
    r"\.(weight|bias|act_fn\.(alpha_[pn]|beta|eps)|inv_freq|masked_bias|"
    r"weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__nf4))$"
)
# what the head's name ends in: old GPT-NeoX's is the second
HEADS = ("lm_head.weight", "embed_out.weight")
_SINGLE = "model.safetensors"
# each is built, if without memory
_MOST_BLOCKS = 10_000
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+")
# of weights in whatever format
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its config, and for each tensor the file that holds it.

    name      what the user called it
    folder    the local folder, or None for a hub name
    config    the transformers config of the text decoder
    shard_of  file name by tensor name
    prefix    what stands before the names of the decoder's tensors here: before ``layers.0.`` and ``embed_tokens.``
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

    @property
    def family(self) -> Family:
        """What sets the model's family apart."""
        return FAMILIES[self.config.model_type]

    @property
    def embedding(self) -> str:
        """The name of the embedding table, without ``prefix``."""
        return f"{self.family.embedding}.weight"

    @property
    def norm(self) -> str:
        """The name of the final norm's weight, without ``prefix``."""
        return f"{self.family.norm}.weight"

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
        if rows is not None:
            self.require_rows(int(rows.max()))
        name = self.embedding
        shape = (self.config.vocab_size, self.config.hidden_size)
        file = self._shard(name)
        with _open(self.path(file)) as shard:
            # the tensor is a view of the mapped file: only the pages of these rows are read
            table = self._tensor(shard, file, name, shape)
            if rows is None:
                return table.clone()
            advise_random_access(table, rows)
            return table[rows]

    def require_rows(self, largest: int) -> None:
        """Raise ``TliError`` where ``largest``, a token id, has no row in the embedding: the tokenizer is another model's, or grew."""
        if largest >= self.config.vocab_size:
            must = f"every token must have one of the embedding's {self.config.vocab_size:,} rows"
            got = f"token {self.tokenizer().convert_ids_to_tokens(largest)!r} with the id {largest:,}"
            raise TliError(self.name, must, got, "use the tokenizer that belongs to these weights, or resize the model's embedding first")

    def final_norm(self) -> tuple[Tensor, float]:
        """The final RMS norm's effective weight, fp32 [width], and its epsilon.

        Sharded checkpoints keep it in their last shard, of which a hub sends its few bytes alone.

        Raises:
            TliError: a LayerNorm.
        """
        if self.family.layer_norm:
            must = "the model's final norm must be an RMS norm to be the token norm"
            raise TliError("--token-norm", must, f"{self.config.model_type}'s LayerNorm", "choose rms")
        if self.folder is None and not self.at_hand(self.norm):
            # the folder of a downloaded file is named after its commit
            revision = self.path("config.json").parent.name
            weight = hub.fetch_tensor(self.name, revision, self._shard(self.norm), f"{self.prefix}{self.norm}").float()
        else:
            weight = self._small(self.norm, (self.config.hidden_size,)).float()
        # Gemma stores its norms' weights less one
        return weight + self.family.norm_offset, self.norm_eps

    @property
    def norm_eps(self) -> float:
        """The epsilon of the model's norms; torch's usual one where its config has none."""
        return getattr(self.config, self.family.norm_eps, 1e-5)

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
        parts = tuple(f"{self.prefix}{self.family.blocks}.{index}." for index in range(self.blocks if layer == "output" else int(layer)))
        names = sorted(name for name in self.shard_of if name.startswith(parts))
        digest = hashlib.sha256()
        for name in [*names, self.prefix + self.embedding]:
            # one by one: as long as a file is open, all of it that was read counts as this process's memory
            with _open(self.path(self.shard_of[name])) as shard:
                embedding = name == self.prefix + self.embedding
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
            return self._shard(name) == self._shard(self.embedding) or hub.cached(self.name, self._shard(name)) is not None
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
            got, remedy = one_line(error), "download the model's tokenizer files again"
            if self.path("tokenizer.json", optional=True) is None and self.path("tokenizer.model", optional=True) is not None:
                # transformers names another library, which it tries last
                got, remedy = "tokenizer.model alone", "pip install sentencepiece protobuf, which read it"
            raise TliError(self.name, "the tokenizer must be readable", got, remedy) from error
        if not tokenizer.is_fast:
            # others do not tell which characters a token stands for
            must, got = "the tokenizer must be a fast one (tokenizer.json)", f"{type(tokenizer).__name__}, in Python alone"
            raise TliError(self.name, must, got, "choose a model that has one")
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
            require_plain(self.path(file), self.prefix + name, tensor)
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
    config, context = checkpoint.config, checkpoint.family.context
    # of a family that has both kinds of block, a model may use one
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    positions: Any = config.max_position_embeddings if context is None else context
    return min(positions, (windowed and getattr(config, "sliding_window", None)) or math.inf)


def open_checkpoint(name: str) -> Checkpoint:
    """Open a local folder or hub name; reads config and tensor names, no weights.

    Raises:
        TliError: no such folder, no config, a family that tli does not know, quantised weights other than NF4, or no safetensors.
    """
    folder = pathlib.Path(name).expanduser() if pathlib.Path(name).expanduser().exists() or name.startswith((".", "/", "~")) else None
    if folder is not None and not folder.is_dir():
        raise TliError("--model", "the model must be a folder or a hub name", f"{name}, which is no folder", "check the path")
    if folder is not None and not (folder / "config.json").is_file():
        got, remedy = "none", "name a Hugging Face checkpoint's folder"
        if (folder / "adapter_config.json").is_file():
            got, remedy = "an adapter's adapter_config.json", "name the model that the adapter is for"
        elif snapshots := sorted(folder.glob("snapshots/*/config.json")):
            got, remedy = "a hub cache's snapshots", f"name one of them: {snapshots[-1].parent}"
        raise TliError(folder, "the folder must hold a config.json", got, remedy)
    if folder is None and "@" in name:
        repository, _, revision = name.partition("@")
        remedy = f"hf download {repository} --revision {revision} --local-dir FOLDER, and name that folder"
        raise TliError("--model", "a hub name must stand without a revision", name, remedy)
    config, plain = _read_config(name, folder)
    shard_of = _shard_of(name, folder, plain)
    family = FAMILIES[config.model_type]
    prefix = _decoder_prefix(name, shard_of, family)
    of_decoder = (
        *(f"{prefix}{part}." for part in (family.blocks, family.embedding, family.norm)),
        *(head.removesuffix("weight") for head in HEADS),
    )
    odd = next((key for key in shard_of if key.startswith(of_decoder) and not _UNDERSTOOD.search(key)), None)
    if odd:
        raise TliError(name, QUANTISED, f"tensors as {odd}", original_of(plain, name))
    return Checkpoint(name, folder, config, shard_of, prefix)


def _decoder_prefix(name: str, shard_of: dict[str, str], family: Family) -> str:
    """What stands before ``layers.0.`` in the names of the text decoder's tensors; towers of images and sound embed no tokens."""
    unmerged = next((key for key in shard_of if ".base_layer." in key or ".lora_" in key), None)
    if unmerged:
        remedy = "merge it (model.merge_and_unload() in PEFT), save that, and use the result"
        raise TliError(name, "the checkpoint must be a model without an adapter around it", unmerged, remedy)
    first, embedding = f"{family.blocks}.0.{next(iter(family.linear))}", f"{family.embedding}.weight"
    # whatever its weight is stored as
    key = re.compile(rf"^(?P<prefix>.*?){re.escape(first)}\.[^.]+$")
    found = dict.fromkeys(match["prefix"] for match in map(key.match, shard_of) if match)
    prefixes = [prefix for prefix in found if prefix + embedding in shard_of]
    if len(prefixes) != 1:
        must = f"the checkpoint must hold one decoder's {embedding} and {first}.weight"
        raise TliError(name, must, " and ".join(prefixes) or "none", "use a checkpoint of a decoder")
    return prefixes[0]


def require_plain(path: pathlib.Path, name: str, tensor: Tensor) -> None:
    """Raise ``TliError`` for a weight that is stored as codes: integers, or floating-point numbers of a byte."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise TliError(path, QUANTISED, f"{name} in {ops.name_of(tensor.dtype)}", "use the model's original checkpoint")


def _read_config(name: str, folder: pathlib.Path | None) -> tuple[Any, dict]:
    """transformers' config of the text decoder, and ``config.json`` as it is."""
    from transformers import AutoConfig

    path, plain = _fetch(name, folder, "config.json"), {}
    try:
        plain = dict(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(plain.get("architectures") or [], list):
            raise ValueError("architectures must be a list of names")
        whole = AutoConfig.from_pretrained(folder or name, trust_remote_code=False)
        # a model of text and images keeps its decoder's config inside
        config = whole.get_text_config()
        if not 1 <= config.num_hidden_layers <= _MOST_BLOCKS:
            raise ValueError(f"num_hidden_layers {config.num_hidden_layers} is not from 1 to {_MOST_BLOCKS:,}")
    except Exception as error:
        got, remedy = one_line(error), "check the file"
        if "auto_map" in plain:
            got, remedy = (
                f"{plain.get('model_type')}, which is code beside the weights (auto_map)",
                "choose a model that needs no such code",
            )
        raise TliError(name, "config.json must describe a model that transformers knows", got, remedy) from error
    require_unquantised(plain, name)
    # the whole has the head, unless it leaves that to a causal LM inside
    config.tie_word_embeddings = getattr(whole, "tie_word_embeddings", config.tie_word_embeddings)
    family_of(config.model_type, name).read(config.to_dict(), name)
    _require_own_class(plain, name)
    _require_causal({**plain, **config.to_dict()}, name)
    return config, plain


def _require_own_class(plain: dict, name: str) -> None:
    """Refuse a model whose class is code beside its weights, whatever family it names: such code often sees both ways (LLM2Vec)."""
    import transformers

    named = next(iter(plain.get("architectures") or []), None)
    if plain.get("auto_map") and named and not hasattr(transformers, named):
        must = "the class that config.json names under architectures must be transformers' own"
        raise TliError(name, must, f"{named}, which is code beside the weights (auto_map)", "choose a model that needs no such code")


def _require_causal(settings: dict, name: str) -> None:
    """Refuse a decoder whose tokens see those behind them: words packed into one trie would not be computed as it computes them.

    settings   of the decoder, and of the model around it where that says something of its own
    """
    for key, value in settings.items():
        # of images alone: "vision"
        both_ways = ("bidirectional" in key and value and value != "vision") or (re.search(r"att|mask", key) and value == "bidirectional")
        if both_ways or (re.search(r"(^|_)causal($|_)", key) and value is False):
            must = "the model's attention must be causal, as words share the computation of their common beginnings"
            raise TliError(name, must, f"{key} {value} in config.json", "take the causal model that this one was made from")


def _shard_of(name: str, folder: pathlib.Path | None, plain: dict) -> dict[str, str]:
    index = _fetch(name, folder, "model.safetensors.index.json", optional=True)
    if index is None:
        shard_of: dict[str, str] = {}
        for file in [_SINGLE] if folder is None else _unindexed(folder, plain):
            with _open(_fetch(name, folder, file)) as shard:
                shard_of |= dict.fromkeys(shard.keys(), file)
        return shard_of
    try:
        shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        # what lies elsewhere is not the checkpoint's
        strays = [file for file in shard_of.values() if pathlib.PurePath(file).name != file]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TliError(index, "the index must be JSON with a weight_map", one_line(error), "download it again") from error
    if strays:
        raise TliError(index, "every file of the index must lie beside it", repr(strays[0]), "choose another model")
    return shard_of


def _unindexed(folder: pathlib.Path, plain: dict) -> list[str]:
    """The weight files of a folder without an index: the usual one, or else the shards of its only variant (``model.fp16.safetensors``)."""
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    files = sorted(path.name for path in folder.glob("model*.safetensors"))
    if len({_SHARD_NUMBER.sub("", file) for file in files}) == 1:
        return files
    there = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    remedy = "download the missing file or name another folder"
    if any(file.endswith(".bin") for file in there):
        kind = (plain.get("architectures") or ["AutoModelForCausalLM"])[0]
        where = json.dumps(str(folder))
        code = f'from transformers import {kind} as M; M.from_pretrained({where}, dtype="auto").save_pretrained({where})'
        remedy = f"convert it: python -c {shlex.quote(code)}"
    elif len(files) > 1:
        remedy = f"rename one of them to {_SINGLE}"
    elif there:
        remedy = "use the model in Hugging Face's format"
    raise TliError(folder, f"the folder must hold {_SINGLE}", ", ".join(there[:4]) or "none", remedy)


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
        got, remedy = describe(path) or (one_line(error), "download it again")
        raise TliError(path, "the file must be whole safetensors", got, remedy) from error
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
