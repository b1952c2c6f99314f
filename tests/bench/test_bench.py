"""The benchmark compares equals: all contenders compute the same step, and one that does not stops it. No time is asserted."""

import dataclasses
import importlib.util
import json
import pathlib
import runpy
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from bench import command, cost, large, memory, record, start, step
from bench.harness import StepConfig, train_configs
from bench.peers.contenders import CONTENDERS, Contender, distinct_pairs, drawn_pairs, taking_part
from bench.step import AGAIN, agree, goals, interleave, measure, prepare, summary
from tli.config import TrainConfig
from tli.data import word_pairs
from tli.model.families import FAMILIES
from tli.runtime.errors import TliError

pytestmark = pytest.mark.slow

BATCH = 12
# the peers' decoders have Llama's names
LIKE_LLAMA = [name for name, family in FAMILIES.items() if family.kept_inside is None]
PEFT = ["tli", "peft-truncated", "peft-hook"]
OWN = ("tli", "float32")


@pytest.fixture
def make_config(make_model):
    """``make_config("gemma2", targets=...)``: a session's only training configuration on a small model of the family."""

    def make(family: str = "llama", **options) -> TrainConfig:
        return train_configs(StepConfig(model=str(make_model(family)), batches=str(BATCH), layer=2, rank=4, **options))[0]

    return make


@pytest.fixture
def config(make_config) -> TrainConfig:
    return make_config()


@pytest.fixture
def contenders(config) -> dict[str, Contender]:
    return prepare(config, PEFT)


def test_all_subjects_agree_in_loss_and_gradients(contenders):
    rows = agree(contenders)
    assert [row["subject"] for row in rows] == PEFT
    assert [len(contenders[name].model.base_model.model.layers) for name in ("peft-truncated", "peft-hook")] == [2, 4]
    # the step that the check takes is a real one
    assert all(row["loss_after_step"] < row["loss"] for row in rows)
    # A and B of seven layers in two blocks, each with something to compare
    for contender in contenders.values():
        factors = [factor for pair in contender.adapters().values() for factor in pair]
        assert len(factors) == 28
        assert {id(factor) for factor in factors} == {id(parameter) for parameter in contender.parameters}
        assert all(factor.grad.any() for factor in factors)


@pytest.mark.parametrize("loss", ["infonce", "hinge"])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
def test_a_session_at_a_small_size(make_config, targets, loss, monkeypatch):
    # whatever this processor is fast at, both dtypes take part
    monkeypatch.setattr(step, "dtypes", lambda device: ["float32", "bfloat16"])
    agreement, steps = measure(make_config(targets=targets, loss=loss), PEFT, rounds=2)
    assert [(row["subject"], row["dtype"]) for row in agreement] == [(name, dtype) for dtype in ("float32", "bfloat16") for name in PEFT]
    assert {(row["subject"], row["dtype"]) for row in steps} == {(row["subject"], row["dtype"]) for row in agreement} | {
        (AGAIN, "bfloat16")
    }
    assert all(len(row["rounds"]) == 2 for row in steps)
    assert max(row["loss_error"] for row in agreement) < 0.1
    step.show(Console(quiet=True), agreement, steps, goals(steps, []), ["sentence-transformers"])


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_every_family_agrees(make_config, family):
    rows = agree(prepare(make_config(family), PEFT))
    assert [row["subject"] for row in rows] == PEFT


@pytest.mark.skipif(not CONTENDERS["sentence-transformers"].installed(), reason="sentence-transformers is not installed")
def test_sentence_transformers_agrees_on_a_batch_without_two_of_a_meaning(make_config):
    # the small tokenizer makes some prefixes a token of their own, which sentence-transformers would pool
    config = dataclasses.replace(make_config(targets="q_proj,v_proj"), prefix="")
    contenders = prepare(config, ["tli", "sentence-transformers"])
    rows = agree(contenders)
    assert rows[1]["subject"] == "sentence-transformers"
    assert len(contenders["sentence-transformers"].adapters()) == 4
    with pytest.raises(TliError, match="no two pairs may mean the same"):
        CONTENDERS["sentence-transformers"](dataclasses.replace(config, loss="hinge"), distinct=True)


def test_what_is_not_installed_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert taking_part(["peft-hook", "sentence-transformers"]) == (["tli", "peft-hook"], ["sentence-transformers"])
    with pytest.raises(TliError, match="--subjects"):
        taking_part(["peft-hok"])


def test_distinct_pairs_leave_no_two_of_a_meaning_and_none_out_without_need():
    config = TrainConfig(batch=1000)
    batch, rest = drawn_pairs(config, distinct=True)
    pairs = word_pairs.read_pairs(None, "swahili", "english")
    assert len(batch) == 1000
    assert len(rest) == len(pairs) - 1000
    assert len(word_pairs.false_negative_pairs(batch)) == 0
    assert len(word_pairs.false_negative_pairs(drawn_pairs(config)[0])) > 0
    order = torch.randperm(len(pairs)).numpy()
    taken = set(distinct_pairs(pairs, order).tolist())
    alike = {tuple(edge) for edge in word_pairs.false_negative_pairs(pairs).tolist()}
    # each one left out means the same as one that was taken
    assert all(any((number, other) in alike for other in taken) for number in range(len(pairs)) if number not in taken)


def _apply_the_final_norm(contenders):
    peer = contenders["peft-truncated"]
    peer.model.base_model.model.norm = peer.norm


def _hook_the_next_block(contenders):
    peer = contenders["peft-hook"]
    blocks = peer.model.base_model.model.layers
    blocks[1]._forward_hooks.clear()
    blocks[2].register_forward_hook(peer._take)


def _change_one_weight(contenders):
    factor = contenders["peft-truncated"].adapters()["layers.1.mlp.down_proj"][0]
    with torch.no_grad():
        factor[0] *= 1.05


def _detach_one_adapter(contenders):
    # the loss stays what it is: only a comparison of gradients can tell
    v_proj = contenders["peft-hook"].model.base_model.model.layers[1].self_attn.v_proj
    v_proj.register_forward_hook(lambda module, arguments, output: 0.99 * output + 0.01 * output.detach())


@pytest.mark.parametrize("breakage", [_apply_the_final_norm, _hook_the_next_block, _change_one_weight, _detach_one_adapter])
def test_a_subject_that_computes_something_else_stops_the_benchmark(contenders, breakage):
    breakage(contenders)
    with pytest.raises(TliError, match="against tli must be at most"):
        agree(contenders)


def test_a_nan_does_not_pass_as_agreement(contenders):
    nn.init.constant_(contenders["peft-hook"].parameters[0], float("nan"))
    with pytest.raises(TliError, match="got nan"):
        agree(contenders)


class _Counted:
    """Stands for a contender: notes whose turn it is."""

    def __init__(self, name: str, turns: list[str]):
        self.name, self.turns = name, turns

    def step(self) -> None:
        self.turns.append(self.name)


def test_rounds_are_interleaved_and_tli_runs_twice_in_each():
    turns = []
    keys = [(name, "float32") for name in PEFT]
    seconds = interleave({key: _Counted(key[0], turns) for key in keys}, rounds=5, own=OWN)
    assert {key: len(own) for key, own in seconds.items()} == {**dict.fromkeys(keys, 5), (AGAIN, "float32"): 5}
    for begin in range(0, len(turns), 4):
        assert sorted(turns[begin : begin + 4]) == sorted([*PEFT, "tli"])
    assert len({tuple(turns[begin : begin + 4]) for begin in range(0, len(turns), 4)}) > 1


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    hook, again = ("peft-hook", "float32"), (AGAIN, "float32")
    seconds = {OWN: [1.0, 2.0, 10.0], hook: [30.0, 80.0, 100.0], again: [1.0, 1.0, 11.0]}
    rows = {row["subject"]: row for row in summary(seconds, OWN)}
    assert [rows["peft-hook"][key] for key in ("ratio", "ratio_low", "ratio_high")] == [30.0, 10.0, 40.0]
    assert [rows[AGAIN][key] for key in ("ratio", "ratio_low", "ratio_high")] == [1.0, 0.5, 1.1]
    assert rows["tli"]["seconds"] == 2.0


def test_goals_are_met_or_not_by_each_peers_better_dtype():
    def rows(name: str, **facts) -> list[dict]:
        return [
            {"batch": 64, "subject": contender, "dtype": dtype, name: value}
            for contender, values in facts.items()
            for dtype, value in zip(("float32", "bfloat16"), values)
        ]

    steps = rows("ratio", **{"tli": (1.9, 1.0), "peft-truncated": (8.0, 4.9), "peft-hook": (41.0, 60.0)})
    peaks = rows("peak_bytes", **{"tli": (70, 50), "peft-truncated": (200, 100), "peft-hook": (300, 300)})
    assert [(row["got"], row["met"]) for row in goals(steps, peaks)] == [(4.9, False), (41.0, True), (0.5, True)]


def test_memory_is_of_a_process_that_took_its_steps(config):
    (row,) = memory.measure(config, ["tli"])
    assert (row["subject"], row["dtype"], row["batch"]) == ("tli", "float32", BATCH)
    assert 0 < row["imported_bytes"] < row["built_bytes"] <= row["peak_bytes"]


def test_a_batch_larger_than_the_list_is_refused(config, tmp_path):
    words = tmp_path / "few.tsv"
    words.write_text("swahili\tenglish\nkitabu\tbook\nmtu\tperson\n")
    with pytest.raises(TliError, match="--batches"):
        prepare(TrainConfig(model=config.model, pairs=str(words), batch=3), PEFT)


def test_a_record_is_never_overwritten(tmp_path):
    first = record.write("step", {"run": 1}, tmp_path)
    before = first.read_bytes()
    second = record.write("step", {"run": 2}, tmp_path)
    assert first != second
    assert first.read_bytes() == before
    facts = json.loads(second.read_text())
    assert facts["run"] == 2
    assert facts["machine"]["versions"]["torch"] == torch.__version__


def test_the_scripts_take_the_same_steps_and_leave_adapters(make_model, tmp_path, monkeypatch, capsys):
    from peft import PeftModel
    from transformers import AutoModel

    model, lists = make_model("llama"), command.write_lists(word_pairs.read_pairs(None, "swahili", "english"), tmp_path, batch=8, limit=20)
    trained = word_pairs.read_pairs(str(lists[0]), "source", "target")
    # whole batches, without two of a meaning
    assert len(trained) == 16
    assert len(word_pairs.false_negative_pairs(trained)) == 0
    said = {}
    for name in ("peft-truncated", "peft-hook"):
        config = command.CommandConfig(epochs=2, batch=8, rank=4, dropout=0.0)
        _, script, *arguments = command.command(name, "float32", config, str(model), lists, str(tmp_path / name))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
        said[name] = command.losses(name, json.loads(capsys.readouterr().out.splitlines()[-1]))
        adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(model), tmp_path / name)
        assert sum(factor.any().item() for path, factor in adapted.named_parameters() if "lora_B" in path) == 14
    # equal seeds draw equal orders and equal adapters
    assert said["peft-truncated"] == pytest.approx(said["peft-hook"], rel=1e-4)
    assert said["peft-truncated"]["steps"] == 4


def test_scripts_that_end_elsewhere_are_not_timed():
    own = {"subject": "tli", "steps": 6, "loss_first": 4.5, "loss_last": 4.0}
    command.require_comparable([own, {**own, "subject": "peft-hook", "loss_last": 4.1}])
    for wrong in ({"steps": 7}, {"loss_first": 4.15}, {"loss_last": float("nan")}):
        with pytest.raises(TliError, match="peft-hook: steps and losses must be tli's"):
            command.require_comparable([own, {**own, "subject": "peft-hook", **wrong}])


def test_pages_are_counted_as_they_are_read(tmp_path):
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(bytes(64 << 20))
    assert start.cached(tmp_path) == 64 << 20
    try:
        start.forget(tmp_path)
    except TliError:
        pytest.skip("this file system keeps its pages, as one in memory does")
    assert start.cached(tmp_path) == 0
    with shard.open("rb") as file:
        file.read(4096)
    # and what the kernel read ahead
    assert 4096 <= start.cached(tmp_path) < 64 << 20


def test_needed_bytes_are_those_of_blocks_norm_and_rows(make_model, tokenizer):
    from transformers import AutoModel

    folder = make_model("llama")
    pairs = word_pairs.read_pairs(None, "swahili", "english")[:5]
    words = [" " + word for pair in pairs for word in (pair.source, pair.target)]
    rows = {0}.union(*(tokenizer(word, add_special_tokens=False)["input_ids"] for word in words))
    model = AutoModel.from_pretrained(folder)
    weights = [*model.layers[:3].parameters(), model.norm.weight]
    expected = 4 * (sum(weight.numel() for weight in weights) + len(rows) * model.config.hidden_size)
    assert start.needed_bytes(pathlib.Path(folder), 3, pairs) == expected


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_the_floor_counts_each_weight_twice_a_node_but_what_is_looked_up(make_model, family):
    from transformers import AutoModel

    folder = make_model(family)
    blocks = AutoModel.from_pretrained(folder).layers[:3]
    weights = {name: module.weight.numel() for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    counted = sum(weights.values()) - sum(weights[f"0.self_attn.{name}_proj"] for name in "qkv")
    least = large.floor(TrainConfig(model=str(folder), layer=3, device="cpu", dtype="float32"), nodes=7)
    # a multiplication and an addition, forward and backward
    assert least["flops"] == 2 * 2 * 7 * counted
    assert least["seconds"] == least["flops"] / least["flops_per_second"]


def test_the_figure_of_costs_shows_every_series(tmp_path):
    config = cost.CostConfig(layers="1,2", ranks="4", batches="", shapes="smollm2-135m,llama-3-8b")
    points = cost.points(config)
    assert [(series, place) for series, place, _ in points] == [
        *(("layer", 1), ("layer", 2), ("rank", 4)),
        *(("shape", "smollm2-135m"), ("shape", "llama-3-8b")),
    ]
    assert [(train.layer, train.rank, train.batch) for *_, train in points][:3] == [(1, 16, 128), (2, 16, 128), (2, 4, 128)]
    rows = [
        {"series": series, "place": place, "seconds": 2.0 + number, "floor_seconds": 1.0 + number, "peak_bytes": 1e9 * (1 + number)}
        for number, (series, place, _) in enumerate(points)
    ]
    panels = [panel for panel in cost.draw(rows, "about").axes if panel.axison]
    drawn = {panel.get_xlabel(): [list(line.get_ydata()) for line in panel.lines] for panel in panels if panel.get_xlabel()}
    assert drawn == {
        cost.SERIES["layer"][1]: [[2, 3], [1, 2]],
        cost.SERIES["rank"][1]: [[4], [3]],
        cost.SERIES["shape"][1]: [[5, 6], [4, 5]],
    }
    with pytest.raises(TliError, match="--shapes"):
        cost.points(cost.CostConfig(shapes="gpt-2"))
