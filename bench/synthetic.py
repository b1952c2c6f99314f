"""``python -m bench.synthetic --like llama-3-8b FOLDER``: a checkpoint of a real model's shape with random weights, for timing.

Config, tensor names, dtype (bf16), shards and their index are those of the real one; of the shards only those are written that the
first ``--blocks`` blocks need. In these, tensors of later blocks are holes in the file: they take no room and nobody reads them. The final
norm is written where its shard is.
The tokenizer is Llama 3's own, out of the PyPI wheel ``llama-models``, so the words have the real numbers of tokens; for the other
models it stands in for theirs. What such a checkpoint says about words is nothing: its weights are noise.
"""

import dataclasses
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib

import numpy as np

from tli.config import Model
from tli.runtime.cli import argument, option, parse
from tli.runtime.errors import TliError, disk_errors, run_command
from tli.runtime.files import atomic_write, cache_folder, prepare_output_dir, sha256, write_text

TOKENIZER = "llama-models==0.3.0"
TOKENIZER_SHA256 = "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"
_MEMBER = "llama_models/llama3/tokenizer.model"
# the regular expression by which Llama 3 cuts text before BPE: llama_models/llama3/tokenizer.py
_CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHARD_BYTES = 5_000_000_000
_CHUNK_NUMBERS = 1 << 22

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 500_000.0}
# source: the models' config.json; widths come from kernels/shapes.py
_CONFIGS = {
    "smollm2-135m": _LLAMA | {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100_000.0},
    "llama-3.2-1b": _LLAMA | {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-3-8b": _LLAMA | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    "qwen3-4b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "vocab_size": 151_936,
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "vocab_size": 262_208,
        "sliding_window": 1024,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Write a checkpoint of a real model's shape with random weights, as much of it as the first blocks need."""

    folder: str = argument("where it goes, new or empty")
    like: Model = option("llama-3-8b", "checkpoint", "whose shape")
    blocks: int = option(2, "checkpoint", "write the shards that hold the embedding and so many blocks; 0: all of it")
    seed: int = option(0, "checkpoint", "fixes the weights")
    overwrite: bool = option(False, "checkpoint", "allow a folder that is not empty")


def write(config: SyntheticConfig) -> pathlib.Path:
    """Write the checkpoint and return its folder.

    Raises:
        TliError: a folder that holds something, no room, or no way to the tokenizer.
    """
    folder = pathlib.Path(config.folder).expanduser()
    plain = model_config(config.like)
    total = plain["num_hidden_layers"]
    if not 0 <= config.blocks <= total:
        raise TliError("--blocks", f"the number must be from 0 to {total}, the model's blocks", config.blocks, "choose one in this range")
    prepare_output_dir(folder, config.overwrite)
    shapes = tensor_shapes(plain)
    shards = _shards(shapes)
    wanted = ("model.embed_tokens.", *(f"model.layers.{index}." for index in range(config.blocks)))
    with disk_errors(folder):
        for file, names in shards.items():
            real = [name for name in names if config.blocks == 0 or name.startswith(wanted)]
            if real:
                # the final norm, where its shard is written anyway: a hole would be a norm of zeros
                real += [name for name in names if name == "model.norm.weight"]
                _write_shard(folder / file, {name: shapes[name] for name in names}, set(real), config.seed, plain["initializer_range"])
        _write_tokenizer(folder)
    weight_map = {name: file for file, names in shards.items() for name in names}
    size = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    write_text(folder / "model.safetensors.index.json", json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1))
    write_text(folder / "config.json", json.dumps(plain, indent=1) + "\n")
    return folder


def model_config(like: str) -> dict:
    """config.json of the model."""
    from tli_kernels.shapes import MODELS as SHAPES

    shape, known = SHAPES[like], _CONFIGS[like]
    return {
        "vocab_size": 128_256,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "head_dim": shape.queries // known["num_attention_heads"],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "pad_token_id": 128_001,
        "dtype": "bfloat16",
        **known,
    }


def tensor_shapes(plain: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the whole model by its name, in the order of the file: transformers' own, without its memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{name: value for name, value in plain.items() if name != "architectures"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if plain["tie_word_embeddings"] else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _shards(shapes: dict[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Tensors by file, each file filled in order up to 5 GB, as transformers saves them."""
    groups, room = [[]], _SHARD_BYTES
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if size > room and groups[-1]:
            groups.append([])
            room = _SHARD_BYTES
        groups[-1].append(name)
        room -= size
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, start=1)}


def _write_shard(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], real: set[str], seed: int, std: float) -> None:
    """A safetensors file in bf16 in which the tensors outside ``real`` are holes."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + offset)
        for name in sorted(real):
            file.seek(start + header[name]["data_offsets"][0])
            for numbers in _numbers(name, shapes[name], seed, std):
                file.write(numbers)


def _numbers(name: str, shape: tuple[int, ...], seed: int, std: float):
    """The tensor's numbers as bf16 bytes, a chunk at a time: norms are 1, weights N(0, std), as models are before training."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    left = int(np.prod(shape))
    while left > 0:
        count = min(left, _CHUNK_NUMBERS)
        chunk = torch.ones(count) if len(shape) == 1 else torch.empty(count).normal_(std=std, generator=generator)
        yield chunk.bfloat16().view(torch.int16).numpy().tobytes()
        left -= count


def _write_tokenizer(folder: pathlib.Path) -> None:
    """Llama 3's tokenizer as Hugging Face has it: byte-level BPE, its merges read off the ranks of its tokens."""
    import base64

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    lines = _tokenizer_file().read_text(encoding="ascii").splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    letters = _letters_of_bytes()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    # a merge is any cut of a token into two tokens; BPE takes the one whose result has the lowest rank, ties go to the lower parts
    cuts = [
        (rank, ranks[token[:at]], ranks[token[at:]], token[:at], token[at:])
        for token, rank in ranks.items()
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    ]
    merges = [(text(left), text(right)) for *_, left, right in sorted(cuts)]
    bpe = models.BPE(vocab={text(token): rank for token, rank in ranks.items()}, merges=merges, ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    cut = pre_tokenizers.Split(Regex(_CUTS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{number}|>" for number in range(254))]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[1]}
    write_text(folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles}, indent=1) + "\n")


def _letters_of_bytes() -> dict[int, str]:
    """The printable letter that stands for each byte in a byte-level vocabulary: itself where it is one, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _tokenizer_file() -> pathlib.Path:
    """The ranks of Llama 3's tokens, taken out of their wheel on first use."""
    kept = cache_folder() / f"llama3-tokenizer-{TOKENIZER_SHA256[:8]}.model"
    if kept.is_file():
        return kept
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input", f"--dest={folder}", TOKENIZER]
        pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ)
        wheel = next(pathlib.Path(folder).glob("*.whl"), None)
        if pip.returncode or wheel is None:
            said = pip.stderr.strip().splitlines() or ["nothing"]
            raise TliError("tokenizer", f"pip must be able to download {TOKENIZER}", repr(said[-1]), "connect to a network")
        if sha256(wheel) != TOKENIZER_SHA256:
            raise TliError(
                "tokenizer", f"the wheel must have sha256 {TOKENIZER_SHA256}", sha256(wheel), f"check where {TOKENIZER} comes from"
            )
        with zipfile.ZipFile(wheel) as archive, atomic_write(kept) as temporary:
            temporary.write_bytes(archive.read(_MEMBER))
    return kept


def main() -> None:
    """The command."""
    config = parse(SyntheticConfig, "bench.synthetic")
    folder = write(config)
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    print(f"{folder}: {config.like}, {on_disk / 1e9:.2f} GB on disk; its weights are noise, for timing alone")


if __name__ == "__main__":
    run_command(main)
