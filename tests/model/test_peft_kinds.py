"""Adapters of every kind that the real peft writes: the states that peft gives with them, or a refusal that names the cause."""

import dataclasses
import json
import shlex
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.words import tokens_of
from tli.commands.export import export
from tli.config import ExportConfig
from tli.data.batch import to_batch
from tli.data.packing import tokenise
from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_full_decoder, load_truncated_decoder, run
from tli.model.trained_adapter import check_compatible, load_adapter
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError

CPU = resolve_device("cpu", "float32")
WORDS = ["kitabu", "kitanda", "mtoto", "book", "bookshop", "child"]
RANKS, ALPHAS = {r"layers\.1\..*q_proj": 5, "up_proj": 2}, {"q_proj": 9, "model.layers.0.mlp.up_proj": 1.5}


def base(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write(folder, output, **settings) -> None:
    """An adapter of peft's on a model, all its trained tensors away from their start."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(folder), config)
        if config.init_lora_weights == "eva":
            ids = [{"input_ids": torch.arange(2, 66).view(4, 16) + step} for step in range(4)]
            initialize_lora_eva_weights(model, ids, show_progress_bar=False)
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(output)


def write_config(output, **settings) -> None:
    file = output / lora.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "eva", "target_modules": ["q_proj", "v_proj", "up_proj"]},
        {"use_dora": True},
        {"use_dora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS, "use_rslora": True},
        {"rank_pattern": RANKS},
        {"alpha_pattern": ALPHAS},
        {"rank_pattern": RANKS, "alpha_pattern": ALPHAS, "use_rslora": True},
        {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    ],
    ids=str,
)
def test_what_is_understood_gives_pefts_states(make_model, tokenizer, tmp_path, settings):
    # it has biases, which DoRA's magnitudes leave alone
    folder = make_model("qwen2")
    write(folder, tmp_path / "adapter", **settings)
    words = tokenise(tokenizer, WORDS, window=24)
    batch = to_batch(words.pack(np.arange(len(WORDS))), torch.float32, CPU.device)
    model = PeftModel.from_pretrained(base(folder), tmp_path / "adapter").eval()
    ids, lengths = torch.from_numpy(words.vocab_ids[tokens_of(words)]), words.lengths
    mask = (torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None]).long()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    checkpoint, trained = open_checkpoint(str(folder)), load_adapter(tmp_path / "adapter")
    check_compatible(trained, checkpoint, CPU, checkpoint.sha256)
    for layer, decoder in (
        (2, load_truncated_decoder(checkpoint, 2, words.vocab_ids, CPU)),
        (4, load_full_decoder(checkpoint, words.vocab_ids, CPU)),
    ):
        plain = run(decoder, batch)
        trained.adapter.attach(decoder)
        states = run(decoder, batch)
        assert (states - plain).abs().max() > 0.01
        for word, length in enumerate(lengths):
            nodes = batch.indices[batch.indptr[word] : batch.indptr[word + 1]]
            torch.testing.assert_close(states[nodes], whole[layer][word, 1:length], rtol=1e-4, atol=1e-4)
    # and merged, as peft merges it
    export(ExportConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "merged"), dtype="float32"))
    ours, theirs = base(tmp_path / "merged").state_dict(), model.merge_and_unload().state_dict()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-5)


# kinds that peft builds without data, and what is said of each
REFUSED = [
    ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
    ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
    ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    ({"layer_replication": [[0, 3], [1, 4]]}, "layer_replication"),
    ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    ({"target_parameters": ["self_attn.v_proj.weight"]}, "target_parameters"),
    ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"modules_to_save": ["input_layernorm"]}, "modules_to_save"),
    ({"bias": "lora_only"}, "bias lora_only"),
    ({"bias": "all"}, "bias all"),
    ({"velora_config": {}}, "velora_config"),
    ({"kasa_config": {}}, "kasa_config"),
]
# and what only other models, data or releases make
SAID = [
    ({"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}, "init_lora_weights corda"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights loftq"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights lora_ga"),
    ({"init_lora_weights": "one of next year"}, "init_lora_weights one of next year"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"use_qalora": True}, "use_qalora"),
    ({"arrow_config": {"top_k": 2}, "use_bdlora": {"a": 1}}, "arrow_config, use_bdlora"),
    ({"monteclora_config": {"a": 1}}, "monteclora_config"),
    ({"one_of_next_year": 0.5}, "one_of_next_year"),
    ({"peft_type": "ADALORA"}, "peft_type ADALORA"),
]


@pytest.mark.parametrize(("settings", "got"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_understood_is_named(make_model, tmp_path, settings, got):
    write(make_model("llama", tied=False), tmp_path, **settings)
    with pytest.raises(TliError, match=rf"adapter_config.json: the adapter must be plain LoRA.*, got (peft_type LORA, )?{got}; "):
        lora.load(tmp_path)


@pytest.mark.parametrize(("settings", "got"), SAID, ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_config_alone_says_is_named(make_model, tmp_path, settings, got):
    write(make_model("llama"), tmp_path)
    write_config(tmp_path, **settings)
    with pytest.raises(TliError, match=rf"adapter_config.json: the adapter must be plain LoRA.*, got {got}[;,]"):
        lora.load(tmp_path)


def test_every_field_of_pefts_config_is_understood_or_unset_by_default():
    known = {*lora._COMPUTED, *lora._WITHOUT_EFFECT}
    config = LoraConfig()
    assert [field.name for field in dataclasses.fields(config) if getattr(config, field.name) and field.name not in known] == []


def test_a_magnitude_belongs_to_dora_alone(make_model, tmp_path):
    write(make_model("llama"), tmp_path, use_dora=True)
    factors = load_file(tmp_path / lora.ADAPTER_FILE)
    write_config(tmp_path, use_dora=False)
    with pytest.raises(TliError, match=r"of a block of the text decoder, got \S+\.lora_magnitude_vector; "):
        lora.load(tmp_path)
    write_config(tmp_path, use_dora=True)
    save_file({key: value for key, value in factors.items() if "layers.1.mlp.up_proj.lora_mag" not in key}, tmp_path / lora.ADAPTER_FILE)
    with pytest.raises(TliError, match="layers.1.mlp.up_proj must have lora_A and lora_B and lora_mag.*, got only lora_A, lora_B; "):
        lora.load(tmp_path)
    name = next(key for key in factors if "lora_mag" in key)
    save_file({**factors, name: factors[name][:-1].clone()}, tmp_path / lora.ADAPTER_FILE)
    with pytest.raises(TliError, match=r"must have a magnitude for each of its \d+ out-features, got \d+; "):
        lora.load(tmp_path)


def test_dora_on_nf4_is_its_formula_on_the_dequantised_weight(make_model, tmp_path):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    # peft's own states are no truth here: on a CPU bitsandbytes repacks a weight at its first use, and peft then takes other norms of it
    folder = make_model("qwen2", hidden_size=64, intermediate_size=128)
    write(folder, tmp_path, use_dora=True)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "nf4")
    decoder = load_truncated_decoder(
        open_checkpoint(str(tmp_path / "nf4")), 1, np.arange(4), resolve_device("cpu", "float32", "nf4", "fused")
    )
    lora.load(tmp_path).attach(decoder)
    factors, x = load_file(tmp_path / lora.ADAPTER_FILE), torch.randn(5, 64)
    for path in ("self_attn.q_proj", "mlp.up_proj"):
        stored = whole.model.layers[0].get_submodule(path)
        lora_a, lora_b, magnitude = (
            factors[f"base_model.model.model.layers.0.{path}.lora_{name}"].double() for name in ("A.weight", "B.weight", "magnitude_vector")
        )
        total = dequantize_4bit(stored.weight.data, stored.weight.quant_state).double() + 1.5 * lora_b @ lora_a
        expected = x.double() @ (magnitude / total.norm(dim=1) * total.T)
        expected = expected if stored.bias is None else expected + stored.bias.double()
        torch.testing.assert_close(decoder.layers[0].get_submodule(path)(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_settings_of_a_start_that_was_not_taken_have_no_effect(make_model, tmp_path):
    write(make_model("llama"), tmp_path)
    before = lora.load(tmp_path)
    write_config(
        tmp_path, loftq_config={"loftq_bits": 4}, eva_config={"rho": 2.0}, qalora_group_size=32, auto_mapping={"a": "b"}, modules_to_save=[]
    )
    assert lora.load(tmp_path).scale == before.scale == 1.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": float("nan")}, "every lora_alpha must be a finite number above 0, got nan; "),
        ({"lora_alpha": float("inf")}, "every lora_alpha must be a finite number above 0, got inf; "),
        ({"lora_alpha": 0}, "every lora_alpha must be a finite number above 0, got 0; "),
        ({"lora_alpha": "16"}, "every lora_alpha must be a finite number above 0, got 16; "),
        ({"alpha_pattern": {"q_proj": -1}}, "every lora_alpha must be a finite number above 0, got -1; "),
        ({"r": -4}, "every rank must be a whole number of at least 1, got -4; "),
        ({"r": True}, "every rank must be a whole number of at least 1, got True; "),
        ({"r": 4.5}, "every rank must be a whole number of at least 1, got 4.5; "),
        ({"rank_pattern": {"q_proj": 0}}, "every rank must be a whole number of at least 1, got 0; "),
        ({"rank_pattern": {"q_proj(": 4}}, "the keys of rank_pattern and alpha_pattern must be regular expressions, got "),
        ({"rank_pattern": [4]}, "the file must be JSON with r and lora_alpha, got "),
        ({"r": None}, "every rank must be a whole number of at least 1, got None; "),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(make_model, tmp_path, settings, message):
    write(make_model("llama"), tmp_path)
    write_config(tmp_path, **settings)
    with pytest.raises(TliError, match=rf"adapter_config.json: {message}"):
        lora.load(tmp_path)


def test_a_rank_that_is_not_the_patterns_is_refused(make_model, tmp_path):
    folder = make_model("llama")
    write(folder, tmp_path, rank_pattern=RANKS)
    write_config(tmp_path, rank_pattern={"up_proj": 2})
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(
        TliError, match="the adapter must fit the model: A 4x48 and B 64x4 in layers.1.self_attn.q_proj, got A 5x48, B 64x5; "
    ):
        check_compatible(load_adapter(tmp_path), checkpoint, CPU, checkpoint.sha256)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, None, "flat"], ids=["nan", "infinity", "integers", "flat"])
def test_factors_that_are_no_numbers_are_refused(make_model, tmp_path, value):
    write(make_model("llama"), tmp_path)
    factors = load_file(tmp_path / lora.ADAPTER_FILE)
    name = sorted(factors)[1]
    if value is None:
        factors[name] = factors[name].to(torch.int8)
    elif value == "flat":
        factors[name] = factors[name].flatten()
    else:
        factors[name][0, 0] = value
    save_file(factors, tmp_path / lora.ADAPTER_FILE)
    with pytest.raises(TliError, match=f"every factor must be a matrix, .*, of finite numbers, got others in {name}; "):
        lora.load(tmp_path)


def test_a_pickled_adapter_is_read_once_the_command_that_is_named_has_run(make_model, tmp_path):
    write(make_model("llama"), tmp_path)
    before = lora.load(tmp_path)
    torch.save(load_file(tmp_path / lora.ADAPTER_FILE), tmp_path / "adapter_model.bin")  # noqa: TID251
    (tmp_path / lora.ADAPTER_FILE).unlink()
    with pytest.raises(TliError, match=r"must hold adapter_model.safetensors, got adapter_model.bin; convert it: python -c ") as error:
        lora.load(tmp_path)
    subprocess.run([sys.executable, *shlex.split(str(error.value).partition("convert it: ")[2])[1:]], check=True)
    after = lora.load(tmp_path)
    assert all(torch.equal(after.factors[path][1], lora_b) for path, (_, lora_b) in before.factors.items())
