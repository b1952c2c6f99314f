"""``python -m bench.step``: tli's training step beside its peers', and their memory.

First all subjects must agree in float32, in loss and in every adapter's gradient, and in the loss after a step; else nothing is timed.
Then each is timed in float32 and, where tli would train in another dtype here, in that one, too; how far it then is from float32 stands
beside. Rounds take one step of every subject in every dtype, and a second one of tli's own, in a new random order, so whatever else the
machine does falls on all alike. A ratio is the median over rounds of (its seconds / the seconds of tli in its default dtype in the same
round); that of ``tli again`` would be 1 on a silent machine, and its spread is the noise that the others carry, too. A goal is judged
by each peer's faster dtype.

Memory is measured in processes of their own. One record of it all goes to ``bench/results/``.
"""

import dataclasses
import gc
import os
import pathlib
import statistics
import time
import typing

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import memory, record
from bench.peers.subjects import SUBJECTS, Subject
from tli.config import TrainConfig
from tli.runtime.cli import as_dict, option, parse
from tli.runtime.device import place
from tli.runtime.errors import TliError, run_command

AGAIN = "tli again"
# times faster per step than each, at least
GOALS = {"peft-truncated": 5, "peft-hook": 40, "sentence-transformers": 5}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
# B starts at zero, which would leave A without a gradient to compare
_START_OF_B = 0.02

# a subject and its dtype
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Compare tli's training step with peft's, truncated and whole, and with sentence-transformers'."""

    batches: str = option("64,128,256", "bench", "pairs per step, a comma list")
    layer: int = option(2, "bench", "hidden state to align")
    rank: int = option(16, "bench", "LoRA rank")
    targets: str = option("all-linear", "bench", "all-linear, or a comma list of linear layers")
    loss: typing.Literal["infonce", "hinge"] = option("infonce", "bench", "infonce or hinge")
    subjects: str = option(",".join(SUBJECTS), "bench", "a comma list of these; what is not installed is left out")
    rounds: int = option(9, "bench", "rounds of timed steps")
    device: str = option("cpu", "bench", "cpu, cuda or cuda:N")
    model: str | None = option(None, "bench", "checkpoint (default: the starter)")
    pairs: str | None = option(None, "bench", "word pairs (default: the shipped list)")
    results: str = option(str(record.RESULTS.relative_to(record.ROOT)), "bench", "folder for the record")


def train_configs(config: StepConfig) -> list[TrainConfig]:
    """One training configuration in float32 for each batch."""
    try:
        batches = [int(batch) for batch in config.batches.split(",")]
    except ValueError:
        raise TliError("--batches", "the value must be a comma list of numbers", repr(config.batches), "write, say, 64,128") from None
    same = {name: getattr(config, name) for name in ("model", "pairs", "layer", "rank", "targets", "loss", "device")}
    # the learning rate is lr at every step, as the peers have it
    return [TrainConfig(**same, dropout=0.0, warmup=0, schedule="constant", dtype="float32", batch=batch) for batch in batches]


def taking_part(config: StepConfig) -> tuple[list[str], list[str]]:
    """The subjects that are to be measured, tli first, and those that are wanted and not installed."""
    names = ["tli", *(name for name in config.subjects.split(",") if name != "tli")]
    if unknown := [name for name in names if name not in SUBJECTS]:
        raise TliError("--subjects", f"each must be one of {', '.join(SUBJECTS)}", ", ".join(unknown), "choose among these")
    return [name for name in names if SUBJECTS[name].installed()], [name for name in names if not SUBJECTS[name].installed()]


def dtypes(device: str) -> list[str]:
    """The dtypes that are timed, tli's default last: float32, and the one that training chooses here, where that is another."""
    return list(dict.fromkeys(["float32", str(place(device, "fastest").dtype).removeprefix("torch.")]))


def prepare(config: TrainConfig, names: list[str]) -> dict[str, Subject]:
    """These subjects, all with the same adapters: tli's A, and a small random B."""
    distinct = "sentence-transformers" in names
    subjects = {name: SUBJECTS[name](config, distinct) for name in names}
    generator = torch.Generator().manual_seed(config.seed)
    start = {
        path: (a.detach().clone(), torch.randn(b.shape, generator=generator) * _START_OF_B)
        for path, (a, b) in subjects["tli"].adapters().items()
    }
    for subject in subjects.values():
        subject.start_from(start)
    return subjects


@dataclasses.dataclass(frozen=True)
class _Probe:
    """What a subject computes: its loss, its gradients, and its loss after a step."""

    loss: float
    gradients: dict[tuple[str, int], Tensor]
    loss_after_step: float


def agree(subjects: dict[str, Subject], rounded: dict[str, Subject] | None = None) -> list[dict]:
    """How far each subject is from tli, relatively: in its loss, its worst gradient, and its loss after a step.

    Args:
        subjects:  all of them in float32, tli among them
        rounded:   the same in another dtype: they are compared with float32's tli, too, and not judged

    Raises:
        TliError: one of ``subjects`` that is further than 1e-4 in a loss or 1e-3 in a gradient.
    """
    probes = {name: _probe(subject) for name, subject in subjects.items()}
    rows = [_errors(subjects[name], probe, probes["tli"]) for name, probe in probes.items()]
    for row in rows:
        for error in ("loss_error", "gradient_error", "loss_after_step_error"):
            tolerance = GRADIENT_TOLERANCE if error == "gradient_error" else LOSS_TOLERANCE
            # not <= so that a NaN fails, too
            if not row[error] <= tolerance:
                must = f"{error.replace('_', ' ')} against tli must be at most {tolerance:g}"
                raise TliError(row["subject"], must, f"{row[error]:.2g}", "find out which is wrong: nothing is timed before they agree")
    return rows + [_errors(subject, _probe(subject), probes["tli"]) for subject in (rounded or {}).values()]


def _probe(subject: Subject) -> _Probe:
    loss = subject.loss()
    loss.backward()
    gradients = {(path, i): factor.grad.clone() for path, pair in subject.adapters().items() for i, factor in enumerate(pair)}
    subject.step()
    with torch.no_grad():
        return _Probe(loss.item(), gradients, subject.loss().item())


def _errors(subject: Subject, probe: _Probe, truth: _Probe) -> dict:
    worst = max(((probe.gradients[key].float() - own).norm() / own.norm()).item() for key, own in truth.gradients.items())
    return {
        "subject": subject.name,
        "dtype": subject.config.dtype,
        "loss": probe.loss,
        "loss_after_step": probe.loss_after_step,
        "loss_error": abs(probe.loss / truth.loss - 1),
        "gradient_error": worst,
        "loss_after_step_error": abs(probe.loss_after_step / truth.loss_after_step - 1),
    }


def interleave(subjects: dict[Key, Subject], rounds: int, own: Key) -> dict[Key, list[float]]:
    """Seconds of each subject's step in each round; ``tli again`` is the second step of ``own`` in the round."""
    turns = {**subjects, (AGAIN, own[1]): subjects[own]}
    seconds, keys = {key: [] for key in turns}, list(turns)
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for number in order.permutation(len(keys)):
            began = time.perf_counter()
            turns[keys[number]].step()
            if torch.cuda.is_available():
                # a GPU's optimiser may still be at it
                torch.cuda.synchronize()
            seconds[keys[number]].append(time.perf_counter() - began)
    return seconds


def summary(seconds: dict[Key, list[float]], own: Key) -> list[dict]:
    """Median seconds of each subject, and the median, lowest and highest of its rounds' ratios to those of ``own``."""
    rows = []
    for (name, dtype), mine in seconds.items():
        ratios = [its / tli for its, tli in zip(mine, seconds[own], strict=True)]
        ratio = {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
        rows.append({"subject": name, "dtype": dtype, "seconds": statistics.median(mine), **ratio, "rounds": mine})
    return rows


def measure(config: TrainConfig, names: list[str], rounds: int) -> tuple[list[dict], list[dict]]:
    """Agreement and timed steps of one batch: every subject in every dtype of ``dtypes``."""
    kinds = dtypes(config.device)
    prepared = {dtype: prepare(dataclasses.replace(config, dtype=dtype), names) for dtype in kinds}
    agreement = agree(prepared["float32"], prepared[kinds[-1]] if len(kinds) > 1 else None)
    subjects = {(name, dtype): subject for dtype, made in prepared.items() for name, subject in made.items()}
    own = ("tli", kinds[-1])
    steps = summary(interleave(subjects, rounds, own), own)
    return [{"batch": config.batch, **row} for row in agreement], [{"batch": config.batch, **row} for row in steps]


def goals(steps: list[dict], peaks: list[dict]) -> list[dict]:
    """Each goal with what was got, each peer at its best dtype."""
    rows = []

    def add(goal: str, bound: float, got: float, at_least: bool) -> None:
        rows.append({"goal": goal, "bound": bound, "got": got, "met": got >= bound if at_least else got <= bound})

    for batch in dict.fromkeys(row["batch"] for row in steps):
        for name, bound in GOALS.items():
            ratios = [row["ratio"] for row in steps if (row["batch"], row["subject"]) == (batch, name)]
            if ratios:
                add(f"times faster per step than {name}, batch {batch}, at least", bound, min(ratios), at_least=True)
    for batch in dict.fromkeys(row["batch"] for row in peaks):
        of = {name: [row["peak_bytes"] for row in peaks if (row["batch"], row["subject"]) == (batch, name)] for name in GOALS | {"tli": 0}}
        if of["tli"] and of["peft-truncated"]:
            # tli's default dtype comes last
            share = of["tli"][-1] / min(of["peft-truncated"])
            add(f"of peft-truncated's peak memory, batch {batch}, at most", 0.6, share, at_least=False)
    return rows


def show(console: Console, agreement: list[dict], steps: list[dict], reached: list[dict], missing: list[str]) -> None:
    """Print the tables of a session."""
    shown = Table(
        "batch", "subject", "dtype", "median s", "times tli's", "lowest", "highest", "loss", "off by", "gradient", title="one step"
    )
    off = {(row["batch"], row["subject"], row["dtype"]): row for row in agreement}
    for row in steps:
        errors = off.get((row["batch"], row["subject"], row["dtype"]))
        ratios = [f"{row[name]:.2f}" for name in ("ratio", "ratio_low", "ratio_high")]
        agreed = [f"{errors['loss']:.5f}", *(f"{errors[name]:.0e}" for name in ("loss_error", "gradient_error"))] if errors else []
        shown.add_row(str(row["batch"]), row["subject"], row["dtype"], f"{row['seconds']:.4f}", *ratios, *agreed)
    for name in missing:
        shown.add_row("", name, "not installed")
    console.print(shown)
    shown = Table("goal", "bound", "got", "met", title="goals")
    for row in reached:
        shown.add_row(row["goal"], f"{row['bound']:g}", f"{row['got']:.2f}", "yes" if row["met"] else "no")
    console.print(shown)


def main() -> None:
    """The command."""
    config = parse(StepConfig, "bench.step")
    console = Console(width=140)
    names, missing = taking_part(config)
    load = {"before": os.getloadavg()}
    agreement, steps, peaks = [], [], []
    for one in train_configs(config):
        console.print(f"batch {one.batch}: agreement, then {config.rounds} rounds of {', '.join(names)}")
        rows = measure(one, names, config.rounds)
        agreement += rows[0]
        steps += rows[1]
        # the processes that are measured next should have the memory
        gc.collect()
    for one in train_configs(config):
        console.print(f"batch {one.batch}: memory")
        peaks += [row for dtype in dtypes(one.device) for row in memory.measure(dataclasses.replace(one, dtype=dtype), names)]
    reached = goals(steps, peaks)
    load["after"] = os.getloadavg()
    show(console, agreement, steps, reached, missing)
    console.print(memory.table(peaks))
    content = {
        "setting": as_dict(config),
        **record.material(train_configs(config)[0]),
        "load_average": load,
        "not_installed": missing,
        "agreement": agreement,
        "step": steps,
        "memory": peaks,
        "goals": reached,
    }
    console.print("written:", str(record.write("step", content, pathlib.Path(config.results))))


if __name__ == "__main__":
    run_command(main)
