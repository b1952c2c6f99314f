"""The GPU's table of whole steps, rehearsed on a CPU: every contender runs, those that compute the same agree, and a liar stops it."""

import json
import sys

import pytest
import torch

from bench.gpu import step as gpu_step
from tli.runtime.errors import TliError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(make_model, tokenizer, tmp_path_factory):
    """A model stored in bf16, as real ones are: both libraries make the same NF4 of it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("bf16")
    original = make_model("llama", hidden_size=64, intermediate_size=128)
    AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rehearse(folder, monkeypatch, tmp_path):
    """Rehearse with these contenders, and return the record."""

    def run(**early) -> dict:
        monkeypatch.setattr(gpu_step, "EARLY", {name: kind for name, kind in gpu_step.EARLY.items() if "compiled" not in name} | early)
        monkeypatch.setattr(gpu_step.record, "ROOT", tmp_path)
        monkeypatch.setattr(sys, "argv", ["gpu_step", str(folder), "--rehearse", "--batch", "8", "--rounds", "2", "--rank", "4"])
        gpu_step.main()
        (file,) = (tmp_path / "runs" / "rehearsal").glob("*-gpu-step-*.json")
        return json.loads(file.read_text())

    return run


def test_every_subject_takes_its_steps_and_is_timed(rehearse):
    found = rehearse()
    assert len(found["early"]) == 6
    for row in [*found["early"], *found["full"]]:
        assert "failed" not in row, row
        assert len(row["rounds"]) == 2
        assert row["losses"][-1] < row["losses"][0]
    assert found["floor"]["seconds"] > 0
    assert {row["goal"]: row["got"] is not None for row in found["goals"]}["times the floor, at most"]


def test_one_that_fails_does_not_take_the_others_with_it(rehearse):
    class Broken(gpu_step.Tli):
        def step(self):
            raise RuntimeError("out of memory")

    found = rehearse(**{"broken": (Broken, {}, "a")})
    (row,) = (row for row in found["early"] if row["subject"] == "broken")
    assert row == {"subject": "broken", "failed": "RuntimeError: out of memory"}


def test_one_whose_loss_is_another_stops_it(rehearse):
    class Wrong(gpu_step.Tli):
        def step(self):
            return super().step() * 1.1

    with pytest.raises(TliError, match="losses: the same function must begin with the same loss"):
        rehearse(**{"wrong": (Wrong, {}, "a")})
