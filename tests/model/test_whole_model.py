"""Adapters of models whose decoder lies within another class: PEFT finds them by the card's own lines, and their own are read back."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tli.commands.export import export
from tli.commands.train import train
from tli.config import EvaluateConfig, ExportConfig, TrainConfig
from tli.data.batch import to_batch
from tli.data.packing import tokenise
from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder, run
from tli.model.trained_adapter import load_adapter
from tli.model.whole_model import WholeModel, whole_model
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {**SIZES, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
AUDIO = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["kitabu", "kitanda", "house"]


def configs(vocabulary: int) -> dict:
    import transformers as t

    text = {**TEXT, "vocab_size": vocabulary}
    gemma = t.Gemma3TextConfig(**text, head_dim=16, layer_types=["sliding_attention", "full_attention"] * 2)
    return {
        "Gemma3": t.Gemma3Config(text_config=gemma.to_dict(), vision_config=t.SiglipVisionConfig(**VISION).to_dict()),
        "Llava": t.LlavaConfig(text_config=t.LlamaConfig(**text), vision_config=t.CLIPVisionConfig(**VISION)),
        "Mistral3": t.Mistral3Config(text_config=t.MistralConfig(**text), vision_config=t.PixtralVisionConfig(**VISION)),
        "SmolVLM": t.SmolVLMConfig(text_config=t.LlamaConfig(**text), vision_config=dict(VISION)),
        # of sound: its config says nothing of the head, which is in a causal LM inside
        "Voxtral": t.VoxtralConfig(
            text_config=t.LlamaConfig(**text).to_dict(), audio_config={**AUDIO, "num_mel_bins": 16, "max_source_positions": 20}
        ),
        # without a head, as a model of text and images for embeddings
        "LlavaModel": t.LlavaConfig(text_config=t.LlamaConfig(**text), vision_config=t.CLIPVisionConfig(**VISION)),
    }


@pytest.fixture(scope="module", params=["Gemma3", "Llava", "Mistral3", "SmolVLM", "Voxtral", "LlavaModel"])
def composite(request, tokenizer, tmp_path_factory):
    """A small random model of text and images, or sound."""
    import transformers

    folder = tmp_path_factory.mktemp("composite") / request.param.lower()
    torch.manual_seed(0)
    named = request.param if request.param.endswith("Model") else f"{request.param}ForConditionalGeneration"
    model = getattr(transformers, named)(configs(len(tokenizer))[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_states(folder, adapter=None) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Token ids of some words, and the states of layer 2 that tli computes of them."""
    cpu, checkpoint = resolve_device("cpu", "float32"), open_checkpoint(str(folder))
    words = tokenise(checkpoint.tokenizer(), WORDS, 64, " ")
    decoder = load_truncated_decoder(checkpoint, 2, words.vocab_ids, cpu)
    if adapter is not None:
        load_adapter(adapter).adapter.attach(decoder)
    batch = to_batch(words.pack(np.arange(len(WORDS)), pool_bos=True), cpu.dtype, cpu.device)
    with torch.no_grad():
        states = run(decoder, batch).reshape(-1, 48)
    ids = [words.ids[begin:end].tolist() for begin, end in zip(words.indptr, words.indptr[1:])]
    return ids, [states[batch.indices[begin:end]] for begin, end in zip(batch.indptr, batch.indptr[1:])]


def whole_states(model, ids) -> list[torch.Tensor]:
    found = []
    with torch.no_grad():
        for word in ids:
            out = model(
                input_ids=torch.tensor([word]), attention_mask=torch.ones(1, len(word), dtype=torch.long), output_hidden_states=True
            )
            found.append(out.hidden_states[2][0].float())
    return found


def apart(found, expected) -> float:
    return max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))


def test_peft_loads_the_adapter_by_the_cards_own_lines(composite, word_list, tmp_path, recwarn):
    out = tmp_path / "adapter"
    more = {"lr": 1e-2, "keep_weight": 0.0, "warmup": 1, "map": "none"}
    train(TrainConfig(model=str(composite), pairs=str(word_list), layer=2, rank=2, batch=27, epochs=3, output=str(out), **more))
    lines = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)[1]
    lines = lines.replace(f'"{composite.name}"', repr(str(composite))).replace('"path/to/this/folder"', repr(str(out)))
    given: dict = {}
    recwarn.clear()
    exec(lines, given)
    assert not [str(warning.message) for warning in recwarn if "adapter" in str(warning.message).lower()]
    model = given["model"].eval()
    factors = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    assert len(factors) == 14
    assert all(parameter.any() for parameter in factors.values())
    assert not any("vision" in name or "audio" in name for name in factors)
    ids, plain = own_states(composite)
    expected = own_states(composite, out)[1]
    assert apart(whole_states(model, ids), expected) < 1e-4
    assert apart(plain, expected) > 1e-2


def test_pefts_own_adapter_of_the_text_decoder_is_read(composite, tmp_path):
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    whole = whole_model(open_checkpoint(str(composite)))
    model = getattr(transformers, whole.loads_by).from_pretrained(composite, dtype=torch.float32)
    config = LoraConfig(r=3, target_modules=rf"{re.escape(whole.decoder)}\..*\.q_proj", init_lora_weights=False)
    model = get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path)
    ids, found = own_states(composite, tmp_path)
    assert apart(found, whole_states(model, ids)) < 1e-4
    assert apart(found, own_states(composite)[1]) > 1e-3


def test_a_merged_copy_is_the_whole_model_with_the_adapter(composite, tmp_path):
    import transformers
    from peft import LoraConfig, get_peft_model

    whole = whole_model(open_checkpoint(str(composite)))
    model = getattr(transformers, whole.loads_by).from_pretrained(composite, dtype=torch.float32)
    settings = {"r": 3, "target_modules": rf"{re.escape(whole.decoder)}\..*\.(q|down)_proj", "rank_pattern": {r".*\.1\..*q_proj": 2}}
    get_peft_model(model, LoraConfig(**settings, init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    export(ExportConfig(adapter=tmp_path / "adapter", output=tmp_path / "merged", model=str(composite), dtype="float32"))
    merged, notes = getattr(transformers, whole.loads_by).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    ids, expected = own_states(composite, tmp_path / "adapter")
    assert apart(whole_states(merged.eval(), ids), expected) < 1e-4
    assert apart(own_states(tmp_path / "merged")[1], expected) < 1e-4


def test_an_adapter_of_the_vision_tower_is_refused(composite, tmp_path):
    import transformers
    from peft import LoraConfig, get_peft_model

    model = getattr(transformers, whole_model(open_checkpoint(str(composite))).loads_by).from_pretrained(composite)
    get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(TliError, match="a linear layer of a block of the text decoder"):
        load_adapter(tmp_path)


def test_an_adapter_of_a_bare_decoder_is_read(make_model, word_list, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    folder = make_model("llama")
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModel.from_pretrained(folder),
        LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, task_type="FEATURE_EXTRACTION"),
    ).eval()
    model.save_pretrained(tmp_path)
    recorded = load_adapter(tmp_path)
    assert recorded.adapter.decoder == ""
    ids, found = own_states(folder, tmp_path)
    assert apart(found, whole_states(model, ids)) < 1e-4
    # and goes through a command
    from tli.commands.evaluate import evaluate

    facts = evaluate(EvaluateConfig(adapters=(tmp_path,), model=folder, pairs=word_list, layers="2", output=tmp_path / "out"))
    assert facts["layers"] == [2]


def test_a_plain_decoders_names_are_its_causal_lms(make_model):
    assert whole_model(open_checkpoint(str(make_model("qwen2")))) == WholeModel("AutoModelForCausalLM", "model")


def changed_config(folder, output, **changes):
    """A model's folder, but for its config.json, of which some keys are others."""
    output.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (output / file.name).unlink(missing_ok=True)
        (output / file.name).symlink_to(file)
    (output / "config.json").unlink()
    (output / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))


def test_a_class_that_transformers_does_not_know_is_one_line(composite, tmp_path):
    changed_config(composite, tmp_path, architectures=["OurOwnModel"])
    with pytest.raises(TliError, match="the class that config.json names under architectures.* got OurOwnModel"):
        whole_model(open_checkpoint(str(tmp_path)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_bidirectional_attention_is_refused(family, make_model, tmp_path):
    folder = make_model(family)
    keys = [{"is_causal": False}, {"use_bidirectional_attention": True}, {"bidirectional": True}, {"causal": False}]
    keys += [{"use_causal_mask": False}, {"attention_type": "bidirectional"}]
    for number, more in enumerate(keys):
        changed_config(folder, tmp_path / str(number), **more)
        with pytest.raises(TliError, match=f"the model's attention must be causal.* got {next(iter(more))}"):
            open_checkpoint(str(tmp_path / str(number)))


@pytest.mark.parametrize("composite", ["Gemma3", "SmolVLM"], indirect=True)
def test_bidirectional_attention_is_refused_where_the_whole_model_says_it(composite, tmp_path):
    changed_config(composite, tmp_path, is_causal=False)
    with pytest.raises(TliError, match="the model's attention must be causal.* got is_causal False in config.json"):
        open_checkpoint(str(tmp_path))


def test_a_class_that_is_code_beside_the_weights_is_refused_though_its_family_is_known(make_model, tmp_path):
    # as LLM2Vec's: a family's name, its weights, and another attention
    code = {"AutoModel": "modeling_mistral_encoder.MistralEncoderModel"}
    changed_config(make_model("mistral"), tmp_path, architectures=["MistralEncoderModel"], auto_map=code)
    with pytest.raises(TliError, match="must be transformers' own, got MistralEncoderModel, which is code beside the weights"):
        open_checkpoint(str(tmp_path))
    # such code may also be no more than what became transformers' own
    changed_config(make_model("mistral"), tmp_path, architectures=["MistralForCausalLM"], auto_map=code)
    open_checkpoint(str(tmp_path))
    # and a class that nobody ships, a reward model's for instance, has the family's decoder
    changed_config(make_model("mistral"), tmp_path, architectures=["MistralForRewards"])
    open_checkpoint(str(tmp_path))


@pytest.mark.slow
def test_names_that_look_like_markup_are_shown_as_they_are(make_model, word_list, tmp_path):
    for name in ("run [v2]", "x[/b]", "[red]"):
        few = ["--layer=1", "--rank=2", "--batch=27", "--epochs=1", "--no-report"]
        trained = ["tli.train", "--model", make_model("llama"), "--pairs", word_list, *few, "--output", tmp_path / name]
        for command, shown in ((trained, name), (["tli.export", tmp_path / name, tmp_path / f"merged {name}"], f"merged {name}")):
            wide = {**os.environ, "COLUMNS": "400"}
            done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=200, env=wide)
            assert done.returncode == 0, done.stderr
            assert shown in "".join(done.stderr.splitlines())


@pytest.mark.slow
def test_paths_may_be_relative_and_of_any_kind(make_model, word_list, tmp_path, monkeypatch):
    (tmp_path / "llama").symlink_to(make_model("llama"))
    (tmp_path / "words.tsv").write_bytes(word_list.read_bytes())
    monkeypatch.chdir(tmp_path)
    import pathlib

    few = {"layer": 1, "rank": 2, "batch": 27, "epochs": 1, "keep_weight": 0.0}
    train(TrainConfig(model=pathlib.Path("llama"), pairs=pathlib.Path("words.tsv"), output=pathlib.Path("out"), **few))
    config = json.loads((tmp_path / "out" / lora.CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "llama")
    monkeypatch.chdir("/")
    from tli.commands.evaluate import evaluate

    assert evaluate(EvaluateConfig(adapters=(tmp_path / "out",), output=tmp_path / "evaluation"))["pairs"]["split_is_recorded"]
    export(ExportConfig(adapter=tmp_path / "out", output=tmp_path / "merged"))
