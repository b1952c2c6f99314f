"""The benchmark compares equals: all subjects compute the same step, and one that does not stops it. No time is asserted."""

import json

import pytest
import torch
from torch import nn

from bench import memory, record
from bench.peers import SUBJECTS, Subject
from bench.step import AGAIN, StepConfig, agree, goals, interleave, prepare, summary, train_configs
from tli.config import TrainConfig
from tli.errors import TliError

BATCH = 12


@pytest.fixture
def config(make_model) -> TrainConfig:
    return train_configs(StepConfig(model=str(make_model("llama")), batches=str(BATCH), layer=2, rank=4))[0]


@pytest.fixture
def subjects(config) -> dict[str, Subject]:
    return prepare(config)


def test_all_subjects_agree_in_loss_and_gradients(subjects):
    rows = agree(subjects)
    assert [row["subject"] for row in rows] == list(SUBJECTS)
    assert [len(subjects[name].model.base_model.model.layers) for name in ("peft-truncated", "peft-hook")] == [2, 4]
    # the step that the check takes is a real one
    assert all(row["loss_after_step"] < row["loss"] for row in rows)
    # A and B of seven layers in two blocks, each with something to compare
    for subject in subjects.values():
        factors = [factor for pair in subject.adapters().values() for factor in pair]
        assert len(factors) == 28
        assert {id(factor) for factor in factors} == {id(parameter) for parameter in subject.parameters}
        assert all(factor.grad.any() for factor in factors)


def _apply_the_final_norm(subjects):
    peer = subjects["peft-truncated"]
    peer.model.base_model.model.norm = peer.norm


def _hook_the_next_block(subjects):
    peer = subjects["peft-hook"]
    blocks = peer.model.base_model.model.layers
    blocks[1]._forward_hooks.clear()
    blocks[2].register_forward_hook(peer._take)


def _change_one_weight(subjects):
    factor = subjects["peft-truncated"].adapters()["layers.1.mlp.down_proj"][0]
    with torch.no_grad():
        factor[0] *= 1.05


def _detach_one_adapter(subjects):
    # the loss stays what it is: only a comparison of gradients can tell
    v_proj = subjects["peft-hook"].model.base_model.model.layers[1].self_attn.v_proj
    v_proj.register_forward_hook(lambda module, arguments, output: 0.99 * output + 0.01 * output.detach())


@pytest.mark.parametrize("breakage", [_apply_the_final_norm, _hook_the_next_block, _change_one_weight, _detach_one_adapter])
def test_a_subject_that_computes_something_else_stops_the_benchmark(subjects, breakage):
    breakage(subjects)
    with pytest.raises(TliError, match="against tli must be at most"):
        agree(subjects)


def test_a_nan_does_not_pass_as_agreement(subjects):
    nn.init.constant_(subjects["peft-hook"].parameters[0], float("nan"))
    with pytest.raises(TliError, match="got nan"):
        agree(subjects)


class _Counted:
    """Stands for a subject: notes whose turn it is."""

    def __init__(self, name: str, turns: list[str]):
        self.name, self.turns = name, turns

    def step(self) -> None:
        self.turns.append(self.name)


def test_rounds_are_interleaved_and_tli_runs_twice_in_each():
    turns = []
    seconds = interleave({name: _Counted(name, turns) for name in SUBJECTS}, rounds=5)
    assert {name: len(own) for name, own in seconds.items()} == {**dict.fromkeys(SUBJECTS, 5), AGAIN: 5}
    for begin in range(0, len(turns), 4):
        assert sorted(turns[begin : begin + 4]) == sorted([*SUBJECTS, "tli"])
    assert len({tuple(turns[begin : begin + 4]) for begin in range(0, len(turns), 4)}) > 1


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    rows = {row["subject"]: row for row in summary({"tli": [1.0, 2.0, 10.0], "peft-hook": [30.0, 80.0, 100.0], AGAIN: [1.0, 1.0, 11.0]})}
    assert [rows["peft-hook"][key] for key in ("ratio", "ratio_low", "ratio_high")] == [30.0, 10.0, 40.0]
    assert [rows[AGAIN][key] for key in ("ratio", "ratio_low", "ratio_high")] == [1.0, 0.5, 1.1]
    assert rows["tli"]["seconds"] == 2.0


def test_goals_are_met_or_not_as_measured():
    steps = [{"batch": 64, "subject": name, "ratio": ratio} for name, ratio in (("tli", 1.0), ("peft-truncated", 3.9), ("peft-hook", 31.0))]
    peaks = [
        {"batch": 64, "subject": name, "peak_bytes": peak} for name, peak in (("tli", 50), ("peft-truncated", 100), ("peft-hook", 300))
    ]
    rows = goals(steps, peaks, {"first_step_seconds": 5.1, "help_seconds": 0.1})
    assert [(row["got"], row["met"]) for row in rows] == [(3.9, False), (31.0, True), (0.5, True), (5.1, False), (0.1, True)]


def test_memory_is_of_a_process_that_took_its_steps(config):
    (row,) = memory.measure(config, ["tli"])
    assert (row["subject"], row["batch"]) == ("tli", BATCH)
    assert 0 < row["imported_bytes"] < row["built_bytes"] <= row["peak_bytes"]


def test_a_batch_larger_than_the_list_is_refused(config, tmp_path):
    words = tmp_path / "few.tsv"
    words.write_text("swahili\tenglish\nkitabu\tbook\nmtu\tperson\n")
    with pytest.raises(TliError, match="--batches"):
        prepare(TrainConfig(model=config.model, pairs=str(words), batch=3))


def test_a_record_is_never_overwritten(tmp_path):
    first = record.write("step", {"run": 1}, tmp_path)
    before = first.read_bytes()
    second = record.write("step", {"run": 2}, tmp_path)
    assert first != second
    assert first.read_bytes() == before
    facts = json.loads(second.read_text())
    assert facts["run"] == 2
    assert facts["machine"]["versions"]["torch"] == torch.__version__
