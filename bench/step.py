"""``python -m bench.step``: tli's training step beside its peers', their memory, and how soon a run begins.

First all subjects must agree, in loss and in every adapter's gradient, and in the loss after a step; else nothing is timed.
Then come rounds. Each takes one step of every subject, and a second one of tli's own, in a new random order, so whatever
else the machine does falls on all alike. A ratio is the median over rounds of (its seconds / tli's seconds in the same round);
that of ``tli again`` would be 1 on a silent machine, and its spread is the noise that the others carry, too.

Memory and start are measured in processes of their own. One record of it all goes to ``bench/results/``.
"""

import dataclasses
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import memory, record
from bench.peers import SUBJECTS, Subject
from tli.config import TrainConfig, as_dict, option, parse
from tli.errors import TliError, run_command

AGAIN = "tli again"
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
# B starts at zero, which would leave A without a gradient to compare
_START_OF_B = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Compare tli's training step with peft's, truncated and whole."""

    batches: str = option("64,128,256", "bench", "pairs per step, a comma list")
    layer: int = option(2, "bench", "hidden state to align")
    rank: int = option(16, "bench", "LoRA rank, in all linear layers")
    rounds: int = option(9, "bench", "rounds of timed steps")
    runs: int = option(5, "bench", "starts of tli.train and of its --help")
    model: str | None = option(None, "bench", "checkpoint (default: the starter)")
    pairs: str | None = option(None, "bench", "word pairs (default: the shipped list)")
    results: str = option(str(record.RESULTS.relative_to(record.ROOT)), "bench", "folder for the record")


def train_configs(config: StepConfig) -> list[TrainConfig]:
    """One training configuration for each batch."""
    try:
        batches = [int(batch) for batch in config.batches.split(",")]
    except ValueError:
        raise TliError("--batches", "the value must be a comma list of numbers", repr(config.batches), "write, say, 64,128") from None
    return [
        TrainConfig(model=config.model, pairs=config.pairs, layer=config.layer, rank=config.rank, dropout=0.0, batch=batch)
        for batch in batches
    ]


def prepare(config: TrainConfig) -> dict[str, Subject]:
    """Every subject, all with the same adapters: tli's A, and a small random B."""
    subjects = {name: subject_class(config) for name, subject_class in SUBJECTS.items()}
    generator = torch.Generator().manual_seed(config.seed)
    start = {
        path: (a.detach().clone(), torch.randn(b.shape, generator=generator) * _START_OF_B)
        for path, (a, b) in subjects["tli"].adapters().items()
    }
    for subject in subjects.values():
        subject.start_from(start)
    return subjects


def agree(subjects: dict[str, Subject]) -> list[dict]:
    """How far each subject is from tli, relatively: in its loss, its worst gradient, and its loss after a step.

    Raises:
        TliError: one that is further than 1e-4 in a loss or 1e-3 in a gradient.
    """
    losses, gradients = {}, {}
    for name, subject in subjects.items():
        loss = subject.loss()
        loss.backward()
        losses[name] = loss.item()
        gradients[name] = {(path, i): factor.grad.clone() for path, pair in subject.adapters().items() for i, factor in enumerate(pair)}
    for subject in subjects.values():
        subject.step()
    with torch.no_grad():
        after = {name: subject.loss().item() for name, subject in subjects.items()}
    rows = []
    for name in subjects:
        worst = max(((gradients[name][key] - own).norm() / own.norm()).item() for key, own in gradients["tli"].items())
        errors = {
            "loss_error": abs(losses[name] / losses["tli"] - 1),
            "gradient_error": worst,
            "loss_after_step_error": abs(after[name] / after["tli"] - 1),
        }
        for error, value in errors.items():
            tolerance = GRADIENT_TOLERANCE if error == "gradient_error" else LOSS_TOLERANCE
            # not <= so that a NaN fails, too
            if not value <= tolerance:
                must = f"{error.replace('_', ' ')} against tli must be at most {tolerance:g}"
                raise TliError(name, must, f"{value:.2g}", "find out which is wrong: nothing is timed before they agree")
        rows.append({"subject": name, "loss": losses[name], "loss_after_step": after[name], **errors})
    return rows


def interleave(subjects: dict[str, Subject], rounds: int) -> dict[str, list[float]]:
    """Seconds of each subject's step in each round; ``tli again`` is tli's second step of the round."""
    turns = {**subjects, AGAIN: subjects["tli"]}
    seconds = {name: [] for name in turns}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(turns)):
            began = time.perf_counter()
            turns[name].step()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds: dict[str, list[float]]) -> list[dict]:
    """Median seconds of each subject, and the median, lowest and highest of its rounds' ratios to tli."""
    rows = []
    for name, own in seconds.items():
        ratios = [mine / tli for mine, tli in zip(own, seconds["tli"], strict=True)]
        ratio = {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
        rows.append({"subject": name, "seconds": statistics.median(own), **ratio, "rounds": own})
    return rows


def start(config: StepConfig, runs: int) -> dict:
    """Seconds from the command to the end of its first optimiser step, and of ``--help``: medians, the page cache warm."""
    with tempfile.TemporaryDirectory() as folder:

        def first_step(run: int) -> float:
            flags = ["--no-report", "--epochs=1", "--json", f"--output={folder}/{run}", f"--layer={config.layer}", f"--rank={config.rank}"]
            chosen = [f"--{name}={value}" for name, value in (("model", config.model), ("pairs", config.pairs)) if value is not None]
            began = time.time()
            return json.loads(tli_train([*flags, *chosen]))["training"]["first_step_at"] - began

        def help_shown(run: int) -> float:
            began = time.perf_counter()
            tli_train(["--help"])
            return time.perf_counter() - began

        # the first of each warms the page cache
        first_steps, helps = ([measured(run) for run in range(runs + 1)][1:] for measured in (first_step, help_shown))
    return {
        "first_step_seconds": statistics.median(first_steps),
        "help_seconds": statistics.median(helps),
        "first_step_runs": first_steps,
        "help_runs": helps,
    }


def tli_train(flags: list[str]) -> str:
    """Standard output of ``python -m tli.train`` with these flags, run to its end in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tli.train", *flags], cwd=record.ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise TliError("python -m tli.train", "the run must end well", done.stderr.strip()[-200:], "run it by hand to see why")
    return done.stdout


def goals(steps: list[dict], peaks: list[dict], begun: dict) -> list[dict]:
    """Each goal with what was got."""
    rows = []

    def add(goal: str, bound: float, got: float, at_least: bool) -> None:
        rows.append({"goal": goal, "bound": bound, "got": got, "met": got >= bound if at_least else got <= bound})

    for row in steps:
        if row["subject"] in ("peft-truncated", "peft-hook"):
            bound = 4 if row["subject"] == "peft-truncated" else 30
            add(f"times faster per step than {row['subject']}, batch {row['batch']}, at least", bound, row["ratio"], at_least=True)
    peak_of = {(row["subject"], row["batch"]): row["peak_bytes"] for row in peaks}
    for (name, batch), peak in peak_of.items():
        if name == "tli":
            add(f"of peft-truncated's peak memory, batch {batch}, at most", 0.6, peak / peak_of["peft-truncated", batch], at_least=False)
    add("seconds from the command to the first optimiser step, at most", 5, begun["first_step_seconds"], at_least=False)
    add("seconds of --help, at most", 0.5, begun["help_seconds"], at_least=False)
    return rows


def _show(console: Console, agreement: list[dict], steps: list[dict], reached: list[dict]) -> None:
    shown = Table("batch", "subject", "median s", "times tli's", "lowest", "highest", "loss off by", "gradient off by", title="one step")
    off = {(row["batch"], row["subject"]): row for row in agreement}
    for row in steps:
        errors = off.get((row["batch"], row["subject"]))
        ratios = [f"{row[name]:.2f}" for name in ("ratio", "ratio_low", "ratio_high")]
        agreed = [f"{errors[name]:.0e}" for name in ("loss_error", "gradient_error")] if errors else []
        shown.add_row(str(row["batch"]), row["subject"], f"{row['seconds']:.4f}", *ratios, *agreed)
    console.print(shown)
    shown = Table("goal", "bound", "got", "met", title="goals")
    for row in reached:
        shown.add_row(row["goal"], f"{row['bound']:g}", f"{row['got']:.2f}", "yes" if row["met"] else "no")
    console.print(shown)


def main() -> None:
    """The command."""
    config = parse(StepConfig, "bench.step")
    console = Console(width=140)
    load = {"before": os.getloadavg()}
    agreement, steps, peaks = [], [], []
    for one in train_configs(config):
        subjects = prepare(one)
        agreement += [{"batch": one.batch, **row} for row in agree(subjects)]
        console.print(f"batch {one.batch}: the subjects agree; timing {config.rounds} rounds")
        steps += [{"batch": one.batch, **row} for row in summary(interleave(subjects, config.rounds))]
        # the processes that are measured next should have the memory
        del subjects
        gc.collect()
    for one in train_configs(config):
        console.print(f"batch {one.batch}: memory")
        peaks += memory.measure(one, list(SUBJECTS))
    console.print("start")
    begun = start(config, config.runs)
    reached = goals(steps, peaks, begun)
    load["after"] = os.getloadavg()
    _show(console, agreement, steps, reached)
    console.print(memory.table(peaks))
    content = {
        "setting": as_dict(config),
        **record.material(train_configs(config)[0]),
        "load_average": load,
        "agreement": agreement,
        "step": steps,
        "memory": peaks,
        "start": begun,
        "goals": reached,
    }
    console.print("written:", str(record.write("step", content, pathlib.Path(config.results))))


if __name__ == "__main__":
    run_command(main)
