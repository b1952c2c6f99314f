"""The report on made-up runs whose truth is known: what each verdict says, that tables, files and records agree, and no NaN."""

import io
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from tli.config import TrainConfig
from tli.metrics.alignment import measure
from tli.metrics.measures import SPLITS, names
from tli.reports.figures.training import draw_distributions, draw_layers
from tli.reports.model_card import model_card
from tli.reports.training import assemble, markdown, show, write_report
from tli.reports.verdict import verdict
from tli.runtime.cli import as_dict

NONE_ALIKE = np.zeros((0, 2), np.int64)
COUNTS = {"trained": 150, "held_out": 60}


def words(split: str, signal: float, common: float, stretch: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of true pairs that share ``signal`` of their meaning, and with all other words ``common`` of one direction."""
    generator = torch.Generator().manual_seed(len(split))
    meaning, first, second = torch.randn(3, COUNTS[split], 48, generator=generator)
    return tuple(stretch * (signal * meaning + own) + common for own in (first, second))


def run_of(trained, held_out, output=None, sink=None, loss_last=2.0, chance_loss=5.5, **config) -> tuple[dict, dict]:
    """Facts and alignments of a run; each split is ((signal, common) before, (signal, common) after); None leaves it out."""
    alignments = {}
    for layer, arms in ((2, {"trained": trained, "held_out": held_out}), ("output", output or {})):
        for split, arm in arms.items():
            for when, state in zip(("before", "after"), arm or ()):
                share = None if sink is None else np.full(COUNTS[split], sink)
                alignments[split, when, layer] = measure(*words(split, *state), NONE_ALIKE, share)
    # the trainer writes down what ``auto`` came to
    config = TrainConfig(**{"token_norm": "final", "layer": 2, **config})
    facts = {
        "config": as_dict(config),
        "model": {"name": "someone/small-model", "family": "llama", "blocks": 6, "width": 48, "sha256": None},
        "pairs": {
            "name": "a list",
            "sha256": "ab",
            "trained": COUNTS["trained"],
            "held_out": COUNTS["held_out"] if held_out else 0,
            "split": "families",
            "with_relative": 0,
        },
        "adapter": {"sha256": "cd", "parameters": 1234, "bytes": 5678},
        "training": {
            "steps": 10, "seconds": 1.5, "words_per_second": 900.0, "loss_first": 5.5, "loss_last": loss_last, "chance_loss": chance_loss,
        },
        "versions": {"torch": "2"},
        "machine": {"cores": 2},
        "missing_output": None if output else "shard 2 of 2 is absent",
        "shuffled": config.shuffle_pairs,
    }  # fmt: skip
    return facts, alignments


WEAK, STRONG = (0.1, 0.5), (1.2, 0.5)
# without any meaning in common, before and after all words moved in one direction
STRANGE, SHIFTED = (0.0, 0.5), (0.0, 2.5)


def printed(report: dict, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(report, console)
    return console.file.getvalue()


def test_a_real_effect_is_called_one():
    text = assemble(*run_of((WEAK, STRONG), (WEAK, STRONG)))["verdict"]
    assert "the alignment reaches words that training never saw" in text
    assert "Held-out retrieval is above chance" in text
    assert "shift" not in text
    assert "by heart" not in text


def test_a_rise_of_all_cosines_is_called_a_shift():
    report = assemble(*run_of((STRANGE, SHIFTED), (STRANGE, SHIFTED)))
    cosine = next(t for t in report["tests"] if (t["split"], t["metric"]) == ("held_out", "cosine"))
    assert cosine["mean_gain"] > 0.5
    assert report["verdict"].count("a global shift, not alignment") == 2
    assert "reaches" not in report["verdict"].replace("nothing is shown to reach", "")
    assert "Held-out retrieval is at chance" in report["verdict"]
    assert "Trained retrieval is at chance" in report["verdict"]


def test_learning_by_heart_is_told_from_alignment():
    text = assemble(*run_of((WEAK, STRONG), (WEAK, WEAK)))["verdict"]
    assert "was learnt by heart" in text
    assert "the held-out gap did not change" in text
    assert "Held-out retrieval is at chance" in text
    assert "Trained retrieval" not in text


def test_no_change_is_no_news_and_no_nan():
    report = assemble(*run_of((WEAK, WEAK), (WEAK, WEAK)))
    assert all(t.get("p_t", t.get("p")) == 1 for t in report["tests"])
    assert "nothing is shown to reach words that training never saw" in report["verdict"]
    assert not re.search("rose|by heart|shift", report["verdict"])


def test_a_gap_that_grows_by_scale_alone_is_unmasked():
    # the common direction goes away, so cosines spread; the order of the candidates hardly changes
    text = assemble(*run_of(((0.5, 3.0), (0.5, 0.8)), ((0.5, 3.0), (0.5, 0.8))))["verdict"]
    assert "A gap that grows alone is a change of scale" in text
    assert "reaches" not in text


@pytest.mark.parametrize(("kind", "said"), [("eval_pool_bos", "These vectors pool"), ("pool_bos", "Training pooled"), (None, None)])
def test_the_sink_is_named_where_it_was_pooled(kind, said):
    text = assemble(*run_of((WEAK, WEAK), (WEAK, WEAK), sink=0.97, **({kind: True} if kind else {})))["verdict"]
    assert ("97%" in text) == (said is not None)
    assert said is None or said in text
    small = assemble(*run_of((WEAK, WEAK), (WEAK, WEAK), sink=0.3, **({kind: True} if kind else {})))["verdict"]
    assert "sink" not in small


@pytest.mark.parametrize(
    ("right", "high", "said"),
    [
        (0, 0.056, "the base model gives 0 right [.000, .056]: it hardly knows these words"),
        (32, 0.62, "the base model gives 32 right, 50% [.000, .620]."),
    ],
)
def test_whether_the_model_knows_the_words_is_said(right, high, said):
    facts, alignments = run_of((WEAK, STRONG), (WEAK, STRONG))
    facts["probe"] = {"shots": 16, "asked": 64, "right": right, "value": right / 64, "low": 0.0, "high": high}
    assert f"Asked for 64 held-out translations after 16 examples, {said}" in assemble(facts, alignments)["verdict"]
    assert "Asked for" not in assemble({**facts, "probe": None}, alignments)["verdict"]


def test_the_control_run_the_collapsed_loss_and_the_missing_output_are_stated():
    text = assemble(*run_of((WEAK, STRONG), (WEAK, STRONG), shuffle_pairs=True, loss_last=5.49))["verdict"]
    assert text.startswith("This is the control run")
    assert "alignment reaches" not in text
    assert "the loss ended at 5.490, and chance is 5.500" in text
    assert "The output was not measured: shard 2 of 2 is absent." in text
    assert "learnt nothing" not in assemble(*run_of((WEAK, STRONG), (WEAK, STRONG), chance_loss=None, loss_last=5.49))["verdict"]


def test_the_output_gets_a_verdict_of_its_own():
    output = {"trained": (WEAK, WEAK), "held_out": (WEAK, WEAK)}
    at_layer, at_output = assemble(*run_of((WEAK, STRONG), (WEAK, STRONG), output))["verdict"].split("\n\n")
    assert "At layer 2, the held-out gap rose" in at_layer
    assert "At the output, the held-out gap did not change" in at_output


def test_without_held_out_pairs_nothing_is_claimed_about_new_words():
    facts, alignments = run_of((WEAK, STRONG), None)
    report = assemble(facts, alignments)
    assert "no pairs were held out" in report["verdict"]
    assert {t["split"] for t in report["tests"]} == {"trained"}
    assert "held out\n" not in printed(report, 80)
    draw_distributions(report, alignments)
    draw_layers(report)


def test_every_number_of_the_verdict_stands_in_a_table():
    output = {"trained": (WEAK, (0.4, 0.6)), "held_out": (WEAK, (0.3, 2.0))}
    for changes in ({}, {"shuffle_pairs": True}):
        report = assemble(*run_of((WEAK, STRONG), ((0.2, 0.5), (0.4, 1.5)), output, loss_last=5.5, sink=0.9, eval_pool_bos=True, **changes))
        tables = markdown({**report, "verdict": ""})
        said = re.findall(r"[+-]?\d*\.\d+", report["verdict"])
        assert len(said) > 30
        assert [number for number in said if number not in tables] == []


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_tables_fit_and_lose_nothing(width):
    # negative gaps make the widest intervals
    arms = ((0.0, 2.0), (0.0, 0.3))
    facts, alignments = run_of(arms, ((-0.6, 0.1), (-1.2, 0.0)), {"trained": arms, "held_out": arms}, sink=0.123)
    report = assemble(facts, alignments)
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for record in report["measurements"]:
        if record["metric"] in ("gap", "p_at_1", "mrr", "cosine", "mismatched", "sink_share"):
            assert f"{round(record['value'], 3) + 0.0:.3f}" in text
    for split, count in COUNTS.items():
        assert SPLITS[split] in text
        assert f"(n={count})" in text


def test_brackets_in_a_reason_are_printed_and_not_read_as_markup():
    facts, alignments = run_of((WEAK, WEAK), (WEAK, WEAK))
    report = assemble({**facts, "missing_output": "[Errno 2] shard[/red] absent"}, alignments)
    assert "[Errno 2] shard[/red] absent" in printed(report, 200)


def test_the_files_hold_the_same_numbers_and_nothing_else_is_left(tmp_path):
    output = {"trained": (WEAK, (0.6, 0.5)), "held_out": (WEAK, WEAK)}
    facts, alignments = run_of((WEAK, STRONG), (WEAK, (0.4, 0.5)), output)
    console = Console(file=io.StringIO(), width=80)
    report = write_report(tmp_path, facts, alignments, console)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.md", "README.md", "distributions.png", "layers.png"}
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in report.json")) == json.loads(json.dumps(report))
    assert {key: report[key] for key in facts} == facts
    keys = {(r["split"], r["when"], r["layer"], r["metric"]) for r in report["measurements"]}
    # neither the sink's share nor references were measured
    metrics = [name for name in names("recorded") if name != "sink_share" and not name.startswith("ref_")]
    assert keys == set(itertools.product(SPLITS, ("before", "after"), (2, "output"), metrics))
    assert len(keys) == len(report["measurements"])
    for name in ("distributions.png", "layers.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in (tmp_path / "report.md").read_text()
    for name in ("report.md", "README.md"):
        assert report["verdict"] in (tmp_path / name).read_text()
    paired = [t for t in report["tests"] if t["test"] == "paired"]
    tested = set(names("tested")) & set(metrics)
    assert {(t["split"], t["layer"], t["metric"]) for t in paired} == set(itertools.product(SPLITS, (2, "output"), tested))
    for test in paired:
        means = {r["when"]: r["value"] for r in report["measurements"] if all(r[k] == test[k] for k in ("split", "layer", "metric"))}
        assert test["mean_gain"] == pytest.approx(means["after"] - means["before"], abs=1e-12)
    for test in (t for t in report["tests"] if t["test"] == "welch"):
        gain = {t["split"]: t["mean_gain"] for t in paired if all(t[k] == test[k] for k in ("layer", "metric"))}
        assert test["difference"] == pytest.approx(gain["trained"] - gain["held_out"], abs=1e-12)


def test_a_rerun_writes_the_same_report(tmp_path):
    facts, alignments = run_of((WEAK, STRONG), (WEAK, STRONG))
    for folder in ("one", "two"):
        write_report(tmp_path / folder, facts, alignments, Console(file=io.StringIO()))
    for name in ("report.json", "report.md", "README.md", "layers.png", "distributions.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_number_that_is_not_finite_is_never_written(tmp_path):
    facts, alignments = run_of((WEAK, WEAK), (WEAK, WEAK))
    facts["machine"]["load"] = math.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, facts, alignments, Console(file=io.StringIO()))
    assert not (tmp_path / "report.json").exists()


def test_the_model_card_has_the_front_matter_that_the_hub_reads():
    facts, alignments = run_of((WEAK, STRONG), (WEAK, STRONG), source="swahili", target="Klingon: old")
    card = model_card(assemble(facts, alignments))
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "someone/small-model"
    assert front["library_name"] == "peft"
    assert front["language"] == ["sw"]
    assert 'AutoModelForCausalLM.from_pretrained("someone/small-model")' in body
    assert "cosine, mismatched" in body
    facts["model"]["name"] = "/home/someone/private/model-7b"
    local = model_card(assemble(facts, alignments))
    assert yaml.safe_load(local.split("---\n", 2)[1])["base_model"] == "model-7b"
    assert "/home/someone" not in local


def test_the_card_says_which_token_comes_first_and_which_class_loads_the_model():
    facts, alignments = run_of((WEAK, STRONG), (WEAK, STRONG))
    assert "behind\nthe beginning-of-sequence token" in model_card(assemble(facts, alignments))
    facts["model"] |= {"loads_by": "LlavaForConditionalGeneration", "first_token": {"text": "<|endoftext|>", "is": "EOS"}}
    card = model_card(assemble(facts, alignments))
    assert "behind\n`<|endoftext|>`, the end-of-sequence token" in card
    assert "beginning-of-sequence" not in card
    assert "from transformers import LlavaForConditionalGeneration\n" in card
    assert "base = LlavaForConditionalGeneration.from_pretrained(" in card


def test_the_full_arm_is_said_to_align_the_output():
    report = assemble(*run_of((WEAK, WEAK), (WEAK, WEAK), output={"trained": (WEAK, STRONG), "held_out": (WEAK, STRONG)}, arm="full"))
    card = model_card(report)
    assert "words aligned at the output" in card
    assert "`hidden_states[-1]` of the word alone" in card
    assert "the token states, their mean over" in card
    assert "single words of one list at the output" in card
    assert "final norm" not in card
    assert markdown(report).startswith("# Alignment of Swahili and English at the output")
    figure = draw_layers(report)
    marked = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linewidth() == 7]
    assert marked == [report["model"]["blocks"] + 1]


def test_the_layer_figure_shows_what_was_measured():
    facts, alignments = run_of((WEAK, STRONG), (WEAK, WEAK), {"trained": (WEAK, WEAK), "held_out": (WEAK, WEAK)})
    alignments |= {(split, when, 1): a for (split, when, layer), a in alignments.items() if layer == 2}
    report = assemble(facts, alignments)
    gap, mrr = draw_layers(report).axes
    line = next(line for line in gap.lines if line.get_label().startswith("trained, after"))
    expected = {1: 1, 2: 2, "output": facts["model"]["blocks"] + 1}
    records = {
        expected[r["layer"]]: r["value"]
        for r in report["measurements"]
        if (r["split"], r["when"], r["metric"]) == ("trained", "after", "gap")
    }
    assert dict(zip(line.get_xdata(), line.get_ydata())) == records
    chance = next(line for line in mrr.lines if line.get_label() == "chance, held out")
    assert chance.get_ydata()[0] == pytest.approx(sum(1 / r for r in range(1, 61)) / 60)


def test_the_distributions_hold_every_pair():
    collapsed = (0.0, 1e5)
    for arms in (((WEAK, STRONG), (WEAK, STRONG)), ((collapsed, collapsed), (collapsed, collapsed))):
        facts, alignments = run_of(*arms)
        for panel in draw_distributions(assemble(facts, alignments), alignments).axes:
            for patch in panel.patches:
                values, edges, _ = patch.get_data()
                assert (values * np.diff(edges)).sum() == pytest.approx(1)


def test_the_verdict_follows_the_records_alone():
    report = assemble(*run_of((WEAK, STRONG), (WEAK, STRONG)))
    assert verdict(json.loads(json.dumps(report))) == report["verdict"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({("held_out", "gap"): (-0.03, -0.04, -0.02)}, "the held-out gap fell by -0.030 [-.040, -.020]"),
        ({("held_out", "gap"): (0.001, -0.01, 0.012)}, "may be zero, though the held-out MRR rose"),
        ({("after", "mrr"): (0.08, 0.06, 0.1)}, "too little to lift retrieval above chance"),
        ({("after", "mrr"): (0.03, 0.02, 0.04)}, "Held-out retrieval is below chance (MRR 0.030 [.020, .040]"),
        ({("trained - held_out", "gap"): (-0.2, -0.3, -0.1)}, "held-out pairs gained more than trained ones, by -0.200 [-.300, -.100]"),
    ],
)
def test_rarer_outcomes_have_sentences_of_their_own(changes, said):
    report = assemble(*run_of((WEAK, STRONG), (WEAK, STRONG)))
    for (where, metric), (mean, low, high) in changes.items():
        changed = [r for r in report["measurements"] if (r["split"], r["when"], r["metric"]) == ("held_out", where, metric)]
        changed += [t for t in report["tests"] if (t["split"], t["metric"]) == (where, metric)]
        assert len(changed) == 1
        changed[0].update(value=mean, mean_gain=mean, difference=mean, low=low, high=high)
    assert said not in report["verdict"]
    assert said in verdict(report)


def test_few_held_out_pairs_are_said_to_be_few(monkeypatch):
    assert "held out, so these intervals are rough" not in assemble(*run_of((WEAK, STRONG), (WEAK, STRONG)))["verdict"]
    monkeypatch.setitem(COUNTS, "held_out", 12)
    assert "Only 12 pairs are held out, so these intervals are rough" in assemble(*run_of((WEAK, STRONG), (WEAK, STRONG)))["verdict"]
