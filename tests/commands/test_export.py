"""A merged model is base + adapter: to fp32 rounding before it is rounded, loadable by transformers alone, complete or absent."""

import collections
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tli.commands import export as export_module
from tli.commands.embed import embed
from tli.commands.export import export
from tli.commands.train import train
from tli.config import ExportConfig, TrainConfig
from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_full_decoder
from tli.model.families import FAMILIES
from tli.runtime.cli import parse
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError, run_command

ROOT = pathlib.Path(__file__).parent.parent.parent
CPU = resolve_device("cpu", "float32")
IDS = torch.arange(2, 38).view(3, 12)


def make_adapter(model, folder, blocks=None, **settings) -> pathlib.Path:
    """An adapter as training leaves one, without a report, of some size."""
    config = lora.LoRAConfig(**{"rank": 3, "alpha": 6.0, **settings})
    decoder = load_full_decoder(open_checkpoint(str(model)), np.arange(4), CPU)
    lora.inject(decoder, config, blocks)
    for number, adapter in enumerate(lora.adapters(decoder).values()):
        adapter.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    lora.save(decoder, config, folder, str(model))
    return folder


@pytest.fixture
def llama(make_model, tmp_path) -> dict:
    """A model in shards, an adapter of it, and where to export them to."""
    model = tmp_path / "model"
    shutil.copytree(make_model("llama", shards=True), model)
    return {"adapter": str(make_adapter(model, tmp_path / "adapter")), "output": str(tmp_path / "merged")}


def run(settings: dict, **more) -> dict:
    return export(ExportConfig(**{**settings, **more}))


def hidden_states(model) -> list[torch.Tensor]:
    with torch.no_grad():
        return model.eval()(IDS, output_hidden_states=True).hidden_states


def loaded(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def all_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(pathlib.Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_rounded_once(exact, rounded) -> None:
    """Every tensor of ``rounded`` is that of ``exact`` in bf16, bit for bit."""
    exact, rounded = all_tensors(exact), all_tensors(rounded)
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.to(torch.bfloat16), rounded[name]), name


def worst_error(states, expected) -> float:
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(states, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_merged_model_is_base_and_adapter(make_model, tmp_path, family, tied):
    source = make_model(family, tied=tied, shards=not tied)
    adapter = make_adapter(source, tmp_path / "adapter", rslora=tied)
    expected = hidden_states(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), adapter))
    settings = {"adapter": str(adapter), "shard_gb": 1e-4}
    facts = run(settings, output=str(tmp_path / "exact"), dtype="float32")
    assert facts["merged"] == 4 * len(FAMILIES[family].linear)
    run(settings, output=str(tmp_path / "merged"))
    exact = loaded(tmp_path / "exact")
    assert worst_error(hidden_states(exact), expected) < 2e-5
    assert_rounded_once(tmp_path / "exact", tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    before = hidden_states(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    # what bf16 does to the merged model is what it does to the model without an adapter
    rounded = hidden_states(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float())
    assert worst_error(hidden_states(merged), expected) < 3 * worst_error(rounded, before) < 0.3 * worst_error(before, expected)
    assert (merged.get_output_embeddings().weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()) == tied
    tokens = [AutoTokenizer.from_pretrained(folder)("kitabu na mtu").input_ids for folder in (source, tmp_path / "merged")]
    assert tokens[0] == tokens[1]
    assert (tmp_path / "merged" / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
def test_nf4_checkpoints_are_dequantised_and_merged(make_model, tokenizer, tmp_path, nested):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    source = make_model("llama", hidden_size=64, intermediate_size=128, tied=False)
    quantised = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.float32)
    quantised.save_pretrained(tmp_path / "nf4")
    tokenizer.save_pretrained(tmp_path / "nf4")
    adapter = make_adapter(tmp_path / "nf4", tmp_path / "adapter", blocks=[0, 2])
    # bitsandbytes' own product on a CPU is rougher than its weights
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for path, module in quantised.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            base.model.layers.get_submodule(path).weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    expected = hidden_states(PeftModel.from_pretrained(base, adapter))
    for dtype in ("float32", "bfloat16"):
        run({"adapter": str(adapter), "output": str(tmp_path / dtype), "dtype": dtype})
    assert_rounded_once(tmp_path / "float32", tmp_path / "bfloat16")
    assert worst_error(hidden_states(loaded(tmp_path / "float32")), expected) < 2e-5
    assert "quantization_config" not in json.loads((tmp_path / "bfloat16" / "config.json").read_text())
    assert set(all_tensors(tmp_path / "bfloat16")) == set(all_tensors(source))


@pytest.mark.slow
def test_the_starter_is_exported_and_still_answers(starter, tmp_path):
    adapter = make_adapter(starter, tmp_path / "adapter", blocks=[0, 1, 29], rank=4)
    # as training on the starter writes it
    config = json.loads((adapter / lora.CONFIG_FILE).read_text())
    (adapter / lora.CONFIG_FILE).write_text(json.dumps({**config, "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}))
    base = AutoModelForCausalLM.from_pretrained(starter, dtype=torch.float32)
    run({"adapter": str(adapter), "output": str(tmp_path / "merged"), "shard_gb": 0.1})
    merged = loaded(tmp_path / "merged")
    before, expected = hidden_states(base), hidden_states(PeftModel.from_pretrained(base, adapter))
    # peft merges in the model's own dtype
    halves = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(starter, dtype=torch.bfloat16), adapter).merge_and_unload()
    error = worst_error(hidden_states(merged), expected)
    assert error < 1.1 * worst_error(hidden_states(halves.float()), expected)
    assert error < 0.1 * worst_error(before, expected)
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert max(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors")) < 0.11e9
    assert not (tmp_path / "merged" / "complete.json").exists()


def test_a_decoder_among_other_parts_is_merged_and_the_rest_is_kept(make_model, tokenizer, tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = AutoConfig.from_pretrained(make_model("gemma3_text")).to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    both = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    both.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    adapter = make_adapter(tmp_path / "model", tmp_path / "adapter", targets="q_proj")
    assert run({"adapter": str(adapter), "output": str(tmp_path / "merged")})["merged"] == 4
    before, after = (all_tensors(tmp_path / name) for name in ("model", "merged"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name].to(torch.bfloat16))}
    assert before.keys() == after.keys()
    assert {name.rpartition("layers.")[2] for name in changed} == {f"{index}.self_attn.q_proj.weight" for index in range(4)}
    assert not any("vision" in name for name in changed)
    Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "merged")


def test_the_size_of_a_file_and_its_memory_are_bounded(llama, tmp_path):
    facts = run(llama, shard_gb=3e-5)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(files) > 5
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == facts["bytes"] == sum(t.nbytes for t in all_tensors(tmp_path / "merged").values())
    for path in files:
        tensors = load_file(path)
        assert set(tensors) == {name for name, file in index["weight_map"].items() if file == path.name}
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 3e4


@pytest.mark.slow
def test_no_more_than_a_file_is_in_memory(make_model, tmp_path):
    wide = make_model("llama", hidden_size=1024, intermediate_size=4096, blocks=2)
    settings = {"adapter": str(make_adapter(wide, tmp_path / "adapter")), "dtype": "float32"}
    runs = [{**settings, "output": str(tmp_path / str(shard_gb)), "shard_gb": shard_gb} for shard_gb in (0.02, 2.0)]
    code = (
        "from tli.runtime import environment; from tli.config import ExportConfig; from tli.commands.export import export\n"
        f"for run in {runs!r}: export(ExportConfig(**run)); print(environment.peak_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    by_file, at_once = map(int, done.stdout.split())
    # 103 MB of weights: all of them, or 20 MB
    assert at_once - by_file > 50e6


@pytest.mark.slow
def test_a_kill_leaves_nothing_half_and_the_next_export_clears_up(llama, tmp_path):
    code = (
        "import time, tli.commands.export as e; from tli.config import ExportConfig; save = e._save\n"
        "def slow(tensors, path):\n    save(tensors, path); time.sleep(0.2)\n"
        f"e._save = slow; e.export(ExportConfig(**{llama!r}, shard_gb=3e-5))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (written := list(tmp_path.glob(".merged.*.building/result/model-*.safetensors"))):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no file within two minutes"
        time.sleep(0.02)
    with pytest.raises(TliError, match="^OUTPUT: one process at a time may write to it, got another that is running; "):
        run(llama)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "merged").exists()
    (written[0].parent / "of-the-killed").touch()
    run(llama)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter", "merged"}
    assert not (tmp_path / "merged" / "of-the-killed").exists()
    loaded(tmp_path / "merged")


@pytest.mark.parametrize("how", ["a link", "a folder"])
def test_what_stands_where_an_export_is_built_is_never_touched(llama, tmp_path, how):
    """Whoever may guess its names: of the folder that is being built, and of what a killed export left."""
    thesis, names = tmp_path / "thesis", (".merged.exporting", ".merged.building", ".merged.abcdefgh.building")
    (thesis / "result").mkdir(parents=True)
    (thesis / "result" / "thesis.tex").write_text("mine")
    for name in names:
        if how == "a link":
            # the project may even look like the program's own
            (thesis / ".tli-building.lock").touch()
            (tmp_path / name).symlink_to(thesis)
        else:
            shutil.copytree(thesis, tmp_path / name)
    run(llama)
    loaded(tmp_path / "merged")
    for folder in (thesis, *(tmp_path / name for name in names)):
        assert (folder / "result" / "thesis.tex").read_text() == "mine"


def test_ctrl_c_leaves_nothing(llama, tmp_path, monkeypatch):
    def interrupted(tensors, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llama)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}


def test_a_full_disk_is_one_line_before_or_after_it_begins(llama, tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("Usage", "free")(1000))
        with pytest.raises(TliError, match=r"merged: the disk must have room for 0.00 GB, got 0.00 GB free; free some space"):
            run(llama)
    monkeypatch.setattr(export_module, "save_file", full)
    with pytest.raises(TliError, match="the weights must be written whole, got .*No space left on device.*; free some space and run again"):
        run(llama)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}


def change(folder: pathlib.Path, file: str, **values) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))


def change_factors(adapter: pathlib.Path, rename=lambda name: name, value=lambda tensor: tensor) -> None:
    factors = load_file(adapter / lora.ADAPTER_FILE)
    kept = {rename(name): value(tensor) for name, tensor in factors.items() if rename(name)}
    save_file(kept, adapter / lora.ADAPTER_FILE, metadata={"format": "pt"})


def last_shard(model: pathlib.Path) -> pathlib.Path:
    return sorted(model.glob("*.safetensors"))[-1]


BAD = {
    "absent shard": (lambda model, adapter: last_shard(model).unlink(), "the folder must hold model-"),
    "damaged shard": (lambda model, adapter: last_shard(model).write_bytes(b"\xff" * 99), "the file must be whole safetensors"),
    "no adapter": (lambda model, adapter: (adapter / lora.ADAPTER_FILE).unlink(), "an adapter's folder must hold adapter_model"),
    "no model": (lambda model, adapter: shutil.rmtree(model), "--model: the model must be a folder or a hub name"),
    "other width": (
        lambda model, adapter: change_factors(adapter, value=lambda tensor: tensor.repeat(1, 2) if tensor.shape[0] == 3 else tensor),
        "the adapter must fit the model",
    ),
    "extra keys": (
        lambda model, adapter: change_factors(adapter, rename=lambda name: name.replace("layers.3.", "layers.7.")),
        "every key must be a linear layer's of the model",
    ),
    "missing keys": (
        lambda model, adapter: change_factors(adapter, rename=lambda name: "" if "layers.2.mlp.up_proj" in name else name),
        "no factors for layers.2.mlp.up_proj",
    ),
    "nan": (lambda model, adapter: change_factors(adapter, value=lambda tensor: tensor / 0), "every factor must be a matrix"),
    "overflow": (
        lambda model, adapter: change_factors(adapter, value=lambda tensor: tensor * 1e30),
        "every weight must be finite in bfloat16",
    ),
    "not lora": (lambda model, adapter: change(adapter, lora.CONFIG_FILE, peft_type="IA3"), "the adapter must be plain LoRA"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_line_and_writes_nothing(llama, tmp_path, capsys, kind):
    spoil, message = BAD[kind]
    spoil(tmp_path / "model", tmp_path / "adapter")
    with pytest.raises(SystemExit) as left:
        run_command(lambda: (export(parse(ExportConfig, "tli.export", [llama["adapter"], llama["output"]])), sys.exit(0)))
    shown = capsys.readouterr().err
    assert left.value.code == 2
    assert len([line for line in shown.splitlines() if line.startswith("error: ")]) == 1
    assert message in shown
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "adapter"}


def test_an_output_that_holds_something_is_not_touched(llama, tmp_path):
    (tmp_path / "merged").mkdir()
    run(llama)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
    for output in (tmp_path / "merged", tmp_path / "adapter" / lora.ADAPTER_FILE, tmp_path / "model"):
        with pytest.raises(TliError, match="^OUTPUT: the output must be a new or empty folder, got "):
            run(llama, output=str(output))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "got Parameter --adapter requires an argument; see --help"),
        (["a"], "got Parameter --output requires an argument; see --help"),
        (["a", "b", "c"], "got Unused Tokens: ['c']; see --help"),
        (["a", "b", "--dtype", "int8"], 'got Invalid value "int8" for --dtype. Choose from: "bfloat16", "float16", "float32"; see --help'),
        (["a", "b", "--shard-gb", "0"], "--shard-gb: the number must be above 0, got 0.0; raise it"),
        (["absent", "b"], "absent: an adapter's folder must hold adapter_config.json, got none; "),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path):
    command = [sys.executable, "-m", "tli.export", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_json_is_one_object_on_standard_output(llama, tmp_path):
    command = [sys.executable, "-m", "tli.export", llama["adapter"], llama["output"], "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    facts = json.loads(result.stdout)
    assert facts == json.loads((tmp_path / "merged" / "export.json").read_text())
    assert facts["tensors"] == len(all_tensors(tmp_path / "merged"))
    assert result.stderr.splitlines()[-1].strip()


def test_the_map_of_the_adapter_goes_with_the_merged_model(make_model, word_list, tmp_path):
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    options = {"model": str(make_model("llama")), "pairs": str(word_list), "layer": 2, "rank": 4, "batch": 14, "epochs": 3}
    train(TrainConfig(**options, no_report=True, output=adapter))
    export(ExportConfig(adapter=adapter, output=merged, dtype="float32"))
    words = ["kitabu", "book", "mtu"]
    for language in ("swahili", "english"):
        apart = embed(words, adapter=adapter, language=language)
        torch.testing.assert_close(embed(words, map=merged, language=language), apart, rtol=0, atol=1e-4)
