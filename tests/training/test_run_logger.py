"""What a run logs can be read by others, and a resumed run goes on with it where the interrupted one was saved."""

import json
import math
import sys
import types

import pytest

from tli.runtime.errors import TliError
from tli.training.run_logger import JsonlLogger, TensorBoardLogger, holds_only_logs


def logged(path, steps, done=0) -> None:
    logger = JsonlLogger(path, done)
    for step in steps:
        logger.log({"loss": 1 / step, "lr": 1e-3}, step)
    logger.close()


def test_each_step_is_a_line_of_json_as_soon_as_it_is_logged(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log({"loss": 1 / 3, "grad_norm": math.inf}, 1)
    logger.log({"loss": math.nan, "grad_norm": 2.0}, 2)

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    lines = [json.loads(line, parse_constant=no_constant) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logger.close()
    assert lines == [{"schema": 1, "step": 1, "loss": 1 / 3, "grad_norm": None}, {"step": 2, "loss": None, "grad_norm": 2.0}]
    assert next(iter(lines[0])) == "schema"


@pytest.mark.parametrize("done", [0, 1, 4, 9])
@pytest.mark.parametrize("rest", ["", '{"step": 10, "lo'], ids=["whole", "cut"])
def test_a_resumed_log_is_that_of_a_run_that_was_never_interrupted(tmp_path, done, rest):
    logged(tmp_path / "whole.jsonl", range(1, 13))
    logged(tmp_path / "resumed.jsonl", range(1, 10))
    with (tmp_path / "resumed.jsonl").open("a") as file:
        file.write(rest)
    logged(tmp_path / "resumed.jsonl", range(done + 1, 13), done)
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_log_that_was_deleted_begins_anew_where_the_run_goes_on(tmp_path):
    logged(tmp_path / "metrics.jsonl", range(5, 8), done=4)
    logged(tmp_path / "metrics.jsonl", range(6, 9), done=5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 6, 7, 8]
    assert [line.get("schema") for line in lines] == [1, None, None, None]


@pytest.mark.parametrize("text", ["loss 3\n", "[1]\n", '{"loss": 3}\n', '{"step": "one"}\n'])
def test_a_file_that_is_no_log_is_refused_and_left_as_it_is(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(TliError, match="metrics.jsonl: each line must be a logged step, got .*; delete it, or start anew with --overwrite"):
        JsonlLogger(tmp_path / "metrics.jsonl", done=3)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_folder_of_logs_alone_is_told_from_others(tmp_path):
    assert holds_only_logs(tmp_path / "absent")
    for name in ("metrics.jsonl", "events.out.tfevents.17.host"):
        (tmp_path / name).touch()
        assert holds_only_logs(tmp_path)
    (tmp_path / "mine.txt").touch()
    assert not holds_only_logs(tmp_path)


@pytest.mark.parametrize("done", [0, 6])
def test_tensorboard_is_handed_every_value_and_told_what_a_resumed_run_takes_again(tmp_path, monkeypatch, done):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    logger = TensorBoardLogger(tmp_path, done)
    logger.log({"loss": 0.5, "lr": 1e-3}, done + 1)
    logger.close()
    assert calls == [(str(tmp_path), 7 if done else None), ("train/loss", 0.5, done + 1), ("train/lr", 1e-3, done + 1), "closed"]
