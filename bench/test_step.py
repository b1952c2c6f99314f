"""The steps under pytest-benchmark: ``python -m pytest bench/test_step.py``.

pytest-benchmark times one function after the other, and on a shared machine minutes lie between them. So a fixture times
all subjects interleaved (``bench.step``), once for each batch and only when they agree, and each test plays its subject's
seconds to pytest-benchmark through a clock that stands still but for them: its statistics, groups, comparisons and JSON
are of the interleaved steps. ``TLI_BENCH`` changes the setting: ``TLI_BENCH='{"batches": "64", "layer": 4}'``.
"""

import json
import os

import pytest

from bench import record
from bench.peers import SUBJECTS
from bench.step import AGAIN, StepConfig, agree, interleave, prepare, summary, train_configs

CONFIG = StepConfig(**json.loads(os.environ.get("TLI_BENCH", "{}")))


class Clock:
    """A clock that shows the seconds played so far."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, seconds: float) -> None:
        self.now += seconds


clock = Clock()


@pytest.fixture(scope="module", params=train_configs(CONFIG), ids=lambda config: f"batch{config.batch}")
def timed(request) -> tuple[dict, dict]:
    """Of one batch: how well each subject agrees with tli, and its timed steps."""
    subjects = prepare(request.param)
    agreement = {row["subject"]: row for row in agree(subjects)}
    steps = {row["subject"]: row for row in summary(interleave(subjects, CONFIG.rounds))}
    return agreement, {name: {"batch": request.param.batch, **row} for name, row in steps.items()}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("subject", [*SUBJECTS, AGAIN])
def test_step(benchmark, timed, subject):
    agreement, steps = timed
    step = steps[subject]
    benchmark.group = f"batch {step['batch']}"
    benchmark.extra_info.update(
        machine=record.machine(), agreement=agreement.get(subject), **{key: step[key] for key in step if key != "rounds"}
    )
    seconds = iter(step["rounds"])
    benchmark.pedantic(clock.play, setup=lambda: ((next(seconds),), {}), rounds=len(step["rounds"]))
