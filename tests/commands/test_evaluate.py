"""The command on small models: its numbers against the training's own report and against a plain recomputation, and bad input."""

import io
import json
import math
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.small_adapters import UNREADABLE, save_adapter, unreadable
from tli import train
from tli.commands.evaluate import evaluate
from tli.config import EvaluateConfig, TrainConfig
from tli.data import word_pairs
from tli.data.packing import TokenisedWords
from tli.model import hidden_states, lora
from tli.reports import evaluation
from tli.reports.tables import show
from tli.runtime.cli import parse
from tli.runtime.errors import TliError, run_command
from tli.runtime.files import sha256

ROOT = pathlib.Path(__file__).parent.parent.parent
FILES = {"evaluation.json", "evaluation.md"}
# NF4 rounds blocks of 64
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_model, word_list) -> pathlib.Path:
    """A run of twenty steps with its report."""
    output = tmp_path_factory.mktemp("run") / "adapter"
    settings = {"model": str(make_model("llama", **SIZES)), "pairs": str(word_list), "layer": 2, "rank": 4, "batch": 14, "epochs": 5}
    settings["warmup"] = 2
    train(TrainConfig(**settings, held_out=0.2, output=str(output), seed=3))
    return output


@pytest.fixture
def adapter(trained, tmp_path) -> pathlib.Path:
    """A copy of it to spoil."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "adapter"))


def run(*adapters, **options) -> dict:
    return evaluate(EvaluateConfig(adapters=tuple(map(str, adapters)), **options))


def value(facts: dict, split: str, when: str, layer, metric: str) -> dict:
    keys = ("split", "when", "layer", "metric")
    (record,) = [r for r in facts["measurements"] if tuple(r[key] for key in keys) == (split, when, layer, metric)]
    return record


def found_tests(facts: dict, kind: str, **keys) -> list[dict]:
    return [test for test in facts["tests"] if test["test"] == kind and all(test[key] == wanted for key, wanted in keys.items())]


@pytest.fixture(scope="module")
def facts(trained, tmp_path_factory) -> dict:
    """All layers of the run, evaluated as it was trained."""
    return run(trained, layers="all", output=str(tmp_path_factory.mktemp("out") / "evaluation"))


@pytest.mark.slow
def test_what_the_training_measured_is_measured_again(trained, facts):
    report = json.loads((trained / "report.json").read_text())
    assert facts["layers"] == [0, 1, 2, 3, 4, "output"]
    for record in report["measurements"]:
        again = value(facts, record["split"], record["when"], record["layer"], record["metric"])
        assert again["value"] == pytest.approx(record["value"], abs=1e-5)
        assert (again["n"], again["chance"]) == (record["n"], record["chance"])
    for test in report["tests"]:
        kind = "paired" if test["test"] == "paired" else "welch"
        (again,) = found_tests(facts, kind, split=test["split"], layer=test["layer"], metric=test["metric"])
        for key in ("mean_gain", "difference", "t", "p_t"):
            if test.get(key) is not None:
                assert again[key] == pytest.approx(test[key], abs=1e-4, rel=1e-3)
    assert facts["differences"] == []
    assert facts["pairs"]["split_is_recorded"]
    assert (facts["pairs"]["trained"], facts["pairs"]["held_out"]) == (report["pairs"]["trained"], report["pairs"]["held_out"])


def test_scores_are_those_of_pefts_whole_model(trained, facts, word_list, make_model, tokenizer):
    """CLIPScore and RefCLIPScore, with their mismatched values, from transformers' hidden states, one word at a time."""
    pairs = word_pairs.split_pairs(word_pairs.read_pairs(str(word_list), "swahili", "english"), 0.2, 3)[1]
    folder = make_model("llama", **SIZES)
    same = {tuple(edge) for edge in word_pairs.false_negative_pairs(pairs).tolist()}
    for when in ("before", "after"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if when == "after":
            model = PeftModel.from_pretrained(model, trained)
        norm = model.get_base_model().model.norm if when == "after" else model.model.norm

        def vector(word, layer, model=model, norm=norm):
            ids = [0, *tokenizer(" " + word, add_special_tokens=False)["input_ids"]]
            spans = tokenizer(" " + word, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            own = [1 + i for i, (_, end) in enumerate(spans) if end > 1]
            with torch.no_grad():
                states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
                # the last hidden state of transformers is normalised already
                tokens = states if layer == -1 else norm(states)
            mean = tokens[own].double().mean(0)
            return (mean / mean.norm()).numpy()

        for layer, index in ((2, 2), ("output", -1)):
            source, target = (np.stack([vector(getattr(pair, side), index) for pair in pairs]) for side in ("source", "target"))
            clip = 2.5 * np.maximum(source @ target.T, 0)
            apart = np.array([[i != j and (i, j) not in same for j in range(len(pairs))] for i in range(len(pairs))])
            mismatched = [(clip[i][apart[i]].mean() + clip[:, i][apart[:, i]].mean()) / 2 for i in range(len(pairs))]
            expected = {"clipscore": np.diag(clip).mean(), "clipscore_mismatched": np.mean(mismatched)}
            scores, others = [], []
            for i, pair in enumerate(pairs):
                if pair.synonyms:
                    near = np.maximum(0, np.max([target @ vector(gloss, index) for gloss in pair.synonyms], axis=0))
                    together = 2 * clip[i] * near / np.maximum(clip[i] + near, 1e-30)
                    scores.append(together[i])
                    others.append(together[apart[i]].mean())
            expected |= {"ref_clipscore": np.mean(scores), "ref_clipscore_mismatched": np.mean(others)}
            for metric, truth in expected.items():
                assert value(facts, "held_out", when, layer, metric)["value"] == pytest.approx(truth, abs=2e-5)
            assert value(facts, "held_out", when, layer, "ref_clipscore")["n"] == len(scores)


def test_no_mean_score_stands_without_its_controls(facts):
    means = {"cosine": ("mismatched", "gap"), "clipscore": ("clipscore_mismatched", "clipscore_gap"),
             "ref_clipscore": ("ref_clipscore_mismatched", "ref_clipscore_gap")}  # fmt: skip
    for record in facts["measurements"]:
        if record["metric"] in means:
            key = record["split"], record["when"], record["layer"]
            mismatched, gap = (value(facts, *key, metric)["value"] for metric in means[record["metric"]])
            assert gap == pytest.approx(record["value"] - mismatched)
            candidates = record["n"] if record["metric"] != "ref_clipscore" else value(facts, *key, "cosine")["n"]
            # words that mean the same are no candidates, so there are never more than pairs
            assert 1 > value(facts, *key, "mrr")["chance"] > value(facts, *key, "p_at_1")["chance"] >= 1 / candidates


def test_holm_runs_over_the_layers(facts):
    for split in ("trained", "held_out"):
        for metric in ("gap", "mrr", "clipscore_gap"):
            family = found_tests(facts, "paired", split=split, metric=metric)
            assert [test["layer"] for test in family] == facts["layers"]
            for p in ("p_t", "p_wilcoxon", "p_sign_flip"):
                ordered = sorted((test for test in family if test[p] is not None), key=lambda test: test[p])
                largest = 0
                for rank, test in enumerate(ordered):
                    largest = max(largest, min(1, test[p] * (len(ordered) - rank)))
                    assert test[f"{p}_holm"] == pytest.approx(largest)
    welch = found_tests(facts, "welch", metric="gap")
    assert len(welch) == 6
    smallest = min(welch, key=lambda test: test["equivalence"]["p"] if test["equivalence"]["p"] is not None else 2)["equivalence"]
    assert smallest["p_holm"] >= smallest["p"]
    # nothing is adapted below the embeddings' layer, so nothing changes and nothing is significant there
    (still,) = found_tests(facts, "paired", split="trained", metric="gap", layer=0)
    assert (still["mean_gain"], still["p_t"], still["p_sign_flip"]) == (0, 1, 1)


def test_a_margin_that_is_given_is_the_margin(trained, tmp_path):
    facts = run(trained, layers="2", margin=0.2, output=str(tmp_path / "out"))
    (test,) = found_tests(facts, "welch", metric="gap")
    assert test["equivalence"]["margin"] == 0.2
    low, high = test["equivalence"]["low"], test["equivalence"]["high"]
    assert (test["equivalence"]["p"] < 0.05) == (low > -0.2 and high < 0.2)


@pytest.mark.slow
def test_layers_are_chosen_and_blocks_above_them_are_not_read(trained, tmp_path, monkeypatch):
    read, load_block = [], hidden_states.load_block

    def counted(checkpoint, block, index, device_config):
        read.append(index)
        load_block(checkpoint, block, index, device_config)

    monkeypatch.setattr(hidden_states, "load_block", counted)
    facts = run(trained, layers=" 2, 1,2 ", output=str(tmp_path / "out"))
    assert facts["layers"] == [1, 2]
    assert {record["layer"] for record in facts["measurements"]} == {1, 2}
    assert read == [0, 1]
    usual = run(trained, output=str(tmp_path / "usual"))
    assert usual["layers"] == [2, "output"]


@pytest.mark.slow
def test_results_do_not_depend_on_batch_bin_width_padding_side_or_word_order(trained, facts, tmp_path, monkeypatch, word_list, make_model):
    monkeypatch.setattr("tli.model.hidden_states._CHUNK_NODES", 64)
    pack = TokenisedWords.pack
    monkeypatch.setattr(TokenisedWords, "pack", lambda words, numbers, pool_bos=False: pack(words, numbers, pool_bos, width=12))
    narrow = run(trained, layers="2,output", output=str(tmp_path / "narrow"))
    monkeypatch.undo()
    # one list as it is and turned around, by an adapter of which nothing is recorded
    header, *rows = word_list.read_text(encoding="utf-8").splitlines()
    turned = tmp_path / "turned.tsv"
    turned.write_text("\n".join([header, *reversed(rows)]) + "\n", encoding="utf-8")
    plain = save_adapter(make_model("llama", **SIZES), tmp_path / "plain")
    left = shutil.copytree(make_model("llama", **SIZES), tmp_path / "left")
    AutoTokenizer.from_pretrained(left, padding_side="left", pad_token="</s>").save_pretrained(left)
    assert AutoTokenizer.from_pretrained(left).padding_side == "left"
    straight = run(plain, pairs=str(word_list), layers="2,output", output=str(tmp_path / "straight"))
    around = run(plain, pairs=str(turned), model=str(left), layers="2,output", output=str(tmp_path / "around"))
    usual = {**facts, "measurements": [r for r in facts["measurements"] if r["layer"] in (2, "output")]}
    for one, other in ((usual, narrow), (straight, around)):
        assert len(one["measurements"]) == len(other["measurements"])
        for a, b in zip(one["measurements"], other["measurements"]):
            assert [a[key] for key in ("split", "when", "layer", "metric", "n")] == [
                b[key] for key in ("split", "when", "layer", "metric", "n")
            ]
            np.testing.assert_allclose(
                [a[key] for key in ("value", "low", "high")], [b[key] for key in ("value", "low", "high")], atol=2e-5
            )
    for a, b in zip(straight["tests"], around["tests"]):
        assert a["mean_gain"] == pytest.approx(b["mean_gain"], abs=1e-5)
        assert a["p_sign_flip"] == pytest.approx(b["p_sign_flip"], abs=1e-3)


def test_an_adapter_without_a_report_is_measured_on_one_list_or_on_a_split_that_is_named(
    trained, adapter, facts, tmp_path, word_list, capsys
):
    (adapter / "report.json").unlink()
    whole = run(adapter, pairs=str(word_list), layers="2", output=str(tmp_path / "whole"))
    assert {record["split"] for record in whole["measurements"]} == {"all"}
    assert found_tests(whole, "welch") == []
    assert "no report.json" in capsys.readouterr().err
    named = run(adapter, pairs=str(word_list), held_out=0.2, seed=3, layers="2", output=str(tmp_path / "named"))
    for metric in ("gap", "mrr", "clipscore"):
        key = "held_out", "after", 2, metric
        assert value(named, *key)["value"] == pytest.approx(value(facts, *key)["value"], abs=1e-6)
    assert not named["pairs"]["split_is_recorded"]


def test_another_list_may_be_held_out_unless_it_shares_a_word(trained, tmp_path):
    rows = word_pairs.SHIPPED.read_text(encoding="utf-8").splitlines()
    for name, lines in (("other", rows[200:240]), ("shared", rows[10:40])):
        (tmp_path / f"{name}.tsv").write_text("\n".join([rows[0], *lines]) + "\n", encoding="utf-8")
    trained_pairs = json.loads((trained / "report.json").read_text())["pairs"]["trained"]
    other = run(trained, held_out_pairs=str(tmp_path / "other.tsv"), layers="2", output=str(tmp_path / "out"))
    assert (other["pairs"]["trained"], other["pairs"]["held_out"]) == (trained_pairs, 40)
    with pytest.raises(TliError, match="no word may stand on both sides"):
        run(trained, held_out_pairs=str(tmp_path / "shared.tsv"), layers="2", output=str(tmp_path / "out2"))
    # a list that is not the recorded one is measured whole: nobody knows what of it was trained
    foreign = run(trained, pairs=str(tmp_path / "other.tsv"), layers="2", output=str(tmp_path / "out3"))
    assert {record["split"] for record in foreign["measurements"]} == {"all"}


@pytest.mark.slow
def test_a_difference_from_training_is_said_and_recorded(trained, facts, tmp_path, capsys):
    other = run(trained, layers="2", weights="nf4", token_norm="none", sink="in", prefix="", output=str(tmp_path / "out"))
    told = {difference["setting"]: (difference["here"], difference["training"]) for difference in other["differences"]}
    assert told == {"weights": ("nf4", "full"), "token_norm": ("none", "final"), "pool_bos": (True, False), "prefix": ("", " ")}
    printed = " ".join(capsys.readouterr().err.split())
    assert "differs from its training in weights: nf4 here, full there" in printed
    assert other["settings"]["weights"] == "nf4"
    assert value(other, "trained", "before", 2, "gap")["value"] != value(facts, "trained", "before", 2, "gap")["value"]


@pytest.mark.slow
def test_rounding_and_pooling_are_those_of_the_run(make_model, word_list, tmp_path):
    settings = {"model": str(make_model("llama", **SIZES)), "pairs": str(word_list), "layer": 2, "rank": 2, "batch": 20, "epochs": 1}
    settings["weights"] = "nf4"
    report = train(TrainConfig(**settings, eval_pool_bos=True, token_norm="none", output=str(tmp_path / "run")))
    facts = run(tmp_path / "run", layers="2")
    assert [facts["settings"][name] for name in ("weights", "pool_bos", "token_norm")] == ["nf4", True, "none"]
    # the run's own report pools the sink, its training did not: measured as in the report, and said
    assert [(difference["setting"], difference["here"]) for difference in facts["differences"]] == [("pool_bos", True)]
    for record in report["measurements"]:
        if record["layer"] == 2:
            again = value(facts, record["split"], record["when"], 2, record["metric"])
            assert again["value"] == pytest.approx(record["value"], abs=1e-5)


@pytest.mark.slow
def test_several_adapters_share_one_base(trained, facts, tmp_path, make_model):
    plain = save_adapter(make_model("llama", **SIZES), tmp_path / "plain", seed=5)
    report = json.loads((trained / "report.json").read_text())
    report["adapter"]["sha256"], report["config"]["map"] = sha256(plain / lora.ADAPTER_FILE), "none"
    (plain / "report.json").write_text(json.dumps(report))
    both = run(trained, plain, layers="2", output=str(tmp_path / "out"))
    assert [adapter["name"] for adapter in both["adapters"]] == ["adapter", "plain"]
    after = [r for r in both["measurements"] if r["when"] == "after" and r["metric"] == "gap" and r["split"] == "held_out"]
    assert [r["adapter"] for r in after] == ["adapter", "plain"]
    assert after[0]["value"] == pytest.approx(value(facts, "held_out", "after", 2, "gap")["value"], abs=1e-6)
    assert after[0]["value"] != after[1]["value"]
    assert value(both, "held_out", "before", 2, "gap")["adapter"] is None
    for name in ("adapter", "plain"):
        assert len(found_tests(both, "welch", adapter=name)) == 2
    with pytest.raises(TliError, match="several adapters need a folder"):
        run(trained, plain)
    report["config"]["prefix"] = "the word "
    (plain / "report.json").write_text(json.dumps(report))
    with pytest.raises(TliError, match='must have been trained with the same --prefix, got " ", "the word "'):
        run(trained, plain, output=str(tmp_path / "out2"))
    with pytest.raises(TliError, match="different names"):
        run(trained, trained, output=str(tmp_path / "out2"))


def test_text_is_read_beside_the_words(trained, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Watoto wanasoma vitabu. The children read books.\n" * 8, encoding="utf-8")
    facts = run(trained, layers="2", text=str(text), window=16, text_tokens=90, output=str(tmp_path / "out"))
    (harm,) = facts["harm"]
    assert (harm["text"]["tokens"], harm["text"]["windows"], harm["text"]["width"]) == (90, 6, 16)
    model = AutoModelForCausalLM.from_pretrained(facts["config"]["model"] or facts["model"]["name"], dtype=torch.float32).eval()
    tokens = _windows(text, trained, 16, 90)
    for found in (harm["before"]["perplexity"], harm["after"][0]["perplexity"]):
        stream = model if found is harm["before"]["perplexity"] else PeftModel.from_pretrained(model, trained)
        with torch.no_grad():
            losses = [stream(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None]) for ids in tokens]
        assert found["value"] == pytest.approx(math.exp(-torch.cat(losses).mean()), rel=1e-4)
    assert "perplexity" in capsys.readouterr().err


def _windows(text, trained, width, most):
    model = json.loads((trained / "report.json").read_text())["config"]["model"]
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), add_special_tokens=False)["input_ids"][:most]
    return [torch.tensor([0, *ids[start : start + width - 1]]) for start in range(0, len(ids), width - 1)]


@pytest.mark.slow
def test_files_are_complete_and_never_overwritten_silently(adapter, capsys):
    facts = run(adapter, layers="2,output")
    folder = adapter / "evaluation"
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(facts))
    markdown = (folder / "evaluation.md").read_text()
    for said in ("CLIP-S", "RefCLIP-S", "mismatched", "Welch p", "sha256"):
        assert said in markdown
    printed = capsys.readouterr().err
    assert printed.rstrip().endswith("evaluation.json, evaluation.md")
    for said in ("held-out pairs", "mismatched", "P@1", "MRR", "chance", "sign flip", "TOST"):
        assert said in printed
    before = (folder / "evaluation.json").read_bytes()
    with pytest.raises(TliError, match="new or empty"):
        run(adapter, layers="2")
    assert (folder / "evaluation.json").read_bytes() == before
    again = run(adapter, layers="2,output", overwrite=True)
    assert again["measurements"] == facts["measurements"]
    assert again["tests"] == facts["tests"]


def test_the_tables_fit_their_width_and_say_what_the_json_says(facts):
    wide = {"value": 12345.678, "low": 10000.0, "high": 99999.0}
    of_text = dict.fromkeys(("perplexity", "perplexity_ratio", "kl", "total_variation"), wide)
    text = {"name": "some-longer-name-of-a-text.txt", "tokens": 8192, "tokens_in_file": 999_999, "windows": 33, "width": 256}
    facts = {**facts, "harm": [{"text": text, "before": {"perplexity": wide}, "after": [of_text]}]}
    # names of runs are long
    named = json.dumps(facts).replace(': "adapter"', ': "default-full-hook-layer12-rank128-seed10-shuffled"')
    facts = json.loads(named)
    few = {**facts, "layers": [2, "output"], "tests": [test for test in facts["tests"] if test["layer"] in (2, "output")]}
    for shown, width in ((few, 80), (facts, 80), (few, 120)):
        out = io.StringIO()
        show(evaluation.tables_of_adapters(shown), Console(file=out, width=width))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        # rich cuts what does not fit
        assert "…" not in out.getvalue()
        cells = " ".join(out.getvalue().split())
        for layer in shown["layers"]:
            for split in ("trained", "held_out"):
                before, after = (f"{round(value(facts, split, when, layer, 'gap')['value'], 3) + 0.0:.3f}" for when in ("before", "after"))
                assert f"{before}→{after}" in cells


def spoil(folder: pathlib.Path, change) -> None:
    """Rewrite an adapter's tensors, and take away what speaks of the old ones."""
    tensors = load_file(folder / lora.ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / lora.ADAPTER_FILE, metadata={"format": "pt"})
    (folder / "report.json").unlink()
    (folder / "map.safetensors").unlink()


def test_adapters_that_do_not_fit_are_refused(adapter, make_model, tmp_path, word_list):
    def refused(match, folder=adapter, **options):
        with pytest.raises(TliError, match=match) as error:
            run(folder, **{"pairs": str(word_list), "output": str(tmp_path / "out"), **options})
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    # another model of the same make, another family, another width
    refused(
        "^--model: the model must be the one that the adapter was trained on, .*, got other weights",
        model=str(make_model("llama", seed=1, **SIZES)),
    )
    refused(
        "^--model: the model must be of the family that the adapter was trained on, llama, got mistral",
        model=str(make_model("mistral", **SIZES)),
    )
    (adapter / "report.json").unlink()
    refused(
        r"the adapter must fit the model: A 4x\d+ and B \d+x4 in layers.0",
        model=str(make_model("llama", hidden_size=128, intermediate_size=128)),
    )
    refused(
        "every key must be a linear layer's of the model, llama with 1 blocks, got layers.1.",
        model=str(make_model("llama", blocks=1, **SIZES)),
    )
    with pytest.raises(TliError, match="an adapter's folder must hold adapter_config.json"):
        run(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"), "must have lora_A and lora_B"),
        (
            lambda t: [t.pop(f"base_model.model.model.layers.0.self_attn.q_proj.lora_{f}.weight") for f in "AB"],
            "the file must hold factors for just what adapter_config.json names, got no factors for layers.0.self_attn.q_proj",
        ),
        (
            lambda t: t.update({f"base_model.model.model.layers.0.self_attn.x_proj.lora_{f}.weight": torch.zeros(4, 4) for f in "AB"}),
            "every key must be a linear layer's of the model, .* got layers.0.self_attn.x_proj",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 4)}),
            "every key must name a linear layer of a block",
        ),
        (lambda t: t.clear(), "the adapter must hold factors"),
        (
            lambda t: t.update({key: tensor[:2] if "lora_A" in key else tensor[:, :2].contiguous() for key, tensor in t.items()}),
            r"the adapter must fit the model: A 4x\d+ and B \d+x4 in .*, got A 2x\d+, B \d+x2",
        ),
    ],
    ids=["half", "missing", "extra", "head", "none", "rank"],
)
def test_adapters_with_missing_or_extra_keys_are_refused(adapter, change, message, word_list):
    spoil(adapter, change)
    with pytest.raises(TliError, match=message):
        run(adapter, pairs=str(word_list))
    assert not (adapter / "evaluation").exists()


@pytest.mark.parametrize("narrower", [{"target_modules": ["k_proj", "v_proj"]}, {"layers_to_transform": [1]}], ids=["targets", "blocks"])
def test_factors_that_peft_would_leave_out_are_refused(adapter, narrower, word_list):
    spoil(adapter, lambda tensors: None)
    file = adapter / lora.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | narrower))
    with pytest.raises(TliError, match="factors for just what adapter_config.json names, got factors for layers.0.self_attn.q_proj"):
        run(adapter, pairs=str(word_list))


def test_reports_that_speak_of_something_else_are_refused(adapter, word_list, tmp_path):
    report = json.loads((adapter / "report.json").read_text())
    (adapter / "report.json").write_text(json.dumps({**report, "adapter": {"sha256": "0"}}))
    with pytest.raises(TliError, match="the report must speak of the adapter beside it"):
        run(adapter)
    (adapter / "report.json").write_text("{}")
    with pytest.raises(TliError, match="the file must be a report of tli.train, got KeyError"):
        run(adapter)
    moved = {**report, "pairs": {**report["pairs"], "sha256": "0"}}
    (adapter / "report.json").write_text(json.dumps(moved))
    with pytest.raises(TliError, match="the list must be the one that the adapter was trained on"):
        run(adapter)
    (adapter / "report.json").write_text(json.dumps(report))
    with pytest.raises(TliError, match="^--held-out: the split that the run recorded must stand"):
        run(adapter, held_out=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "2,x"}, "^--layers: the layers must be from 0 to 4, or output, .*, got 'x'"),
        ({"layers": "5"}, "^--layers: .*, got '5'"),
        ({"layers": ""}, "^--layers: "),
        ({"layers": "-1"}, "^--layers: "),
        ({"seed": -1, "layers": "2"}, "^--seed: the number must be at least 0.*got -1"),
        ({"margin": -1.0, "layers": "2"}, "^--margin: the number must be above 0"),
        ({"text": "no-such-file.txt"}, "readable UTF-8 file"),
        ({"weights": "int8"}, "^--weights: the value must be one of full, nf4"),
        ({"model": "./nowhere"}, "^--model: the model must be a folder"),
    ],
)
def test_options_that_cannot_be_are_refused(trained, tmp_path, options, message):
    with pytest.raises(TliError, match=message):
        run(trained, output=str(tmp_path / "out"), **options)


def test_missing_shards_end_the_default_layers_and_refuse_those_asked_for(make_model, tmp_path, word_list, capsys):
    folder = make_model("llama", shards=True, blocks=6)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    absent = {file for name, file in index.items() if ".layers.5." in name} - {
        file for name, file in index.items() if ".layers.5." not in name and name != "norm"
    }
    assert absent
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        if path.name not in absent:
            (copy / path.name).symlink_to(path)
    adapter = save_adapter(folder, tmp_path / "adapter")
    facts = run(adapter, model=str(copy), pairs=str(word_list), token_norm="rms", output=str(tmp_path / "out"))
    assert facts["layers"] == [2, 3]
    assert "is absent" in facts["missing"]
    assert "layers are missing" in capsys.readouterr().err
    with pytest.raises(TliError, match="^--layers: the blocks must be there, got .* is absent"):
        run(adapter, model=str(copy), pairs=str(word_list), token_norm="rms", layers="2,output", output=str(tmp_path / "out2"))
    assert not list((tmp_path / "out2").iterdir())


@pytest.mark.parametrize("how", UNREADABLE)
def test_a_model_whose_layers_cannot_be_streamed_is_refused(make_model, tmp_path, word_list, how):
    adapter = save_adapter(make_model("llama", shards=True), tmp_path / "adapter")
    model = unreadable(make_model, tmp_path / "model", how)
    with pytest.raises(TliError, match=UNREADABLE[how]) as error:
        run(adapter, model=str(model), pairs=str(word_list), token_norm="rms", layers="2", output=str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_adapters_stand_without_a_flag_and_help_needs_no_torch():
    config = parse(EvaluateConfig, "tli.evaluate", ["one", "--layers", "2,output", "--json"])
    assert (config.adapters, config.layers, config.json) == (("one",), "2,output", True)
    assert parse(EvaluateConfig, "tli.evaluate", ["one", "two/three"]).adapters == ("one", "two/three")
    code = "import sys; sys.argv = ['x', '--help']\nimport runpy\ntry: runpy.run_module('tli.evaluate', run_name='__main__')\n" \
        "except SystemExit: assert not {'torch', 'scipy', 'numpy'} & sys.modules.keys()"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "[ADAPTER ...]" in done.stdout


@pytest.mark.slow
def test_the_command_prints_json_and_ends_with_2_on_bad_input(trained, tmp_path, capsys):
    flags = [str(trained), "--layers", "2", "--output", str(tmp_path / "out"), "--json"]
    done = subprocess.run([sys.executable, "-m", "tli.evaluate", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == [2]
    config = EvaluateConfig(adapters=(str(trained),), output=str(tmp_path / "out"))
    with pytest.raises(SystemExit) as left:
        run_command(lambda: evaluate(config))
    assert left.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_t_d_z_and_p_agree_with_one_another(facts):
    """What holds between the numbers that are written: t = d_z·sqrt(n), and p from t."""
    for test in found_tests(facts, "paired"):
        if test["t"]:
            assert test["t"] == pytest.approx(test["d_z"] * math.sqrt(test["n"]))
            assert test["p_t"] == pytest.approx(2 * scipy.stats.t.sf(abs(test["t"]), test["n"] - 1))


def test_the_saved_map_and_harm_stand_in_every_evaluation(trained, tmp_path):
    facts = run(trained, output=str(tmp_path / "out"))
    assert [one["text"]["name"] for one in facts["harm"]] == ["running-text-swahili.txt", "running-text-english.txt"]
    ways = {(r["way"], r["stream"]) for r in facts["baselines"]["records"] if r["layer"] == 2}
    assert {("map", trained.name), ("plain", trained.name), ("cca", "before")} <= ways
    report = json.loads((trained / "report.json").read_text())
    for stream, record in (("after", report), (trained.name, facts)):
        found = [r for r in record["baselines"]["records"] if (r["way"], r["stream"], r["layer"]) == ("map", stream, 2)]
        assert found
        record["of_map"] = {(r["candidates"], r["group"], r["metric"]): r["value"] for r in found}
    assert facts["of_map"] == pytest.approx(report["of_map"])
