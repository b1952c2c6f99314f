"""What the benchmarks share: processes and their memory, rounds in a random order, ratios, goals, and what a step is compared with."""

import dataclasses
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from rich.table import Table

from bench import record
from tli.config import TrainConfig
from tli.runtime.cli import option
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError

_WATCH_EVERY_S = 0.02
T = typing.TypeVar("T")


def results_option(name: str = "results") -> typing.Any:
    """The option of every benchmark that keeps a record."""
    return option(str(record.RESULTS.relative_to(record.ROOT)), "bench", "folder for the record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Compare tli's training step with peft's, truncated and whole, and with sentence-transformers'."""

    batches: str = option("64,128,256", "bench", "pairs per step, a comma list")
    layer: int = option(2, "bench", "hidden state to align")
    rank: int = option(16, "bench", "LoRA rank")
    targets: str = option("all-linear", "bench", "all-linear, or a comma list of linear layers")
    loss: typing.Literal["infonce", "hinge"] = option("infonce", "bench", "infonce or hinge")
    subjects: str = option("tli,peft-truncated,peft-hook,sentence-transformers", "bench", "a comma list; what is not installed is left out")
    rounds: int = option(9, "bench", "rounds of timed steps")
    device: str = option("cpu", "bench", "cpu, cuda or cuda:N")
    model: str | None = option(None, "bench", "checkpoint (default: the starter)")
    pairs: str | None = option(None, "bench", "word pairs (default: the shipped list)")
    results: str = results_option()


def train_configs(config: StepConfig) -> list[TrainConfig]:
    """One training configuration in float32 for each batch."""
    try:
        batches = [int(batch) for batch in config.batches.split(",")]
    except ValueError:
        raise TliError("--batches", "the value must be a comma list of numbers", repr(config.batches), "write, say, 64,128") from None
    same = {name: getattr(config, name) for name in ("model", "pairs", "layer", "rank", "targets", "loss", "device")}
    # the learning rate is lr at every step, as the peers have it
    return [TrainConfig(**same, dropout=0.0, warmup=0, schedule="constant", dtype="float32", batch=batch) for batch in batches]


def dtypes(device: str) -> list[str]:
    """The dtypes that are timed, tli's default last: float32, and the one that training chooses here, where that is another."""
    return list(dict.fromkeys(["float32", resolve_device(device, "fastest").facts["dtype"]]))


def chosen(flag: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """The wanted names, if all are known."""
    if unknown := [name for name in wanted if name not in known]:
        raise TliError(flag, f"each must be one of {', '.join(known)}", ", ".join(unknown), "choose among these")
    return list(wanted)


@dataclasses.dataclass(frozen=True)
class Run:
    """A process that ran to its end: when it began, how long it took, its peak memory, and the last line of its output as JSON."""

    began: float
    seconds: float
    peak_bytes: int
    said: dict


def run(name: str, command: list[str], must: str = "the process must run to its end", remedy: str | None = None) -> Run:
    """Run a process to its end.

    Raises:
        TliError: it failed, with the last line that it said.
    """
    began = time.time()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=record.ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        with MemoryWatch("VmHWM", process.pid) as peak:
            process.wait()
        seconds = time.time() - began
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            last = (err.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise TliError(name, must, last, remedy or f"run it by hand to see why: {' '.join(command)}")
        lines = out.read().splitlines()
    return Run(began, seconds, peak.most, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {})


def call_in_process(name: str, function: Callable, *arguments: str) -> dict:
    """What a function of a benchmark's module prints as its last line, called with words in a process of its own."""
    module = f"bench.{pathlib.Path(function.__code__.co_filename).relative_to(record.ROOT / 'bench').with_suffix('').as_posix()}"
    code = f"import sys; from {module.replace('/', '.')} import {function.__name__} as f; f(*sys.argv[1:])"
    remedy = "choose a smaller one, or free memory"
    return run(name, [sys.executable, "-c", code, *arguments], "the process must measure to its end", remedy).said


def resident(what: str, process: int | str = "self") -> int:
    """A line of the process's status, VmRSS, VmHWM or RssAnon, in bytes; 0 of a process that has ended."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as status:
            found = re.search(rf"{what}:\s*(\d+) kB", status.read())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) * 1024 if found else 0


class MemoryWatch:
    """The most that a line of a process's status says, looked at every 20 ms while the ``with`` block lasts."""

    def __init__(self, what: str, process: int | str = "self"):
        self.what, self.process, self.most = what, process, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while True:
            self.most = max(self.most, resident(self.what, self.process))
            if self._end.wait(_WATCH_EVERY_S):
                return

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()
        self.most = max(self.most, resident(self.what, self.process))


def turns(keys: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """(round, key) of every key in every round, in a new random order each, so that what else the machine does falls on all alike."""
    order = np.random.default_rng(0)
    for number in range(rounds):
        for which in order.permutation(len(keys)):
            yield number, keys[which]


def ratios(mine: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest over rounds of (seconds of a contender / ours in the same round)."""
    found = [its / ours for its, ours in zip(mine, own, strict=True)]
    return {"ratio": statistics.median(found), "ratio_low": min(found), "ratio_high": max(found)}


def goal(goal: str, bound: float, got: float | None, at_least: bool) -> dict:
    """A goal with what was got for it; ``met`` is None where nothing was."""
    met = None if got is None else bool(got >= bound if at_least else got <= bound)
    return {"goal": goal, "bound": bound, "got": got, "met": met}


def goals_table(reached: Sequence[Mapping[str, typing.Any]]) -> Table:
    table = Table("goal", "bound", "got", "met", title="goals")
    for row in reached:
        got = "not measured" if row["got"] is None else f"{row['got']:.2f}"
        table.add_row(row["goal"], f"{row['bound']:g}", got, {None: "", True: "yes", False: "no"}[row["met"]])
    return table
