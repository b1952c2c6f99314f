"""The scan against transformers' whole model and peft, word by word; the sink-only model; the command as a user meets it."""

import copy
import dataclasses
import io
import itertools
import json
import pathlib
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.small_adapters import UNREADABLE, unreadable
from tli.commands.scan import _pairs
from tli.commands.scan import scan as scan_command
from tli.config import ScanConfig
from tli.data import word_pairs
from tli.data.batch import to_batch
from tli.data.packing import TokenisedWords, tokenise
from tli.metrics import layer_choice, layer_pass, layers
from tli.metrics.sink import token_lengths
from tli.model import hidden_states, lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder
from tli.model.families import FAMILIES, norm_of, traits_of
from tli.model.pooling import Pooling, resolve_token_norm
from tli.reports.figures.scan import draw_scan
from tli.reports.scan import show, verdict
from tli.runtime.cli import parse
from tli.runtime.console import open_console
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError, run_command
from tli.runtime.files import sha256

ROOT = pathlib.Path(__file__).parent.parent.parent
CPU = resolve_device("cpu", "float32")
NONE_ALIKE = np.zeros((0, 2), np.int64)


@pytest.fixture(scope="module")
def pairs() -> list[word_pairs.Pair]:
    # two of them mean the same
    return [*word_pairs.read_pairs(None, "swahili", "english")[:24], word_pairs.Pair("abiri", "passenger", loan=False)]


@pytest.fixture
def settings(make_model, word_list, tmp_path) -> dict:
    return {"model": str(make_model("llama")), "pairs": str(word_list), "output": str(tmp_path / "out")}


def spell(tokenizer, pairs: list[word_pairs.Pair]) -> TokenisedWords:
    return tokenise(tokenizer, [pair.source for pair in pairs] + [pair.target for pair in pairs], 60, " ")


def scanned(folder, words: TokenisedWords, false_negatives: np.ndarray, token_norm: str = "auto", adapter=None, **more):
    checkpoint = open_checkpoint(str(folder))
    token_norm = resolve_token_norm(token_norm, checkpoint)
    streams = {"base": None} if adapter is None else {"base": None, "adapter": adapter}
    scans, reason = layer_pass.scan_layers(
        checkpoint, words, false_negatives, Pooling.from_checkpoint(token_norm, checkpoint, CPU.device), CPU, streams, **more
    )
    assert reason is None
    return scans


def one_by_one(model, words: TokenisedWords) -> dict[int | str, list[torch.Tensor]]:
    """Each word's token states [tokens, D], fp64, by layer: transformers' whole model on one word at a time, without padding."""
    found: dict[int | str, list[torch.Tensor]] = {}
    for begin, end in zip(words.indptr, words.indptr[1:]):
        ids = torch.tensor(words.ids[begin:end])[None].long()
        with torch.no_grad():
            *hidden, last = model.base_model(ids, output_hidden_states=True).hidden_states
            # transformers gives the last layer after the final norm: the one before it is caught where it goes in
            before = []
            hook = norm_of(model.get_decoder()).register_forward_pre_hook(lambda module, inputs, caught=before: caught.append(inputs[0]))
            model.base_model(ids)
            hook.remove()
        for layer, states in enumerate([*hidden, *before]):
            found.setdefault(layer, []).append(states[0].double())
        found.setdefault("output", []).append(last[0].double())
    return found


def expected(model, words: TokenisedWords, false_negatives: np.ndarray, final_norm: bool) -> dict[tuple, np.ndarray]:
    """(layer, vectors, metric) -> values, by loops over words and pairs."""
    own_norm = norm_of(model.get_decoder())
    eps = getattr(model.config, traits_of(model).norm_eps, 1e-5)
    number, alike = len(words) // 2, {tuple(edge) for edge in false_negatives.tolist()}
    found = {}
    for layer, states in one_by_one(model, words).items():
        # transformers' own norm, in fp64; where that is a LayerNorm, the plain one
        plain = (lambda x: x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()) if traits_of(model).layer_norm else own_norm.double()
        norm = plain if final_norm and layer != "output" else (lambda x: x)
        for vectors, pool_bos, turn in (
            ("word", False, norm), ("word_bos", True, norm), ("raw", False, lambda x: x), ("raw_bos", True, lambda x: x),
        ):  # fmt: skip
            with torch.no_grad():
                means = [turn(of_word)[0 if pool_bos else start :].mean(0) for of_word, start in zip(states, words.starts, strict=True)]
            cosines = np.array([[float(torch.cosine_similarity(s, t, dim=0)) for t in means[number:]] for s in means[:number]])
            others = [[j for j in range(number) if j != i and (i, j) not in alike] for i in range(number)]
            found[layer, vectors, "cosine"] = cosines.diagonal()
            found[layer, vectors, "mismatched"] = np.array(
                [(np.mean(cosines[i, others[i]]) + np.mean(cosines[others[i], i])) / 2 for i in range(number)]
            )
        sink = np.array([float(of_word[0].norm()) for of_word in states])
        own = [of_word[start:].norm(dim=1) for of_word, start in zip(states, words.starts, strict=True)]
        share = sink / (sink + [float(lengths.sum()) for lengths in own])
        found[layer, "raw_bos", "sink_share"] = (share[:number] + share[number:]) / 2
        found[layer, "raw_bos", "norm_ratio"] = sink.mean() / float(torch.cat(own).mean())
    own_norm.float()
    return found


def assert_scan_is(scans: dict, stream: str, truth: dict[tuple, np.ndarray], tolerance: float) -> None:
    assert {layer for of, layer in scans if of == stream} == {layer for layer, *_ in truth}
    for (layer, *key), values in truth.items():
        scan = scans[stream, layer]
        measured = scan.of_set[*key] if key[1] == "norm_ratio" else scan.per_pair[*key]
        np.testing.assert_allclose(measured, values, rtol=tolerance, atol=tolerance, err_msg=str((layer, key)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scan_is_the_whole_models_states_word_by_word(make_model, tokenizer, pairs, family):
    folder, words, false_negatives = make_model(family, blocks=3), spell(tokenizer, pairs), word_pairs.false_negative_pairs(pairs)
    assert len(false_negatives) > 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_scan_is(scanned(folder, words, false_negatives), "base", expected(model, words, false_negatives, final_norm=True), 5e-5)


def test_a_scan_with_an_adapter_is_pefts_model_and_leaves_the_base_alone(make_model, tokenizer, pairs, tmp_path):
    folder, words, false_negatives = make_model("llama"), spell(tokenizer, pairs), word_pairs.false_negative_pairs(pairs)
    decoder = load_truncated_decoder(open_checkpoint(str(folder)), 2, words.vocab_ids, CPU)
    lora.inject(decoder, lora.LoRAConfig(rank=4, alpha=8.0), seed=1)
    generator = torch.Generator().manual_seed(2)
    for adapter in lora.adapters(decoder).values():
        adapter.lora_B.data.normal_(std=0.2, generator=generator)
    lora.save(decoder, lora.LoRAConfig(rank=4, alpha=8.0), tmp_path, str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scans = scanned(folder, words, false_negatives, "none", lora.load(tmp_path))
    assert_scan_is(scans, "base", expected(base, words, false_negatives, final_norm=False), 5e-5)
    adapted = PeftModel.from_pretrained(base, tmp_path).base_model.model.eval()
    truth = expected(adapted, words, false_negatives, final_norm=False)
    assert_scan_is(scans, "adapter", truth, 5e-5)
    assert np.abs(truth[1, "word", "cosine"] - scans["base", 1].per_pair["word", "cosine"]).max() > 0.05


def test_bins_chunks_padding_side_and_the_order_of_pairs_change_nothing(make_model, tokenizer, pairs, monkeypatch):
    folder = make_model("qwen3")
    whole = scanned(folder, spell(tokenizer, pairs), word_pairs.false_negative_pairs(pairs))
    order = np.random.default_rng(3).permutation(len(pairs))
    moved = [pairs[i] for i in order]
    monkeypatch.setattr(hidden_states, "_CHUNK_NODES", 30)
    left = copy.deepcopy(tokenizer)
    left.padding_side, left.pad_token = "left", "</s>"
    parts = scanned(folder, spell(left, moved), word_pairs.false_negative_pairs(moved), width=13)
    for key, scan in whole.items():
        for name, values in scan.per_pair.items():
            # a cosine may fall on the other side of the next one's rounding, no further
            tolerance = 1e-5 if "cosine" in name[1] or "mismatched" in name[1] or "gap" in name[1] else 2e-3
            np.testing.assert_allclose(values[order], parts[key].per_pair[name], atol=tolerance, err_msg=str((key, name)))
        for name, value in scan.of_set.items():
            assert parts[key].of_set[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (key, name)
    one, other = (layers.records(found, seed=0) for found in (whole, parts))
    for record, again in zip(one, other, strict=True):
        ends = [[r[end] for end in ("value", "low", "high") if r[end] is not None] for r in (record, again)]
        np.testing.assert_allclose(*ends, atol=2e-3, rtol=1e-4, err_msg=str(record))


def test_one_block_at_a_time_is_in_memory(make_model, tokenizer, pairs, monkeypatch):
    loaded, alive = [], []
    load = hidden_states.load_block

    def watched(checkpoint, block, *arguments):
        alive.append(sum(weight() is not None for weight in loaded))
        load(checkpoint, block, *arguments)
        loaded.extend(weakref.ref(parameter) for parameter in block.parameters())

    monkeypatch.setattr(hidden_states, "load_block", watched)
    scanned(make_model("llama"), spell(tokenizer, pairs), NONE_ALIKE)
    assert alive == [0, 0, 0, 0]
    assert len(loaded) == 4 * 9


def test_lengths_are_of_a_words_own_tokens_whether_the_first_position_is_pooled_or_not(tokenizer, pairs):
    # without a prefix, whose own tokens would be pooled with the first position
    words = tokenise(tokenizer, [pair.source for pair in pairs] + [pair.target for pair in pairs], 60)
    batch, with_bos = (to_batch(words.pack(np.arange(2 * len(pairs)), pool), torch.float32, CPU.device) for pool in (False, True))
    states = torch.randn(batch.input_ids.numel(), 5, generator=torch.Generator().manual_seed(6))
    for one, other in zip(token_lengths(states, batch), token_lengths(states, with_bos), strict=True):
        torch.testing.assert_close(one, other)


def sink_only(norm: float, signal: float) -> tuple[dict, np.ndarray]:
    """Scans of layers 1 and 2: words of two tokens at right angles to all others; in layer 2 behind a first state so much longer.

    ``signal`` is what a word and its translation have in common.
    """
    number, width = 40, 256
    tokens = np.zeros((2 * number, 3), np.int64)
    tokens[:, 1:] = 1 + np.arange(4 * number).reshape(-1, 2)
    words = TokenisedWords(tokens.ravel(), 3 * np.arange(2 * number + 1), np.ones(2 * number, np.int64), np.arange(4 * number + 1))
    turned = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
    batch, with_bos = (to_batch(words.pack(np.arange(2 * number), pool), torch.float32, CPU.device) for pool in (False, True))
    scans = {}
    for layer, length in ((1, 1.0), (2, norm)):
        states = turned[batch.input_ids.flatten()] * torch.where(batch.input_ids.flatten() == 0, length, 1.0)[:, None]
        shared = turned[4 * number + 1 :][: 2 * number].repeat(2, 1)
        states = states + signal * torch.cat([torch.zeros(1, width), shared[: 4 * number]])[batch.input_ids.flatten()]
        scans["base", layer] = layers.scan_layer(states, batch, with_bos, Pooling(None, 1e-6), NONE_ALIKE)
    return scans, NONE_ALIKE


def report_of(scans: dict) -> dict:
    """What ``scan`` would make of these measurements."""
    return {
        "config": {"split": "all", "token_norm": "none", **dict.fromkeys(("prefix", "weights"), "")},
        "model": {"name": "a model", "blocks": max(layer for _, layer in scans if layer != "output")},
        "pairs": {"name": "a list", "scanned": len(next(iter(scans.values())).per_pair["word", "gap"])},
        "adapter": None,
        "missing_output": None,
        "choice": {
            "gap": layer_choice.choose_layer(layers.by_layer(scans, "base", "word", "gap"), next(iter(scans.values())).clusters, 0),
            "paper": layer_choice.choose_layer_by_cosine(layers.by_layer(scans, "base", "raw_bos", "cosine")),
        },
        "sink_layers": {"base": layer_choice.sink_layers(scans, "base")},
        "measurements": layers.records(scans, 0),
        "strata": [],
    }


def test_a_model_that_is_nothing_but_a_sink_is_called_out():
    scans, _ = sink_only(norm=343.0, signal=0.0)
    found = scans["base", 2].per_pair
    # what the paper's pilot published for its layer 2, here without any meaning in the words
    assert round(found["raw_bos", "cosine"].mean(), 5) == round(found["raw_bos", "mismatched"].mean(), 5) == 0.99998
    assert found["raw_bos", "sink_only"].mean() == pytest.approx(found["raw_bos", "mismatched"].mean(), abs=1e-6)
    assert scans["base", 2].of_set["raw_bos", "norm_ratio"] == pytest.approx(343, rel=1e-5)
    assert found["raw_bos", "sink_share"].mean() == pytest.approx(343 / 345, rel=1e-5)
    report = report_of(scans)
    assert report["sink_layers"]["base"] == [2]
    text = verdict(report)
    assert "the mean cosine is the sink's at layer 2." in text
    assert "true pairs have 0.99998 and mismatched ones 0.99998" in text
    assert "at no layer is it surely above zero" in text


def test_translations_behind_no_long_sink_raise_no_warning_and_are_chosen():
    scans, _ = sink_only(norm=343.0, signal=1.0)
    report = report_of({place: scan for place, scan in scans.items() if place[1] == 1})
    assert report["sink_layers"]["base"] == []
    assert "Warning" not in verdict(report)
    # the sink hides the same translations at layer 2, where the paper's rule goes
    report = report_of(scans)
    assert report["choice"]["paper"] == 2
    assert report["sink_layers"]["base"] == [2]
    assert scans["base", 2].per_pair["raw_bos", "gap"].mean() < 1e-4 < 0.4 < scans["base", 2].per_pair["word", "gap"].mean()


def test_the_layer_is_chosen_by_what_the_gap_surely_is():
    generator = np.random.default_rng(4)
    steady, lucky = generator.normal(0.1, 0.05, 200), np.where(np.arange(200) < 4, 8.0, 0.0)
    assert lucky.mean() > steady.mean()
    gaps = {0: steady + 1, 1: lucky, 2: steady, 3: steady, 4: steady - 0.05, "output": steady + 1}
    assert layer_choice.choose_layer(gaps, np.arange(200), seed=0) == 2
    assert layer_choice.choose_layer_by_cosine(gaps) == 1
    # pairs that share a word are one piece of evidence: 150 gaps of one cluster weigh less than 200 of their own
    clustered = np.where(np.arange(200) < 150, 0.2, 0.0)
    assert layer_choice.choose_layer({1: clustered, 2: steady}, np.arange(200), seed=0) == 1
    assert layer_choice.choose_layer({1: clustered, 2: steady}, np.maximum(np.arange(200), 149), seed=0) == 2


def test_strata_are_what_their_names_say(tokenizer, pairs):
    odd = [word_pairs.Pair("redio", "radio", loan=True), word_pairs.Pair("kitabu", "kitabu"), word_pairs.Pair("a", "b", loan=False)]
    listed = pairs + odd
    words = spell(tokenizer, listed)
    found = layers.strata(listed, words)
    own = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for pair in listed for word in (pair.source, pair.target)]
    # a space of its own is a token of the prefix, not the word's
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    own = [ids[1:] if ids[:1] == space and len(ids) > 1 else ids for ids in own]
    sums = np.array([len(own[2 * i]) + len(own[2 * i + 1]) for i in range(len(listed))])
    shared = np.array([bool(set(own[2 * i]) & set(own[2 * i + 1])) for i in range(len(listed))])
    np.testing.assert_array_equal(found["share a sub-token"], shared)
    np.testing.assert_array_equal(found["share none"], ~shared)
    np.testing.assert_array_equal(found["loan words"], [pair.loan is True for pair in listed])
    np.testing.assert_array_equal(found["no loan words"], [pair.loan is False for pair in listed])
    np.testing.assert_array_equal(found["4 tokens"], sums == 4)
    np.testing.assert_array_equal(found["over 5 tokens"], sums > 5)
    assert sum(found[name].astype(int) for name in found if "tokens" in name).tolist() == [1] * len(listed)


def test_a_stratums_values_are_the_means_of_its_pairs(make_model, tokenizer, pairs):
    words, false_negatives = spell(tokenizer, pairs), word_pairs.false_negative_pairs(pairs)
    scans = scanned(make_model("llama"), words, false_negatives)
    group = np.arange(len(pairs)) % 3 == 0
    found = layers.stratum_records(scans, {"every third": group, "one": np.arange(len(pairs)) == 4}, seed=0)
    assert {record["stratum"] for record in found} == {"every third"}
    for record in found:
        values = scans[record["stream"], record["layer"]].per_pair[record["vectors"], record["metric"]]
        assert record["value"] == pytest.approx(values[group].mean())
        assert record["low"] <= record["value"] <= record["high"]
        assert record["n"] == group.sum()


def test_the_command_writes_what_it_returns(settings, tmp_path):
    report = scan_command(ScanConfig(**settings))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scan.json", "scan.png"]
    assert json.loads((tmp_path / "out" / "scan.json").read_text()) == json.loads(json.dumps(report))
    assert {record["layer"] for record in report["measurements"]} == {0, 1, 2, 3, 4, "output"}
    by_key = {(r["layer"], r["vectors"], r["metric"]): r for r in report["measurements"]}
    assert by_key[2, "word", "csls_p_at_1"]["chance"] == pytest.approx(1 / 60, rel=0.05)
    for layer in range(5):
        for vectors in layers.VECTORS:
            gap, true, mismatched = (by_key[layer, vectors, name]["value"] for name in ("gap", "cosine", "mismatched"))
            assert gap == pytest.approx(true - mismatched, abs=1e-12)
        for name in ("cka", "iso_score", "random_cosine", "centred_gap", "standardised_cosine", "mexa", "auc", "p_at_5_backward"):
            assert by_key[layer, "word", name]["n"] == 60
    maps = {(r["way"], r["layer"]): r for r in report["maps"]["records"] if r["metric"] == "mrr"}
    assert maps.keys() == set(itertools.product(("plain", "procrustes", "cca"), (0, 1, 2, 3, 4, "output")))
    assert {record["n"] for record in maps.values()} == {report["maps"]["judged"]} == {60 - report["maps"]["fitted"]}
    assert "linear map finds" in report["verdict"]
    assert f"MRR of {report['maps']['judged']} pairs, maps fitted on" in printed(report)
    # the sample is the same pairs for the same seed, and others for another
    again = [scan_command(ScanConfig(**{**settings, "output": str(tmp_path / f"{n}")}, sample=20, seed=n // 2)) for n in range(3)]
    values = [[record["value"] for record in one["measurements"]] for one in again]
    assert values[0] == values[1] != values[2]


@pytest.mark.slow
def test_a_scan_of_one_side_of_the_split_is_of_these_pairs(settings, tmp_path, word_list):
    trained, held_out = word_pairs.split_pairs(word_pairs.read_pairs(word_list, "swahili", "english"), 0.2, 5)
    for split, expected_pairs in (("trained", trained), ("held_out", held_out)):
        config = ScanConfig(**{**settings, "output": str(tmp_path / split)}, split=split, held_out=0.2, seed=5)
        pairs, listed, file = _pairs(config, open_console())
        assert file == word_pairs.list_facts(word_list)
        assert list(pairs) == list(expected_pairs)
        assert listed == scan_command(config)["pairs"]["scanned"] == len(expected_pairs)


def adapter_folder(settings: dict, folder: pathlib.Path, model: str | None = None) -> pathlib.Path:
    words = np.arange(400)
    decoder = load_truncated_decoder(open_checkpoint(model or settings["model"]), 2, words, CPU)
    config = lora.LoRAConfig(rank=2, alpha=4.0, targets="q_proj,v_proj")
    lora.inject(decoder, config, seed=0)
    for adapter in lora.adapters(decoder).values():
        adapter.lora_B.data.fill_(0.3)
    lora.save(decoder, config, folder, settings["model"])
    return folder


@pytest.mark.slow
def test_with_an_adapter_its_own_model_is_scanned_and_both_are_reported(settings, tmp_path):
    folder = adapter_folder(settings, tmp_path / "adapter")
    report = scan_command(ScanConfig(pairs=settings["pairs"], output=settings["output"], adapter=str(folder)))
    assert report["model"]["name"] == settings["model"]
    assert {record["stream"] for record in report["measurements"]} == {"base", "adapter"}
    plain = scan_command(ScanConfig(**{**settings, "output": str(tmp_path / "plain")}))
    base = [record for record in report["measurements"] if record["stream"] == "base"]
    for record, again in zip(base, plain["measurements"], strict=True):
        assert record["value"] == pytest.approx(again["value"], abs=1e-5)
    assert report["choice"] == plain["choice"]
    assert "With the adapter the gap is surest at layer" in report["verdict"]


def printed(report: dict, width: int = 80) -> str:
    from rich.console import Console

    text = io.StringIO()
    show(report, Console(file=text, width=width))
    return text.getvalue()


@pytest.mark.slow
def test_the_tables_fit_80_columns_with_32_layers_and_an_adapter(settings, tmp_path):
    report = scan_command(ScanConfig(**settings, adapter=str(adapter_folder(settings, tmp_path / "adapter"))))
    records = []
    for layer in range(127):
        for record in report["measurements"]:
            if record["layer"] == 2:
                # the widest values that there can be
                wide = {"value": -0.99999, "low": -0.99999, "high": -0.99998} if "cosine" in record["metric"] else {}
                wide = {"value": 343.2} if record["metric"] == "norm_ratio" else wide
                records.append(record | wide | {"layer": layer})
    report["measurements"], report["choice"] = records, {"gap": 126, "paper": 126}
    # the adapter's layers are now all alike: the first is where its gap is surest
    report["strata"] = [record | {"layer": 1} for record in report["strata"] if record["layer"] == 2]
    lines = printed(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert sum(line.startswith("126*p ") for line in lines) == 3
    assert any(line.startswith("loan words ") for line in lines)


def test_the_figure_draws_the_records_of_base_and_adapter(settings, tmp_path):
    report = scan_command(ScanConfig(**settings, adapter=str(adapter_folder(settings, tmp_path / "adapter"))))
    figure = draw_scan(report)
    pooled, words, gaps, ranks = figure.axes
    by_key = {(r["stream"], r["layer"], r["vectors"], r["metric"]): r["value"] for r in report["measurements"]}
    places = [0, 1, 2, 3, 4, "output"]
    drawn = {(panel, line.get_label()): line for panel, name in zip(figure.axes, "abcd") for line in panel.lines}
    for panel, label, *key in (
        (pooled, "mismatched pairs", "adapter", "raw_bos", "mismatched"),
        (pooled, "share of the sink in a word", "adapter", "raw_bos", "sink_share"),
        (words, "true pairs", "adapter", "word", "cosine"),
        (gaps, "BOS left out, base", "base", "word", "gap"),
        (gaps, "BOS left out, adapter", "adapter", "word", "gap"),
        (ranks, "P@1, adapter", "adapter", "word", "p_at_1"),
    ):
        stream, vectors, metric = key
        np.testing.assert_array_equal(drawn[panel, label].get_ydata(), [by_key[stream, layer, vectors, metric] for layer in places])
    assert f"{report['pairs']['scanned']} pairs" in figure.get_supxlabel()
    assert all(panel.get_ylabel() for panel in figure.axes)
    # one look apart without colour: a line's dashes, its marker and its filling
    for panel in figure.axes:
        looks = [
            (line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "white", line.get_color())
            for line in panel.lines
            if len(line.get_ydata()) == len(places)
        ]
        assert len(set(looks)) == len(looks)


def command(flags: list[str], capsys) -> tuple[int, str]:
    """Exit code and standard error of ``python -m tli.scan``, in this process."""
    with pytest.raises(SystemExit) as left:
        run_command(lambda: (scan_command(parse(ScanConfig, "tli.scan", flags)), sys.exit(0)))
    return left.value.code, capsys.readouterr().err


def as_flags(settings: dict) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sample": 1}, "--sample: a sample must have from 2 to 60 pairs"),
        ({"sample": 61}, "--sample: a sample must have from 2 to 60 pairs"),
        ({"seed": -1}, "--seed: the number must be at least 0"),
        ({"split": "held_out", "held_out": 1.5}, "--held-out: the number must be above 0 and below 1, got 1.5"),
        ({"model": "/nowhere"}, "--model: the model must be a folder or a hub name"),
        ({"adapter": "/nowhere"}, "an adapter's folder must hold adapter_config.json"),
        ({"pairs": "/nowhere.tsv"}, "/nowhere.tsv: the path must be that of a readable file"),
        ({"device": "cuda:77"}, "--device: the device must be on this machine"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(settings, tmp_path, capsys, more, message):
    code, shown = command(as_flags({**settings, **more}), capsys)
    assert code == 2
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def assert_refused(settings: dict, output: pathlib.Path, capsys, message: str) -> None:
    capsys.readouterr()
    code, shown = command(as_flags(settings), capsys)
    assert code == 2
    assert message in shown
    # which ops were chosen may stand before it
    assert shown.count("error: ") == 1
    assert shown.splitlines()[-1].startswith("error: ")
    assert not output.exists() or not list(output.iterdir())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 64}, "the adapter must fit the model: A 2x64 and B"),
        ({"blocks": 1}, "every key must be a linear layer's of the model, llama with 1 blocks"),
    ],
    ids=str,
)
def test_an_adapter_of_another_model_is_refused(settings, make_model, tmp_path, capsys, other, message):
    folder = adapter_folder(settings, tmp_path / "adapter")
    flags = {**settings, "model": str(make_model("llama", **other)), "adapter": str(folder)}
    assert_refused(flags, tmp_path / "out", capsys, f"{folder / lora.ADAPTER_FILE}: {message}")


def test_an_adapter_that_was_trained_on_another_family_is_refused(settings, make_model, tmp_path, capsys):
    folder = adapter_folder(settings, tmp_path / "adapter")
    facts = {
        "config": {"layer": 2, "model": settings["model"]},
        "model": {"name": "a model", "family": "llama", "sha256": "0"},
        "pairs": {"sha256": "0"},
        "adapter": {"sha256": sha256(folder / lora.ADAPTER_FILE)},
    }
    (folder / "report.json").write_text(json.dumps(facts))
    for model, message in (
        (make_model("mistral"), "the family that the adapter was trained on, llama, got mistral"),
        (settings["model"], "the model must be the one that the adapter was trained on, a model, got other weights"),
    ):
        assert_refused({**settings, "model": str(model), "adapter": str(folder)}, tmp_path / "out", capsys, message)


@pytest.mark.parametrize("how", UNREADABLE)
def test_a_model_whose_layers_cannot_be_streamed_is_refused(settings, make_model, tmp_path, capsys, how):
    flags = {**settings, "model": str(unreadable(make_model, tmp_path / "model", how)), "token_norm": "rms"}
    assert_refused(flags, tmp_path / "out", capsys, UNREADABLE[how])


def test_an_output_folder_is_not_lost(settings, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, shown = command(as_flags(settings), capsys)
    assert code == 2
    assert "--output: the output folder must be new or empty" in shown
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert command([*as_flags(settings), "--overwrite"], capsys)[0] == 0


def test_absent_shards_end_the_scan_early_and_it_says_so(settings, make_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    source = make_model("llama", shards=True)
    shard_of = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    dropped = {file for name, file in shard_of.items() if "layers.3." in name}
    for path in source.iterdir():
        if path.name not in dropped:
            (folder / path.name).symlink_to(path)
    report = scan_command(ScanConfig(**{**settings, "model": str(folder)}))
    measured = {record["layer"] for record in report["measurements"]}
    assert "output" not in measured
    assert {0, 1, 2} <= measured
    assert "is absent" in report["missing_output"]
    assert f"The scan ends early: {report['missing_output']}" in " ".join(printed(report, width=300).split())


@pytest.mark.slow
def test_the_process_prints_one_object_and_ends_with_2_on_an_error(settings):
    flags = [sys.executable, "-m", "tli.scan", *as_flags(settings), "--json"]
    done = subprocess.run(flags, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choice"].keys() == {"gap", "paper"}
    assert " ".join(done.stderr.split()).endswith(f"in {settings['output']}: scan.json, scan.png")
    again = subprocess.run([*flags, "--sample", "0"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stdout == ""
    assert "Traceback" not in again.stderr


@pytest.mark.slow
def test_the_starters_two_rules_differ_because_of_its_sink(starter, tmp_path):
    report = scan_command(ScanConfig(model=str(starter), sample=60, output=str(tmp_path / "out")))
    by_key = {(r["layer"], r["vectors"], r["metric"]): r["value"] for r in report["measurements"]}
    layer = report["choice"]["paper"]
    assert by_key[layer, "raw_bos", "cosine"] > 0.9999 < by_key[layer, "raw_bos", "mismatched"]
    assert by_key[layer, "word", "mismatched"] < 0.8
    assert layer in report["sink_layers"]["base"]
    assert report["choice"]["gap"] != layer
    assert "The two rules differ" in report["verdict"]


def test_the_recipe_fills_in_what_was_not_given(settings):
    paper = ScanConfig(**settings, recipe="paper", dtype="float32")
    assert (paper.weights, paper.prefix, paper.token_norm, paper.dtype) == ("nf4", "", "none", "float32")
    assert ScanConfig(model="some/where", adapter="a/b/").output == "runs/scan-b"
    assert {field.name for field in dataclasses.fields(paper)} >= {"adapter", "split", "sample"}
    with pytest.raises(TliError, match="--split"):
        ScanConfig(split="both")
