"""Layer L of the truncated model is the whole model's ``hidden_states[L]``: bit for bit padded, to rounding packed."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.words import tokens_of
from tli.data.batch import to_batch
from tli.data.packing import tokenise
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder, run
from tli.model.families import FAMILIES
from tli.model.hidden_states import stream_layers
from tli.model.shape import Shape
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError

WORDS = ["kitabu", "kitanda", "kiti", "mtoto", "mtu", "watu", "book", "books", "bookshop", "child", "children", "kitabu", "w"]
CPU = resolve_device("cpu", "float32")


def whole_states(folder, tokens: np.ndarray, lengths: np.ndarray) -> list[torch.Tensor]:
    """Padded hidden states 0..N-1 and, behind them, ``output``, of transformers' whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mask = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None])
    with torch.no_grad():
        return model.base_model(torch.from_numpy(tokens), attention_mask=mask.long(), output_hidden_states=True).hidden_states


def relative_error(packed: torch.Tensor, whole: torch.Tensor, batch, lengths) -> float:
    worst = 0.0
    for word, length in enumerate(lengths):
        nodes = batch.indices[batch.indptr[word] : batch.indptr[word + 1]]
        expected = whole[word, 1:length]
        worst = max(worst, ((packed[nodes] - expected).abs().max() / expected.abs().max()).item())
    return worst


def check_states(folder, words, layers) -> None:
    """Truncated states are the whole model's: bit for bit padded, to rounding packed."""
    ids = words.vocab_ids[tokens_of(words)]
    whole = whole_states(folder, ids, words.lengths)
    attended = torch.from_numpy(np.arange(ids.shape[1]) < words.lengths[:, None])
    checkpoint = open_checkpoint(str(folder))
    for layer in layers:
        decoder = load_truncated_decoder(checkpoint, layer, words.vocab_ids, CPU)
        padded = decoder(input_ids=torch.from_numpy(tokens_of(words)), attention_mask=attended.long(), use_cache=False).last_hidden_state
        assert torch.equal(padded[attended], whole[layer][attended])
        batch = to_batch(words.pack(np.arange(len(WORDS)), width=24), torch.float32, CPU.device)
        with torch.no_grad():
            assert relative_error(run(decoder, batch), whole[layer], batch, words.lengths) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_family_gives_the_whole_models_states(make_model, tokenizer, family, tied):
    folder = make_model(family, tied=tied, shards=not tied)
    check_states(folder, tokenise(tokenizer, WORDS, window=24), (1, 2, 3))


# of one family, what its models differ in
KINDS = [
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"parallel_attn": False, "multi_query": False}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("cohere", {"use_qk_norm": False, "attention_bias": True}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80}),
    ("bloom", {"apply_residual_connection_post_layernorm": True, "num_attention_heads": 3}),
    ("opt", {"enable_bias": False}),
    ("xglm", {"scale_embedding": False}),
    ("phi3", {"sliding_window": 24, "partial_rotary_factor": 0.5}),
]


@pytest.mark.parametrize(("family", "kind"), KINDS, ids=str)
def test_every_kind_of_model_in_a_family_gives_the_whole_models_states(make_model, tokenizer, family, kind):
    folder = make_model(family, **kind)
    check_states(folder, tokenise(tokenizer, WORDS, window=24), (1, 3))
    # and its weights are as many as config.json implies
    shape = Shape.from_config(json.loads((folder / "config.json").read_text()), "it")
    held = [tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items() if f"{FAMILIES[family].blocks}.0." in name]
    assert shape.block_bytes("full", 4) == sum(held)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gpt_neox", "opt"])
def test_checkpoints_of_a_bare_model_with_old_buffers_are_read(make_model, tokenizer, tmp_path, family):
    # as the originals on the hub are: without the name of the causal LM's decoder, with masks and frequencies beside the weights
    folder, words = tmp_path / "model", tokenise(tokenizer, WORDS, window=24)
    shutil.copytree(make_model(family), folder)
    inside, first = (
        f"{FAMILIES[family].causal_lm}.",
        f"{FAMILIES[family].blocks}.0.{next(iter(FAMILIES[family].linear)).rpartition('.')[0]}",
    )
    tensors = {name.removeprefix(inside): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors |= {f"{first}.bias": torch.ones(1, 1, 8, 8).tril().bool(), f"{first}.masked_bias": torch.tensor(-1e9)}
    tensors |= {f"{first}.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(str(folder)).prefix == ""
    checkpoints = [open_checkpoint(str(path)) for path in (folder, make_model(family))]
    decoders = [load_truncated_decoder(checkpoint, 2, words.vocab_ids, CPU) for checkpoint in checkpoints]
    batch = to_batch(words.pack(np.arange(len(WORDS))), torch.float32, CPU.device)
    assert torch.equal(*(run(decoder, batch) for decoder in decoders))


@pytest.mark.parametrize(
    ("family", "kind", "said"),
    [
        ("falcon", {"alibi": True}, "alibi in config.json must be False in a model of the family falcon, got True; "),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim in config.json must be 48 in a model of the family opt, got 32; "),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before in config.json must be True .*, got False; "),
        ("bloom", {"slow_but_exact": True}, "slow_but_exact in config.json must be False .*, got True; "),
        ("xglm", {"pad_token_id": 3}, "pad_token_id in config.json must be 1 .*, got 3; "),
    ],
)
def test_what_computes_otherwise_within_a_family_is_refused(make_model, family, kind, said):
    folder = make_model(family, **kind)
    with pytest.raises(TliError, match=said):
        open_checkpoint(str(folder))
    with pytest.raises(TliError, match=said):
        Shape.from_config(json.loads((folder / "config.json").read_text()), "it")


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_gives_every_layer_and_the_output(make_model, tokenizer, family):
    folder = make_model(family)
    words = tokenise(tokenizer, WORDS, window=24)
    whole = whole_states(folder, words.vocab_ids[tokens_of(words)], words.lengths)
    batch = to_batch(words.pack(np.arange(len(WORDS)), width=24), torch.float32, CPU.device)
    layers = {}
    reason = stream_layers(
        open_checkpoint(str(folder)), batch, words.vocab_ids, CPU, [None, None], lambda layer, states: layers.__setitem__(layer, states)
    )
    assert reason is None
    assert list(layers) == [0, 1, 2, 3, 4, "output"]
    for layer in (0, 1, 2, 3, "output"):
        first, second = layers[layer]
        assert torch.equal(first, second)
        # transformers gives the normalised state in place of the last layer's
        assert relative_error(first, whole[4 if layer == "output" else layer], batch, words.lengths) < 2e-5


@pytest.mark.slow
def test_the_starter_gives_the_whole_models_states(starter):
    checkpoint = open_checkpoint(str(starter))
    words = tokenise(checkpoint.tokenizer(), WORDS, window=100)
    whole = whole_states(starter, words.vocab_ids[tokens_of(words)], words.lengths)
    batch = to_batch(words.pack(np.arange(len(WORDS))), torch.float32, CPU.device)
    layers = {}
    stream_layers(checkpoint, batch, words.vocab_ids, CPU, [None], lambda layer, states: layers.__setitem__(layer, states[0]))
    decoder = load_truncated_decoder(checkpoint, 2, words.vocab_ids, CPU)
    attended = torch.from_numpy(np.arange(tokens_of(words).shape[1]) < words.lengths[:, None])
    padded = decoder(input_ids=torch.from_numpy(tokens_of(words)), attention_mask=attended.long(), use_cache=False).last_hidden_state
    assert torch.equal(padded[attended], whole[2][attended])
    assert torch.equal(run(decoder, batch), layers[2])
    for layer in (0, 1, 2, 15, 29, "output"):
        assert relative_error(layers[layer], whole[30 if layer == "output" else layer], batch, words.lengths) < 1e-4


def test_a_chunk_of_bins_changes_nothing(make_model, tokenizer, monkeypatch):
    words = tokenise(tokenizer, WORDS, window=24)
    batch = to_batch(words.pack(np.arange(len(WORDS)), width=12), torch.float32, CPU.device)
    checkpoint = open_checkpoint(str(make_model("gemma3_text")))
    results = []
    for nodes in (12, 24, 10_000):
        monkeypatch.setattr("tli.model.hidden_states._CHUNK_NODES", nodes)
        stream_layers(checkpoint, batch, words.vocab_ids, CPU, [None, None], lambda layer, states: results.append(states))
    third = len(results) // 3
    for one, two, whole in zip(results[:third], results[third : 2 * third], results[2 * third :], strict=True):
        for stream in (0, 1):
            torch.testing.assert_close(one[stream], whole[stream], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(two[stream], whole[stream], rtol=1e-5, atol=1e-5)


def test_only_the_shards_of_the_first_blocks_are_opened(make_model, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama", shards=True), folder)
    checkpoint = open_checkpoint(str(folder))
    needed = {
        file for name, file in checkpoint.shard_of.items() if name.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1."))
    }
    later = set(checkpoint.shard_of.values()) - needed
    assert later
    for file in later:
        (folder / file).unlink()
    words = tokenise(tokenizer, WORDS, window=24)
    batch = to_batch(words.pack(np.arange(len(WORDS))), torch.float32, CPU.device)
    decoder = load_truncated_decoder(checkpoint, 2, words.vocab_ids, CPU)
    layers = {}
    reason = stream_layers(checkpoint, batch, words.vocab_ids, CPU, [None], lambda layer, states: layers.__setitem__(layer, states[0]))
    assert torch.equal(run(decoder, batch), layers[2])
    assert "output" not in layers
    assert any(file in reason for file in later)


def test_only_the_rows_that_occur_are_kept_and_all_rows_agree(make_model, tokenizer):
    checkpoint = open_checkpoint(str(make_model("llama")))
    words = tokenise(tokenizer, WORDS, window=24)
    everything = words.with_all_rows(checkpoint.config.vocab_size)
    few, all_of_them = (load_truncated_decoder(checkpoint, 2, each.vocab_ids, CPU) for each in (words, everything))
    assert len(few.embed_tokens.weight) == len(words.vocab_ids) < len(all_of_them.embed_tokens.weight) == len(tokenizer)
    numbers = np.arange(len(WORDS))
    batches = [to_batch(each.pack(numbers), torch.float32, CPU.device) for each in (words, everything)]
    used = batches[0].indices
    # with other numbers the words sort into other nodes
    assert torch.equal(run(few, batches[0])[used], run(all_of_them, batches[1])[batches[1].indices])


def test_nf4_weights_are_bitsandbytes_own_rounding(make_model, tokenizer):
    folder = make_model("llama", hidden_size=64, intermediate_size=128)
    words = tokenise(tokenizer, WORDS, window=24)
    decoder = load_truncated_decoder(open_checkpoint(str(folder)), 1, words.vocab_ids, resolve_device("cpu", "float32", "nf4"))
    stored = load_file(folder / "model.safetensors")
    weight = stored["model.layers.0.mlp.up_proj.weight"]
    rounded = decoder.layers[0].mlp.up_proj.weight
    # independent: the nearest of the sixteen codes, by brute force, for every block of 64
    import bitsandbytes as bnb

    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    blocks = weight.to(torch.bfloat16).float().view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = code[(blocks / scale)[..., None].sub(code).abs().argmin(dim=-1)] * scale
    assert torch.equal(rounded, nearest.view_as(weight))
    assert torch.equal(decoder.layers[0].input_layernorm.weight, stored["model.layers.0.input_layernorm.weight"])


@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
def test_checkpoints_that_transformers_quantised_load_as_they_are(make_model, tokenizer, tmp_path, nested):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    source = make_model("llama", hidden_size=64, intermediate_size=128)
    whole = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.float32)
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = tokenise(tokenizer, WORDS, window=24)
    decoder = load_truncated_decoder(open_checkpoint(str(tmp_path)), 2, words.vocab_ids, resolve_device("cpu", "float32"))
    for index, path in itertools.product((0, 1), ("self_attn.k_proj", "mlp.down_proj")):
        stored = whole.model.layers[index].get_submodule(path).weight
        expected = dequantize_4bit(stored.data, stored.quant_state)
        torch.testing.assert_close(decoder.layers[index].get_submodule(path).weight, expected, rtol=1e-6, atol=0)


def damage(folder, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no json":
        (folder / "config.json").write_text("{")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "corrupt":
        weights.write_bytes(b"\xff" * 100 + weights.read_bytes()[100:])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "misshapen": {"intermediate_size": 80},
            "family": {"model_type": "mpt"},
            "unknown": {"model_type": "no-such-family"},
            "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "more blocks": {"num_hidden_layers": 9},
        }[kind]
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "must hold a config.json, got none; "),
        ("no json", "config.json must describe a model"),
        ("truncated", "the file must be whole safetensors, got "),
        ("corrupt", "the file must be whole safetensors, got "),
        ("no weights", "the folder must hold model.safetensors, got none; "),
        ("no tokenizer", "the tokenizer must be readable, got "),
        ("misshapen", "must have the shape 80x48 that config.json implies, got 96x48; "),
        ("family", "known to truncate exactly .*, got mpt; "),
        ("unknown", "config.json must describe a model that transformers knows, got "),
        ("quantised", "the weights must be unquantised or bitsandbytes' NF4, got "),
        ("more blocks", "must hold the tensor model.layers.4"),
    ],
)
def test_a_bad_checkpoint_is_one_clear_line(make_model, tmp_path, kind, message):
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    damage(folder, kind)

    def use() -> None:
        checkpoint = open_checkpoint(str(folder))
        checkpoint.tokenizer()
        load_truncated_decoder(checkpoint, 9 if kind == "more blocks" else 2, np.arange(10), CPU)

    with pytest.raises(TliError, match=message) as error:
        use()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layer", [0, -1, 5])
def test_a_layer_out_of_range_is_refused(make_model, layer):
    with pytest.raises(TliError, match=rf"^--layer: the layer must be from 1 to 4, .*, got {layer}; "):
        load_truncated_decoder(open_checkpoint(str(make_model("llama"))), layer, np.arange(3), CPU)


def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_name(tmp_path):
    with pytest.raises(TliError, match="^--model: the model must be a folder or a hub name, got .*/absent, which is no folder; "):
        open_checkpoint(str(tmp_path / "absent"))


def test_the_models_hash_is_of_the_numbers_that_are_read(make_model, tmp_path):
    whole, shards = (make_model("llama", shards=shards) for shards in (False, True))
    assert open_checkpoint(str(whole)).sha256(2) == open_checkpoint(str(shards)).sha256(2)

    def changed(part: str) -> str:
        folder = tmp_path / part
        shutil.copytree(whole, folder)
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in sorted(tensors) if part in name)
        tensors[name].view(-1)[3] += 0.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return open_checkpoint(str(folder)).sha256(2)

    own = open_checkpoint(str(whole)).sha256(2)
    assert changed("layers.1.") != own
    assert changed("embed_tokens") != own
    # what the first two blocks do not need has no part in it
    assert changed("layers.2.") == own
    assert open_checkpoint(str(whole)).sha256(3) != own
