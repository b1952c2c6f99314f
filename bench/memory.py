"""``python -m bench.memory``: the peak memory of each contender, each in a process of its own. Linux.

A process imports what its contender needs, builds it, and takes three steps of the optimiser; its peak is the kernel's
high-water mark of resident memory (VmHWM). ``ru_maxrss`` would not do: a process inherits that from the one that started it.
"""

import dataclasses
import json
import pathlib

from rich.console import Console
from rich.table import Table

from bench import record
from bench.harness import StepConfig, call_in_process, dtypes, resident, train_configs
from tli.config import TrainConfig
from tli.runtime.cli import as_dict, parse
from tli.runtime.errors import run_command

STEPS = 3
_MIB = 1 << 20


def measure(config: TrainConfig, names: list[str]) -> list[dict]:
    """Of each contender: resident bytes once its imports are done, once its model and batch are there, and at most."""
    # all take the same batch, and one of them cannot take every batch
    distinct = "sentence-transformers" in names
    return [{"subject": name, "dtype": config.dtype, "batch": config.batch, **_measure(config, name, distinct)} for name in names]


def _measure(config: TrainConfig, name: str, distinct: bool) -> dict:
    return call_in_process(f"memory of {name}", measure_here, name, json.dumps(as_dict(config)), "distinct" if distinct else "")


def measure_here(name: str, config: str, distinct: str) -> None:
    """What the process of one contender does."""
    from bench.peers.contenders import CONTENDERS

    contender_class = CONTENDERS[name]
    contender_class.imports()
    imported = resident("VmRSS")
    contender = contender_class(TrainConfig(**json.loads(config)), bool(distinct))
    built = resident("VmRSS")
    for _ in range(STEPS):
        contender.step()
    print(json.dumps({"imported_bytes": imported, "built_bytes": built, "peak_bytes": resident("VmHWM")}))


def table(rows: list[dict]) -> Table:
    """The rows of ``measure``, each peak beside its ratio to peft-truncated's, in its leaner dtype, at the same batch."""
    columns = ("batch", "subject", "dtype", "imports alone", "built", f"peak of {STEPS} steps", "of peft-truncated's")
    shown = Table(*columns, title="resident memory, MiB")
    truncated: dict[int, int] = {}
    for row in rows:
        if row["subject"] == "peft-truncated":
            truncated[row["batch"]] = min(row["peak_bytes"], truncated.get(row["batch"], row["peak_bytes"]))
    for row in rows:
        sizes = [f"{row[name] / _MIB:,.0f}" for name in ("imported_bytes", "built_bytes", "peak_bytes")]
        share = f"{row['peak_bytes'] / truncated[row['batch']]:.2f}" if row["batch"] in truncated else ""
        shown.add_row(str(row["batch"]), row["subject"], row["dtype"], *sizes, share)
    return shown


def main() -> None:
    """The command."""
    from bench.peers.contenders import taking_part

    config = parse(StepConfig, "bench.memory")
    names, _ = taking_part(config.subjects.split(","))
    settings = [dataclasses.replace(one, dtype=dtype) for one in train_configs(config) for dtype in dtypes(one.device)]
    rows = [row for one in settings for row in measure(one, names)]
    console = Console(width=140)
    console.print(table(rows))
    content = {"setting": as_dict(config), **record.material(settings[0]), "memory": rows}
    console.print("written:", str(record.write("memory", content, pathlib.Path(config.results))))


if __name__ == "__main__":
    run_command(main)
