"""Perplexity and divergence against transformers' whole model with peft's adapter, and against sums written out."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.small_adapters import save_adapter
from tli.metrics import perplexity as harm_module
from tli.metrics.perplexity import NextTokens, harm, predict
from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.families import FAMILIES
from tli.model.text_windows import TextWindows, read_windows
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError

CPU = resolve_device("cpu", "float32")
TEXT = "Habari za asubuhi. Watoto wanasoma vitabu shuleni; mwalimu anafundisha. The children read books, and the teacher listens.\n" * 3


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def whole_model(folder, adapter, windows) -> list[torch.Tensor]:
    """log softmax of the logits at every position of every window, fp64 [windows, width, V]: of the base, and with the adapter."""
    found = []
    for path in (None, adapter):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if path is not None:
            model = PeftModel.from_pretrained(model, path)
        with torch.no_grad():
            found.append(model(input_ids=torch.from_numpy(windows.vocab_ids[windows.tokens])).logits.double().log_softmax(-1))
    return found


@pytest.mark.parametrize(
    ("family", "tied"),
    [*((family, True) for family in FAMILIES), *((family, False) for family in ("llama", "qwen3", "gpt_neox", "gpt2", "opt"))],
)
def test_predictions_are_those_of_the_whole_model_with_pefts_adapter(make_model, text, tmp_path, family, tied):
    folder = make_model(family, tied=tied)
    adapter = save_adapter(folder, tmp_path / "adapter", layer=3)
    checkpoint = open_checkpoint(str(folder))
    windows = read_windows(text, checkpoint, width=24)
    assert windows.lengths[-1] < 24
    (base, adapted), reason = predict(checkpoint, windows, CPU, [lora.load(adapter)])
    assert reason is None
    logs = whole_model(folder, adapter, windows)
    expected = {"base": [], "adapted": [], "kl": [], "total_variation": []}
    for window, length in enumerate(windows.lengths):
        for position in range(length - 1):
            p, q = (stream[window, position] for stream in logs)
            following = windows.vocab_ids[windows.tokens[window, position + 1]]
            expected["base"].append(-p[following])
            expected["adapted"].append(-q[following])
            expected["kl"].append((p.exp() * (p - q)).sum())
            expected["total_variation"].append((p.exp() - q.exp()).abs().sum() / 2)
    truth = {name: torch.stack(values).numpy() for name, values in expected.items()}
    for ours, name in ((base.nll, "base"), (adapted.nll, "adapted")):
        np.testing.assert_allclose(ours, truth[name], rtol=2e-4, atol=2e-4)
    for name in ("kl", "total_variation"):
        np.testing.assert_allclose(getattr(adapted, name), truth[name], rtol=2e-3, atol=2e-5)
        assert not getattr(base, name).any()
    # the adapter does something, or nothing was compared
    assert truth["kl"].mean() > 0.01


def test_every_token_of_the_text_is_predicted_once(make_model, text):
    checkpoint = open_checkpoint(str(make_model("llama")))
    ids = checkpoint.tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    for width in (2, 9, 64):
        windows = read_windows(text, checkpoint, width)
        found = [windows.vocab_ids[row[:length]] for row, length in zip(windows.tokens, windows.lengths)]
        assert {row[0] for row in found} == {0}
        assert [int(token) for row in found for token in row[1:]] == ids
        assert all(length == width for length in windows.lengths[:-1])
    part = read_windows(text, checkpoint, 9, most_tokens=20)
    assert part.lengths.tolist() == [9, 9, 5]
    assert (part.facts["tokens"], part.facts["tokens_in_file"]) == (20, len(ids))
    # a text shorter than one window
    assert read_windows(text, checkpoint, 64, most_tokens=5).tokens.shape == (1, 6)


@pytest.mark.parametrize("letters", ["habari za asubuhi ", "水と火と木", "ሰላም"], ids=["words", "without spaces", "three bytes a letter"])
def test_of_a_long_text_no_more_is_read_than_is_taken(make_model, tmp_path, letters):
    """And the tokens are those of the whole text."""
    checkpoint = open_checkpoint(str(make_model("llama")))
    path = tmp_path / "long.txt"
    # a byte that is no UTF-8, far behind, is never met
    path.write_bytes(b"\xef\xbb\xbf" + (letters * (3_000_000 // len(letters.encode()))).encode() + b"\xff")
    tracemalloc.start()
    part = read_windows(path, checkpoint, 9, most_tokens=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    ids = checkpoint.tokenizer()(letters * 2000, add_special_tokens=False)["input_ids"][:500]
    found = [part.vocab_ids[row[:length]] for row, length in zip(part.tokens, part.lengths)]
    assert [int(token) for row in found for token in row[1:]] == ids
    assert (part.facts["tokens"], part.facts["tokens_in_file"]) == (500, None)
    # the hash walks through it a megabyte at a time
    assert peak < 3_000_000


def test_no_number_depends_on_how_much_is_held_at_once(make_model, text, tmp_path, monkeypatch):
    folder = make_model("llama")
    checkpoint, adapter = open_checkpoint(str(folder)), lora.load(save_adapter(folder, tmp_path / "adapter"))
    windows = read_windows(text, checkpoint, width=20)
    usual, _ = predict(checkpoint, windows, CPU, [adapter])
    monkeypatch.setattr(harm_module, "_CHUNK_POSITIONS", 3)
    monkeypatch.setattr(harm_module, "_HEAD_ROWS", 37)
    monkeypatch.setattr("tli.model.hidden_states._CHUNK_NODES", 30)
    chunked, _ = predict(checkpoint, windows, CPU, [adapter])
    for one, other in zip(usual, chunked):
        np.testing.assert_allclose(other.nll, one.nll, atol=1e-5)
        np.testing.assert_allclose(other.kl, one.kl, atol=1e-5)


def test_means_are_means_with_intervals_around_them(make_model, text, tmp_path):
    folder = make_model("llama")
    checkpoint = open_checkpoint(str(folder))
    windows = read_windows(text, checkpoint, width=20)
    adapters = [lora.load(save_adapter(folder, tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    predictions, _ = predict(checkpoint, windows, CPU, adapters)
    found = harm(predictions, windows, seed=0)
    assert len(found["after"]) == 2
    base = predictions[0].nll.mean()
    assert found["before"]["perplexity"]["value"] == pytest.approx(math.exp(base))
    for record, stream in zip(found["after"], predictions[1:]):
        assert record["perplexity"]["value"] == pytest.approx(math.exp(stream.nll.mean()))
        assert record["perplexity_ratio"]["value"] == pytest.approx(math.exp(stream.nll.mean() - base))
        assert record["kl"]["value"] == pytest.approx(stream.kl.mean())
        for key in ("perplexity", "perplexity_ratio", "kl", "total_variation"):
            assert record[key]["low"] < record[key]["value"] < record[key]["high"]
    one = read_windows(text, checkpoint, 64, most_tokens=9)
    alone = harm(predict(checkpoint, one, CPU, adapters)[0], one, seed=0)
    assert alone["before"]["perplexity"]["low"] is None
    assert alone["after"][0]["kl"]["high"] is None


def test_tokens_of_one_window_are_resampled_together():
    # every window at its own level: what scatters are the windows, 24 of them, and not their 240 tokens
    generator = np.random.default_rng(0)
    levels = np.repeat(generator.normal(3, 1, (2, 24)), 10, axis=1)
    windows = TextWindows(np.zeros((24, 11), np.int64), np.full(24, 11), np.zeros(1, np.int64), {})
    base, adapted = (NextTokens(nll, nll / 10, nll / 20) for nll in levels)
    found = harm([base, adapted], windows, seed=0)["after"][0]
    error = levels[1, ::10].std(ddof=1) / math.sqrt(24)
    for record, unit in ((found["kl"], 10), (found["total_variation"], 20)):
        assert record["high"] - record["low"] == pytest.approx(2 * 1.96 * error / unit, rel=0.15)
    low, high = (math.log(found["perplexity"][end]) for end in ("low", "high"))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    change = (levels[1] - levels[0])[::10]
    low, high = (math.log(found["perplexity_ratio"][end]) for end in ("low", "high"))
    assert high - low == pytest.approx(2 * 1.96 * change.std(ddof=1) / math.sqrt(24), rel=0.15)


def test_an_adapter_of_zeros_does_no_harm(make_model, text, tmp_path):
    folder = make_model("qwen2")
    checkpoint = open_checkpoint(str(folder))
    adapter = lora.load(save_adapter(folder, tmp_path / "adapter", size=0.0))
    windows = read_windows(text, checkpoint)
    found = harm(predict(checkpoint, windows, CPU, [adapter])[0], windows, seed=0)["after"][0]
    assert found["perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-6)
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-6)


def test_absent_shards_are_said(make_model, text, tmp_path):
    folder = make_model("llama", shards=True)
    copy = tmp_path / "copy"
    copy.mkdir()
    files = sorted(folder.glob("*.safetensors"))
    for path in folder.iterdir():
        if path != files[-1]:
            (copy / path.name).symlink_to(path)
    checkpoint = open_checkpoint(str(copy))
    predictions, reason = predict(checkpoint, read_windows(text, checkpoint), CPU, [])
    assert predictions == []
    assert files[-1].name in reason


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "must hold at least 2 tokens, got 0"),
        (TEXT.encode(), {"most_tokens": 1}, "must hold at least 2 tokens, got 1"),
        ("niño".encode("latin-1"), {}, "must be a readable UTF-8 file, got byte 2: no utf-8"),
        (None, {}, "must be a readable UTF-8 file, got no such file"),
        (TEXT.encode(), {"width": 65}, "^--window: a window must be 2 to 64 tokens wide, .*, got 65"),
        (TEXT.encode(), {"width": 1}, "^--window: .*, got 1"),
    ],
)
def test_texts_that_cannot_be_measured_are_refused(make_model, tmp_path, content, options, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TliError, match=f"(?i){message}"):
        read_windows(path, open_checkpoint(str(make_model("llama"))), **options)


def test_a_window_is_no_wider_than_the_model_sees(make_model, text):
    assert read_windows(text, open_checkpoint(str(make_model("gemma2")))).tokens.shape[1] == 24
    with pytest.raises(TliError, match="2 to 24 tokens"):
        read_windows(text, open_checkpoint(str(make_model("mistral"))), width=25)


def test_a_head_that_is_neither_tied_nor_there_is_a_reason_not_to_predict(make_model, text):
    import dataclasses

    checkpoint = open_checkpoint(str(make_model("llama", tied=False)))
    shards = {name: file for name, file in checkpoint.shard_of.items() if name != "lm_head.weight"}
    windows = read_windows(text, checkpoint)
    predictions, reason = predict(dataclasses.replace(checkpoint, shard_of=shards), windows, CPU, [])
    assert predictions == []
    assert "has no head" in reason
