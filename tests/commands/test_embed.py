"""Embeddings of words, held against transformers and peft, word by word without padding or a trie."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tli import TliError, TrainConfig, embed, load_adapter, train
from tli.model.linear_map import load_map

WORDS = ["kitabu", "mtu", "book", "person", "kitabu", "x"]


@pytest.fixture(scope="module")
def adapter(make_model, word_list, tmp_path_factory) -> tuple[str, str]:
    """A model's folder, and a trained adapter's; words stand without a prefix."""
    model, output = str(make_model("llama")), str(tmp_path_factory.mktemp("embed") / "adapter")
    train(TrainConfig(model=model, pairs=str(word_list), layer=2, rank=4, batch=14, epochs=3, warmup=2, prefix="", output=output))
    return model, output


def truth(model, tokenizer, word: str, layer: int, norm) -> torch.Tensor:
    """The mean of the normed states of a word's own tokens, BOS left out, at unit length; in fp64."""
    ids = torch.tensor([tokenizer(word, add_special_tokens=False)["input_ids"]])
    ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0, 1:].double()
    normed = states / (states.square().mean(1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
    return torch.nn.functional.normalize((normed if layer < model.config.num_hidden_layers else states).mean(0), dim=0)


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, 1, 3, "output"])
def test_the_vectors_are_those_of_peft_on_the_whole_model(adapter, layer):
    folder, output = adapter
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), output).eval()
    tokenizer, decoder = AutoTokenizer.from_pretrained(folder), whole.base_model.model.model
    # without a layer it is the one that was trained
    number = {None: 2, "output": 4}.get(layer, layer)
    expected = torch.stack([truth(whole, tokenizer, word, number, decoder.norm) for word in WORDS])
    found = embed(WORDS, adapter=output, layer=layer)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(found[0], found[4])
    # an adapter that changed nothing would pass on its base
    assert (embed(WORDS, model=folder, layer=layer) - found).abs().max() > 1e-3


def test_the_first_thing_on_a_new_machine_can_be_embedding(adapter, tmp_path, monkeypatch):
    from tli.runtime import cpu

    vectors = embed(WORDS, model=adapter[0])
    # what this processor does best has not been measured yet
    monkeypatch.setenv("TLI_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_known", {})
    torch.testing.assert_close(embed(WORDS, model=adapter[0]), vectors, rtol=0, atol=1e-5)
    assert not vectors.requires_grad


def test_many_words_are_embedded_as_few(adapter, monkeypatch):
    from tli.commands import embed as module

    whole = embed(WORDS, adapter=adapter[1])
    monkeypatch.setattr(module, "_WORDS_AT_ONCE", 2)
    torch.testing.assert_close(embed(WORDS, adapter=adapter[1]), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ([], {}, "embed: the words must be a list of one word or more, got \\[\\]; give a list"),
        ("maji", {}, "embed: the words must be a list of one word or more, got 'maji'"),
        (["maji"], {"layer": 9}, "--layer: the layer must be from 1 to 4"),
        (["maji"], {"adapter": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_embedded_is_one_line(adapter, words, options, message):
    with pytest.raises(TliError, match=message):
        embed(words, **{"adapter": adapter[1], **options})


def test_an_adapters_map_takes_the_words_of_both_languages_to_one_space(adapter):
    folder, output = adapter
    fitted = load_map(output)
    assert fitted.report["map"]["layer"] == 2
    for language, side in (("swahili", fitted.linear.of_source), ("english", fitted.linear.of_target)):
        plain = embed(WORDS, adapter=output).double().numpy()
        found = embed(WORDS, adapter=output, language=language)
        expected = torch.nn.functional.normalize(torch.from_numpy(side(plain)), dim=1)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    with pytest.raises(TliError, match="the language of words for a map must be swahili or english, got 'luo'"):
        embed(WORDS, adapter=output, language="luo")
    with pytest.raises(TliError, match="words go through the map of an adapter at its own layer, got layer 1; leave language or layer out"):
        embed(WORDS, adapter=output, language="swahili", layer=1)
    with pytest.raises(TliError, match="a language must have a map, got none"):
        embed(WORDS, model=folder, language="swahili")


def test_a_map_that_is_anothers_or_lost_is_told(adapter, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(adapter[1], copied)
    facts = json.loads((copied / "map.json").read_text())
    (copied / "map.json").write_text(json.dumps({**facts, "adapter": "0"}))
    with pytest.raises(TliError, match="the map must be that of the adapter beside it, got another's; take the map away"):
        load_adapter(copied)
    (copied / "map.safetensors").unlink()
    with pytest.raises(
        TliError, match="the map that was saved with the adapter must lie beside it, got no such file; put it back, or train"
    ):
        load_adapter(copied)
