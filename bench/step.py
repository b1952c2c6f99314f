"""``python -m bench.step``: tli's training step beside its peers', and their memory.

First all contenders must agree in float32, in loss and in every adapter's gradient, and in the loss after a step; else nothing is timed.
Then each is timed in float32 and, where tli would train in another dtype here, in that one, too; how far it then is from float32 stands
beside. Rounds take one step of every contender in every dtype, and a second one of tli's own, in a new random order, so whatever else the
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

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import memory, record
from bench.harness import StepConfig, dtypes, goal, goals_table, ratios, train_configs, turns
from bench.peers.contenders import CONTENDERS, Contender, taking_part
from tli.config import TrainConfig
from tli.runtime.cli import as_dict, parse
from tli.runtime.errors import TliError, run_command

AGAIN = "tli again"
# times faster per step than each, at least
GOALS = {"peft-truncated": 5, "peft-hook": 40, "sentence-transformers": 5}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
# B starts at zero, which would leave A without a gradient to compare
_START_OF_B = 0.02

# a contender and its dtype
Key = tuple[str, str]


def prepare(config: TrainConfig, names: list[str]) -> dict[str, Contender]:
    """These contenders, all with the same adapters: tli's A, and a small random B."""
    distinct = "sentence-transformers" in names
    contenders = {name: CONTENDERS[name](config, distinct) for name in names}
    generator = torch.Generator().manual_seed(config.seed)
    start = {
        path: (a.detach().clone(), torch.randn(b.shape, generator=generator) * _START_OF_B)
        for path, (a, b) in contenders["tli"].adapters().items()
    }
    for contender in contenders.values():
        contender.start_from(start)
    return contenders


@dataclasses.dataclass(frozen=True)
class _Probe:
    """What a contender computes: its loss, its gradients, and its loss after a step."""

    loss: float
    gradients: dict[tuple[str, int], Tensor]
    loss_after_step: float


def agree(contenders: dict[str, Contender], rounded: dict[str, Contender] | None = None) -> list[dict]:
    """How far each contender is from tli, relatively: in its loss, its worst gradient, and its loss after a step.

    Args:
        contenders:  all of them in float32, tli among them
        rounded:   the same in another dtype: they are compared with float32's tli, too, and not judged

    Raises:
        TliError: one of ``contenders`` that is further than 1e-4 in a loss or 1e-3 in a gradient.
    """
    probes = {name: _probe(contender) for name, contender in contenders.items()}
    rows = [_errors(contenders[name], probe, probes["tli"]) for name, probe in probes.items()]
    for row in rows:
        for error in ("loss_error", "gradient_error", "loss_after_step_error"):
            tolerance = GRADIENT_TOLERANCE if error == "gradient_error" else LOSS_TOLERANCE
            # not <= so that a NaN fails, too
            if not row[error] <= tolerance:
                must = f"{error.replace('_', ' ')} against tli must be at most {tolerance:g}"
                raise TliError(row["subject"], must, f"{row[error]:.2g}", "find out which is wrong: nothing is timed before they agree")
    return rows + [_errors(contender, _probe(contender), probes["tli"]) for contender in (rounded or {}).values()]


def _probe(contender: Contender) -> _Probe:
    loss = contender.loss()
    loss.backward()
    gradients = {(path, i): factor.grad.clone() for path, pair in contender.adapters().items() for i, factor in enumerate(pair)}
    contender.step()
    with torch.no_grad():
        return _Probe(loss.item(), gradients, contender.loss().item())


def _errors(contender: Contender, probe: _Probe, truth: _Probe) -> dict:
    worst = max(((probe.gradients[key].float() - own).norm() / own.norm()).item() for key, own in truth.gradients.items())
    return {
        "subject": contender.name,
        "dtype": contender.config.dtype,
        "loss": probe.loss,
        "loss_after_step": probe.loss_after_step,
        "loss_error": abs(probe.loss / truth.loss - 1),
        "gradient_error": worst,
        "loss_after_step_error": abs(probe.loss_after_step / truth.loss_after_step - 1),
    }


def interleave(contenders: dict[Key, Contender], rounds: int, own: Key) -> dict[Key, list[float]]:
    """Seconds of each contender's step in each round; ``tli again`` is the second step of ``own`` in the round."""
    every = {**contenders, (AGAIN, own[1]): contenders[own]}
    seconds: dict[Key, list[float]] = {key: [] for key in every}
    for _, key in turns(list(every), rounds):
        began = time.perf_counter()
        every[key].step()
        if torch.cuda.is_available():
            # a GPU's optimiser may still be at it
            torch.cuda.synchronize()
        seconds[key].append(time.perf_counter() - began)
    return seconds


def summary(seconds: dict[Key, list[float]], own: Key) -> list[dict]:
    """Median seconds of each contender, and the median, lowest and highest of its rounds' ratios to those of ``own``."""
    return [
        {"subject": name, "dtype": dtype, "seconds": statistics.median(mine), **ratios(mine, seconds[own]), "rounds": mine}
        for (name, dtype), mine in seconds.items()
    ]


def measure(config: TrainConfig, names: list[str], rounds: int) -> tuple[list[dict], list[dict]]:
    """Agreement and timed steps of one batch: every contender in every dtype of ``dtypes``."""
    kinds = dtypes(config.device)
    prepared = {dtype: prepare(dataclasses.replace(config, dtype=dtype), names) for dtype in kinds}
    agreement = agree(prepared["float32"], prepared[kinds[-1]] if len(kinds) > 1 else None)
    contenders = {(name, dtype): contender for dtype, made in prepared.items() for name, contender in made.items()}
    own = ("tli", kinds[-1])
    steps = summary(interleave(contenders, rounds, own), own)
    return [{"batch": config.batch, **row} for row in agreement], [{"batch": config.batch, **row} for row in steps]


def goals(steps: list[dict], peaks: list[dict]) -> list[dict]:
    """Each goal with what was got, each peer at its best dtype."""
    rows = []
    for batch in dict.fromkeys(row["batch"] for row in steps):
        for name, bound in GOALS.items():
            found = [row["ratio"] for row in steps if (row["batch"], row["subject"]) == (batch, name)]
            if found:
                rows.append(goal(f"times faster per step than {name}, batch {batch}, at least", bound, min(found), at_least=True))
    for batch in dict.fromkeys(row["batch"] for row in peaks):
        of = {name: [row["peak_bytes"] for row in peaks if (row["batch"], row["subject"]) == (batch, name)] for name in GOALS | {"tli": 0}}
        if of["tli"] and of["peft-truncated"]:
            # tli's default dtype comes last
            share = of["tli"][-1] / min(of["peft-truncated"])
            rows.append(goal(f"of peft-truncated's peak memory, batch {batch}, at most", 0.6, share, at_least=False))
    return rows


def show(console: Console, agreement: list[dict], steps: list[dict], reached: list[dict], missing: list[str]) -> None:
    """Print the tables of a session."""
    shown = Table(
        "batch", "subject", "dtype", "median s", "times tli's", "lowest", "highest", "loss", "off by", "gradient", title="one step"
    )
    off = {(row["batch"], row["subject"], row["dtype"]): row for row in agreement}
    for row in steps:
        errors = off.get((row["batch"], row["subject"], row["dtype"]))
        times = [f"{row[name]:.2f}" for name in ("ratio", "ratio_low", "ratio_high")]
        agreed = [f"{errors['loss']:.5f}", *(f"{errors[name]:.0e}" for name in ("loss_error", "gradient_error"))] if errors else []
        shown.add_row(str(row["batch"]), row["subject"], row["dtype"], f"{row['seconds']:.4f}", *times, *agreed)
    for name in missing:
        shown.add_row("", name, "not installed")
    console.print(shown)
    console.print(goals_table(reached))


def main() -> None:
    """The command."""
    config = parse(StepConfig, "bench.step")
    console = Console(width=140)
    names, missing = taking_part(config.subjects.split(","))
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
