"""``python -m bench.command``: the whole command from shell to adapter, beside three scripts as a user of other libraries would write them.

``bench/peers/`` holds the scripts: peft with a model of L blocks, peft with the whole model and a hook, and sentence-transformers with
its Trainer. Each reads the same list of pairs, no two of which mean the same, takes the same number of steps of the same AdamW with
the same schedule and dropout, and writes a PEFT adapter; tli runs without its report, which none of them makes.

First each runs for one epoch in every dtype that is timed (``bench.step``); they must begin and end it at comparable losses, as near
as different orders, dropout and starts of A allow. Then come rounds of tli and of each script in its faster dtype, in random order.
Seconds are those of the process, from shell to exit; the peak is the kernel's high-water mark of its resident memory (VmHWM), looked at
every 20 ms.
"""

import csv
import dataclasses
import importlib.util
import os
import pathlib
import statistics
import sys
import tempfile

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import record
from bench.harness import Run, chosen, dtypes, goal, goals_table, ratios, results_option, run, turns
from bench.peers.contenders import CONTENDERS, distinct_pairs
from tli.config import TrainConfig
from tli.data import word_pairs
from tli.model.starter import starter_folder
from tli.runtime.cli import as_dict, option, parse
from tli.runtime.errors import TliError, run_command

SCRIPTS = {"peft-truncated": "peft_truncated", "peft-hook": "peft_hook", "sentence-transformers": "sentence_transformers_lora"}
# times faster than each, at least
GOALS = {"peft-truncated": 3, "peft-hook": 20, "sentence-transformers": 3}
LOSS_TOLERANCE = 0.05

# what is trained, and what is held out
Lists = tuple[pathlib.Path, pathlib.Path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """Time python -m tli.train from shell to adapter beside scripts that use peft and sentence-transformers."""

    runs: int = option(5, "bench", "timed runs of each")
    epochs: int = option(3, "bench", "passes over the pairs")
    batch: int = option(128, "bench", "pairs per step")
    lr: float = option(1e-3, "bench", "peak learning rate; it falls to 0")
    warmup: int = option(5, "bench", "steps of linear warm-up")
    dropout: float = option(0.2, "bench", "dropout on the adapters' input")
    layer: int = option(2, "bench", "hidden state to align")
    rank: int = option(16, "bench", "LoRA rank, in all linear layers")
    limit: int | None = option(None, "bench", "take so many pairs (default: all that mean different things)")
    subjects: str = option(",".join(["tli", *SCRIPTS]), "bench", "a comma list of these; what is not installed is left out")
    model: str | None = option(None, "bench", "folder of a checkpoint (default: the starter)")
    pairs: str | None = option(None, "bench", "word pairs (default: the shipped list)")
    results: str = results_option()


def tli_train(flags: list[str]) -> Run:
    """``python -m tli.train`` with these flags, run to its end in a process of its own."""
    return run("python -m tli.train", [sys.executable, "-m", "tli.train", *flags])


def write_lists(pairs: list[word_pairs.Pair], folder: pathlib.Path, batch: int, limit: int | None = None, seed: int = 0) -> Lists:
    """Two lists of columns source and target: whole batches of pairs to train, no two of which mean the same, and some to hold out."""
    trained, held_out = word_pairs.split_pairs(pairs, 0.1, seed)
    numbers = distinct_pairs(trained, np.random.default_rng(seed).permutation(len(trained)))[:limit]
    # a last, smaller batch would be one in the scripts and spread over all by tli
    numbers = numbers[: len(numbers) // batch * batch]
    if len(numbers) == 0:
        raise TliError("--batch", f"the list must have as many pairs of different meaning as a batch, {batch}", 0, "choose a smaller batch")
    lists = folder / "pairs.tsv", folder / "held_out.tsv"
    for path, part in zip(lists, ([trained[i] for i in numbers], held_out)):
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, delimiter="\t", lineterminator="\n")
            rows.writerow(("source", "target"))
            rows.writerows((pair.source, pair.target) for pair in part)
    return lists


def command(
    name: str, dtype: str | None, config: CommandConfig, model: str, lists: tuple[pathlib.Path, pathlib.Path], output: str
) -> list[str]:
    """What is typed for a contender; ``dtype`` None leaves it to tli."""
    same = {key: getattr(config, key) for key in ("layer", "rank", "dropout", "epochs", "batch", "lr", "warmup")}
    flags = [f"--{key}={value}" for key, value in same.items()]
    if dtype is not None:
        flags.append(f"--dtype={dtype}")
    if name != "tli":
        script = record.ROOT / "bench" / "peers" / f"{SCRIPTS[name]}.py"
        return [sys.executable, str(script), model, str(lists[0]), output, *flags]
    words = [f"--pairs={lists[0]}", f"--held-out-pairs={lists[1]}", "--source=source", "--target=target"]
    # peft's start of A, too, and the loss alone, as the scripts have it
    own = ["--init=kaiming", "--recipe=contrastive", "--no-report", "--json", f"--model={model}", f"--output={output}"]
    return [sys.executable, "-m", "tli.train", *words, *own, *flags]


def losses(name: str, said: dict) -> dict:
    """Steps, first and last loss of what a contender printed."""
    said = said["training"] if name == "tli" else said
    return {key: said[key] for key in ("steps", "loss_first", "loss_last")}


def require_comparable(trials: list[dict]) -> None:
    """Raise ``TliError`` unless all took equally many steps from and to losses that differ by no more than their order can explain."""
    own = next(trial for trial in trials if trial["subject"] == "tli")
    for trial in trials:
        must = f"steps and losses must be tli's, losses to {LOSS_TOLERANCE:.0%}"
        near = all(abs(trial[key] / own[key] - 1) <= LOSS_TOLERANCE for key in ("loss_first", "loss_last"))
        if trial["steps"] != own["steps"] or not near:
            shown = [" ".join(f"{row[key]:g}" for key in ("steps", "loss_first", "loss_last")) for row in (trial, own)]
            raise TliError(trial["subject"], must, " against ".join(shown), "find out which is wrong: nothing is timed before they agree")


def installed(names: list[str]) -> tuple[list[str], list[str]]:
    """Those of the contenders that can run here, and the others."""
    chosen("--subjects", names, ["tli", *SCRIPTS])
    # its Trainer wants its data as one of these
    trainer = importlib.util.find_spec("datasets") is not None
    there = [name for name in names if CONTENDERS[name].installed() and (trainer or name != "sentence-transformers")]
    return there, [name for name in names if name not in there]


def main() -> None:
    """The command."""
    config = parse(CommandConfig, "bench.command")
    console, load = Console(width=120), {"before": os.getloadavg()}
    names, missing = installed(list(dict.fromkeys(["tli", *config.subjects.split(",")])))
    model = config.model or str(starter_folder())
    with tempfile.TemporaryDirectory() as folder:
        lists = write_lists(word_pairs.read_pairs(config.pairs, "swahili", "english"), pathlib.Path(folder), config.batch, config.limit)

        def once(name: str, dtype: str | None, number: int | str, config: CommandConfig = config) -> Run:
            done = run(name, command(name, dtype, config, model, lists, f"{folder}/{name}-{dtype}-{number}"))
            console.print(f"{name} {dtype or ''}: {done.seconds:.1f} s, {losses(name, done.said)}")
            return done

        trials = []
        for name in names:
            for dtype in [None] if name == "tli" else dtypes("cpu"):
                done = once(name, dtype, "trial", dataclasses.replace(config, epochs=1))
                facts = {"subject": name, "dtype": dtype, "seconds": done.seconds, "peak_bytes": done.peak_bytes}
                trials.append(facts | losses(name, done.said))
        require_comparable(trials)
        faster = {name: min((t for t in trials if t["subject"] == name), key=lambda t: t["seconds"])["dtype"] for name in names}
        rows = {name: {"subject": name, "dtype": faster[name], "runs": [], "peaks": []} for name in names}
        for number, name in turns(names, config.runs):
            done = once(name, faster[name], number)
            rows[name]["runs"].append(done.seconds)
            rows[name]["peaks"].append(done.peak_bytes)
            # equal seeds: the same in each run
            rows[name] |= losses(name, done.said)
    reached = goals(list(rows.values()))
    console.print(_table(list(rows.values()), missing))
    console.print(goals_table(reached))
    load["after"] = os.getloadavg()
    content = {"setting": as_dict(config), **record.material(TrainConfig(model=config.model, pairs=config.pairs)), "load_average": load}
    content |= {"not_installed": missing, "trials": trials, "command": list(rows.values()), "goals": reached}
    console.print("written:", str(record.write("command", content, pathlib.Path(config.results))))


def goals(rows: list[dict]) -> list[dict]:
    """Add each row's ratios to tli's seconds of the same round, and return the goals with what was got."""
    own = next(row for row in rows if row["subject"] == "tli")
    reached = []
    for row in rows:
        row |= {"seconds": statistics.median(row["runs"]), "peak_bytes": max(row["peaks"]), **ratios(row["runs"], own["runs"])}
        if (name := row["subject"]) in GOALS:
            reached.append(goal(f"times faster from shell to adapter than {name}, at least", GOALS[name], row["ratio"], at_least=True))
    return reached


def _table(rows: list[dict], missing: list[str]) -> Table:
    shown = Table("subject", "dtype", "median s", "times tli's", "lowest", "highest", "peak, MB", "loss", title="shell to adapter")
    for row in rows:
        times = [f"{row[key]:.2f}" for key in ("ratio", "ratio_low", "ratio_high")]
        last = [f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['loss_first']:.3f} -> {row['loss_last']:.3f}"]
        shown.add_row(row["subject"], row["dtype"] or "its own choice", f"{row['seconds']:.1f}", *times, *last)
    for name in missing:
        shown.add_row(name, "not installed")
    return shown


if __name__ == "__main__":
    run_command(main)
