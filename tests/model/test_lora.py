"""The injector: its arithmetic, its refusals, and its files against the real peft in both directions."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.words import tokens_of
from tli.data.batch import to_batch
from tli.data.packing import tokenise
from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder, run
from tli.model.families import FAMILIES
from tli.model.hidden_states import stream_layers
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError

CPU = resolve_device("cpu", "float32")
WORDS = ["kitabu", "kitanda", "mtoto", "book", "bookshop", "child"]


def truncated(folder, tokenizer, layer: int = 2):
    words = tokenise(tokenizer, WORDS, window=24)
    decoder = load_truncated_decoder(open_checkpoint(str(folder)), layer, words.vocab_ids, CPU)
    return decoder, words, to_batch(words.pack(np.arange(len(WORDS))), torch.float32, CPU.device)


def shake(decoder, seed: int = 0) -> None:
    """Give every B values, as if the adapters had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in lora.adapters(decoder).values():
        adapter.lora_B.data.normal_(std=0.1, generator=generator)


def test_an_adapter_starts_as_nothing_and_is_the_formula(make_model, tokenizer):
    decoder, _, batch = truncated(make_model("llama"), tokenizer)
    before = run(decoder, batch)
    paths = lora.inject(decoder, lora.LoRAConfig(rank=3, alpha=6.0))
    assert torch.equal(run(decoder, batch), before)
    assert len(paths) == 2 * 7
    shake(decoder)
    adapter = decoder.get_submodule(paths[0])
    x = torch.randn(5, 48, dtype=torch.float64)
    expected = x @ (adapter.weight.double() + 2.0 * adapter.lora_B.double() @ adapter.lora_A.double()).T
    torch.testing.assert_close(adapter(x.float()).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(run(decoder, batch), before)


def test_scale_is_alpha_over_rank_or_over_its_root():
    assert lora.LoRAConfig(rank=16, alpha=32).scale == 2
    assert lora.LoRAConfig(rank=16, alpha=32, rslora=True).scale == 8


@pytest.mark.parametrize(("init", "variance"), [("normal", 1.0), ("kaiming", 1 / 3)])
def test_a_starts_with_the_variance_it_says(make_model, tokenizer, init, variance):
    decoder, _, _ = truncated(make_model("llama"), tokenizer)
    lora.inject(decoder, lora.LoRAConfig(rank=40, alpha=1, targets="down_proj", init=init))
    for adapter in lora.adapters(decoder).values():
        assert adapter.lora_A.var().item() * adapter.lora_A.shape[1] == pytest.approx(variance, rel=0.1)
        assert not adapter.lora_B.any()


def test_a_modules_start_depends_on_the_seed_and_its_own_path(make_model, tokenizer):
    def start(targets: str, seed: int) -> torch.Tensor:
        decoder, _, _ = truncated(make_model("llama"), tokenizer)
        lora.inject(decoder, lora.LoRAConfig(rank=4, alpha=8, targets=targets), seed=seed)
        return decoder.layers[1].self_attn.v_proj.lora_A

    assert torch.equal(start("all-linear", 0), start("v_proj", 0))
    assert not torch.equal(start("v_proj", 0), start("v_proj", 1))


@pytest.mark.parametrize(
    ("targets", "blocks", "expected"),
    [
        (
            "q_proj, v_proj",
            None,
            ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"],
        ),
        (r"mlp\.(up|down)_proj", [1], ["layers.1.mlp.up_proj", "layers.1.mlp.down_proj"]),
        (r"layers\.0\.self_attn\.[qk]_proj", None, ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"]),
    ],
)
def test_targets_by_name_and_by_expression(make_model, tokenizer, targets, blocks, expected):
    decoder, _, _ = truncated(make_model("llama"), tokenizer)
    assert lora.inject(decoder, lora.LoRAConfig(rank=2, alpha=4, targets=targets), blocks) == expected
    assert list(lora.adapters(decoder)) == expected
    assert [parameter.requires_grad for parameter in decoder.parameters()].count(True) == 2 * len(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "^--rank: the rank must be at least 1, got 0; "),
        ({"rank": 49}, "^--rank: the rank must be at most 48, the smaller side of layers.0.self_attn.q_proj, got 49; "),
        (
            {"targets": "q_proj,w_proj"},
            r"^--targets: each target must be a linear layer of the model \(q_proj, .*, down_proj\), got w_proj; ",
        ),
        ({"targets": r"mlp\.x.*"}, r"^--targets: the expression must match a linear layer .*, got mlp\\.x.*; "),
        ({"targets": r"mlp\.("}, "^--targets: the targets must be names or a regular expression, got "),
        ({"alpha": 0}, "alpha must be positive"),
        ({"dropout": 1.0}, "dropout in "),
    ],
)
def test_settings_that_cannot_be_are_refused(make_model, tokenizer, settings, message):
    decoder, _, _ = truncated(make_model("llama"), tokenizer)
    with pytest.raises(TliError, match=message):
        lora.inject(decoder, lora.LoRAConfig(**{"rank": 2, "alpha": 4, **settings}))
    assert not lora.adapters(decoder)


def test_injecting_twice_is_refused(make_model, tokenizer):
    decoder, _, _ = truncated(make_model("llama"), tokenizer)
    lora.inject(decoder, lora.LoRAConfig(rank=2, alpha=4, targets="q_proj"))
    with pytest.raises(TliError, match="the model must carry no adapters yet, got 2; "):
        lora.inject(decoder, lora.LoRAConfig(rank=2, alpha=4, targets="v_proj"))


def test_an_adapter_that_nothing_reads_is_named(make_model, tokenizer):
    decoder, _, batch = truncated(make_model("llama"), tokenizer)
    lora.inject(decoder, lora.LoRAConfig(rank=2, alpha=4))
    # the state after block 0 leaves block 1's adapters without a gradient
    decoder.config.num_hidden_layers = 1
    run(decoder, batch).sum().backward()
    with pytest.raises(TliError, match=r"^layers.1.self_attn.q_proj.lora_B: every adapter must get a gradient at step 1, got zero; "):
        lora.check_gradients(decoder, 0)


def test_gradients_reach_b_at_the_first_step_and_a_at_the_second(make_model, tokenizer):
    decoder, _, batch = truncated(make_model("llama"), tokenizer)
    lora.inject(decoder, lora.LoRAConfig(rank=2, alpha=4))
    run(decoder, batch).pow(2).sum().backward()
    lora.check_gradients(decoder, 0)
    with pytest.raises(TliError, match="lora_A: every adapter must get a gradient at step 2"):
        lora.check_gradients(decoder, 1)
    shake(decoder)
    run(decoder, batch).pow(2).sum().backward()
    lora.check_gradients(decoder, 1)


def peft_states(model, words, layer: int | str) -> torch.Tensor:
    tokens = torch.from_numpy(words.vocab_ids[tokens_of(words)])
    mask = torch.from_numpy(np.arange(tokens.shape[1]) < words.lengths[:, None])
    with torch.no_grad():
        states = model(tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    return states[-1 if layer == "output" else layer]


def assert_words_equal(packed, padded, batch, words) -> None:
    for word, length in enumerate(words.lengths):
        nodes = batch.indices[batch.indptr[word] : batch.indptr[word + 1]]
        torch.testing.assert_close(packed[nodes], padded[word, 1:length], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        # q_proj,v_proj and so on
        {"targets": lambda names, blocks: ",".join(path.rpartition(".")[2] for path in (names[0], names[2]))},
        {"targets": lambda names, blocks: "all-linear", "rslora": True},
        {"targets": lambda names, blocks: rf"{blocks}\.0\.{re.escape(names[0])}|{blocks}\.1\.{re.escape(names[-2])}"},
    ],
    ids=["two", "all", "differing"],
)
def test_peft_reads_what_we_write_on_the_whole_model(make_model, tokenizer, tmp_path, family, settings):
    folder = make_model(family)
    decoder, words, batch = truncated(folder, tokenizer)
    targets = settings["targets"](list(FAMILIES[family].linear), FAMILIES[family].blocks)
    config = lora.LoRAConfig(rank=3, alpha=5.5, dropout=0.1, **{**settings, "targets": targets})
    lora.inject(decoder, config)
    shake(decoder)
    lora.save(decoder, config, tmp_path, base_model=str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # transformers' of peft, whatever the adapter
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path).eval()
    assert len([1 for name, _ in model.named_modules() if name.endswith("lora_A.default")]) == len(lora.adapters(decoder))
    assert_words_equal(run(decoder.eval(), batch), peft_states(model, words, 2), batch, words)
    # and so on to the end of the model, with the base before and behind it
    layers = {}
    checkpoint, streams = open_checkpoint(str(folder)), [None, lora.load(tmp_path), None]
    stream_layers(checkpoint, batch, words.vocab_ids, CPU, streams, lambda layer, states: layers.__setitem__(layer, states))
    base, adapted, base_again = layers["output"]
    assert torch.equal(base, base_again)
    assert not torch.equal(base, adapted)
    assert_words_equal(adapted, peft_states(model, words, "output"), batch, words)


@pytest.mark.parametrize("transformed", [[0, 1], None], ids=["two blocks", "all blocks"])
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ["k_proj", "gate_proj"]), ("gpt2", ["c_attn", "c_proj"]), ("opt", ["v_proj", "fc1"]), ("gpt_neox", ["query_key_value"])],
)
def test_we_read_what_peft_writes(make_model, tokenizer, tmp_path, transformed, dora, family, targets):
    folder = make_model(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"target_modules": targets, "fan_in_fan_out": FAMILIES[family].transposed, "use_dora": dora}
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, layers_to_transform=transformed, use_rslora=True, **settings))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    adapter = lora.load(tmp_path)
    decoder, words, batch = truncated(folder, tokenizer)
    adapter.attach(decoder)
    assert_words_equal(run(decoder, batch), peft_states(model.eval(), words, 2), batch, words)
    layers = {}
    stream_layers(
        open_checkpoint(str(folder)), batch, words.vocab_ids, CPU, [adapter], lambda layer, states: layers.__setitem__(layer, states[0])
    )
    assert_words_equal(layers["output"], peft_states(model, words, "output"), batch, words)


def test_what_is_saved_loads_to_the_same_bytes(make_model, tokenizer, tmp_path):
    decoder, _, _ = truncated(make_model("llama"), tokenizer)
    config = lora.LoRAConfig(rank=3, alpha=6)
    lora.inject(decoder, config)
    shake(decoder)
    for folder in ("one", "two"):
        lora.save(decoder, config, tmp_path / folder, "base")
    assert (tmp_path / "one" / lora.ADAPTER_FILE).read_bytes() == (tmp_path / "two" / lora.ADAPTER_FILE).read_bytes()
    loaded, original = lora.load(tmp_path / "one"), lora.snapshot(decoder, config.scale)
    assert loaded.scale == original.scale == 2
    assert loaded.factors.keys() == original.factors.keys()
    for path, (lora_a, lora_b) in original.factors.items():
        assert torch.equal(loaded.factors[path][0], lora_a)
        assert torch.equal(loaded.factors[path][1], lora_b)


def spoil(folder, kind: str) -> None:
    weights, config = folder / lora.ADAPTER_FILE, folder / lora.CONFIG_FILE
    tensors = load_file(weights)
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif kind == "half":
        save_file({key: tensor for key, tensor in tensors.items() if "q_proj.lora_B" not in key}, weights)
    elif kind == "tower":
        save_file({key.replace("model.layers", "vision_tower.layers"): tensor for key, tensor in tensors.items()}, weights)
    elif kind == "two":
        save_file({key.replace("model.model.layers.0", "model.layers.0"): tensor for key, tensor in tensors.items()}, weights)
    elif kind == "no json":
        config.write_text("{")
    elif kind == "dora":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    elif kind == "other":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no weights", "must hold adapter_model.safetensors, got none; "),
        ("truncated", "the file must be whole safetensors, got "),
        ("half", "layers.0.self_attn.q_proj must have lora_A and lora_B, got only lora_A; "),
        ("tower", "every key must name a linear layer of a block of the text decoder, got base_model.model.vision_tower.layers."),
        ("two", "all keys must be of one decoder, got model. and none; "),
        ("no json", "the file must be JSON with r and lora_alpha, got "),
        ("dora", "layers.0.mlp.down_proj must have lora_A and lora_B and lora_magnitude_vector, got only lora_A, lora_B; "),
        ("other", "the adapter must be plain LoRA, got peft_type IA3"),
    ],
)
def test_a_bad_adapter_is_one_clear_line(make_model, tokenizer, tmp_path, kind, message):
    decoder, _, _ = truncated(make_model("llama"), tokenizer)
    config = lora.LoRAConfig(rank=2, alpha=4)
    lora.inject(decoder, config)
    lora.save(decoder, config, tmp_path, "base")
    spoil(tmp_path, kind)
    with pytest.raises(TliError, match=message) as error:
        lora.load(tmp_path)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_width_is_refused(make_model, tokenizer, tmp_path):
    decoder, _, _ = truncated(make_model("llama", hidden_size=32), tokenizer)
    config = lora.LoRAConfig(rank=2, alpha=4)
    lora.inject(decoder, config)
    lora.save(decoder, config, tmp_path, "base")
    other, _, _ = truncated(make_model("llama"), tokenizer)
    with pytest.raises(
        TliError, match=r"^layers.0.self_attn.q_proj: the adapter must fit the model: 64x48, got A \(2, 32\), B \(64, 2\); "
    ):
        lora.load(tmp_path).attach(other)
