"""The steps under pytest-benchmark: ``python -m pytest bench/peers/test_step.py``.

pytest-benchmark times one function after the other, and on a shared machine minutes lie between them. So a fixture times
all contenders interleaved (``bench.step``), once for each batch and only when they agree, and each test plays its contender's
seconds to pytest-benchmark through a clock that stands still but for them: its statistics, groups, comparisons and JSON
are of the interleaved steps. ``TLI_BENCH`` changes the setting: ``TLI_BENCH='{"batches": "64", "layer": 4}'``.
"""

import json
import os

import pytest

from bench import record
from bench.harness import StepConfig, dtypes, train_configs
from bench.peers.contenders import taking_part
from bench.step import AGAIN, measure

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
    """Of one batch: how well each contender agrees with tli, and its timed steps."""
    agreement, steps = measure(request.param, taking_part(CONFIG.subjects.split(","))[0], CONFIG.rounds)
    return {(row["subject"], row["dtype"]): row for row in agreement}, {(row["subject"], row["dtype"]): row for row in steps}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("dtype", dtypes(CONFIG.device))
@pytest.mark.parametrize("subject", [*taking_part(CONFIG.subjects.split(","))[0], AGAIN])
def test_step(benchmark, timed, contender, dtype):
    agreement, steps = timed
    if (contender, dtype) not in steps:
        pytest.skip("tli's second step of a round is in its default dtype")
    step = steps[contender, dtype]
    benchmark.group = f"batch {step['batch']}"
    benchmark.extra_info.update(
        machine=record.machine(), agreement=agreement.get((contender, dtype)), **{key: step[key] for key in step if key != "rounds"}
    )
    seconds = iter(step["rounds"])
    benchmark.pedantic(clock.play, setup=lambda: ((next(seconds),), {}), rounds=len(step["rounds"]))
