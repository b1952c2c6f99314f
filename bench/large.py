"""``python -m bench.large FOLDER``: a step on a model of 8B's shape, beside peft + bitsandbytes with the whole model. Linux, a CPU.

FOLDER is what ``python -m bench.synthetic --like llama-3-8b --blocks 0 FOLDER`` writes (16 GB). Each contender has a process of its own:

    tli                         the first L blocks in the dtype that training chooses here
    tli-float32                 the same in float32
    tli-nf4, tli-nf4-float32    both, packed in NF4
    peft-bitsandbytes           the whole model in NF4 with peft's LoRA in the first L blocks, a hook behind block L: the paper's way; it
                                computes in float32
    peft-bitsandbytes-bfloat16  the same, computing in bfloat16

A process reports the loss of each step, its seconds, and its peak memory: all that was resident (VmHWM), and the part of it that is its
own (RssAnon, looked at every 20 ms), since pages of a mapped checkpoint leave when somebody needs the room. tli-nf4-float32 and
peft-bitsandbytes compute the same function, so their first losses must agree; the others differ from them by rounding, and are shown. The
floor is the step's multiplications, counted, at the rate at which this machine multiplies large matrices of tli's dtype. One record goes to
``bench/results/``.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from bench import record
from bench.harness import MemoryWatch, call_in_process, chosen, dtypes, resident, results_option
from tli.config import TrainConfig
from tli.runtime.cli import argument, as_dict, option, parse
from tli.runtime.errors import TliError, run_command

# name -> which contender, its weights, its dtype (None: what training chooses), and the timed steps; a peer's forward takes minutes
CONTENDERS = {
    "tli": ("tli", "full", None, 5),
    "tli-float32": ("tli", "full", "float32", 5),
    "tli-nf4": ("tli", "nf4", None, 3),
    "tli-nf4-float32": ("tli", "nf4", "float32", 3),
    "peft-bitsandbytes": ("peft-bitsandbytes", "nf4", "float32", 1),
    "peft-bitsandbytes-bfloat16": ("peft-bitsandbytes", "nf4", "bfloat16", 1),
}
LOSS_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargeConfig:
    """Time one training step of a large model on this CPU, beside peft + bitsandbytes."""

    folder: str = argument("a checkpoint of bench.synthetic")
    batch: int = option(64, "bench", "pairs per step")
    layer: int = option(2, "bench", "hidden state to align")
    rank: int = option(16, "bench", "LoRA rank, in all linear layers")
    subjects: str = option(",".join(CONTENDERS), "bench", "a comma list of these")
    results: str = results_option()


def measure(name: str, config: TrainConfig, warm: int, steps: int) -> dict:
    """What a process of the contender ``tli`` or ``peft-bitsandbytes`` says of itself: ``warm`` untimed steps, then ``steps``."""
    return call_in_process(name, measure_here, name, json.dumps(as_dict(config)), str(warm), str(steps))


def measure_here(name: str, config: str, warm: str, steps: str) -> None:
    """What the process of one contender does."""
    from bench.peers.contenders import PeftBitsandbytes, Tli

    contender_class = {contender.name: contender for contender in (Tli, PeftBitsandbytes)}[name]
    with MemoryWatch("RssAnon") as own:
        contender_class.imports()
        began = time.monotonic()
        contender = contender_class(TrainConfig(**json.loads(config)))
        loaded = time.monotonic() - began
        losses, seconds = [], []
        for _ in range(int(warm) + int(steps)):
            began = time.monotonic()
            losses.append(contender.step())
            seconds.append(time.monotonic() - began)
    facts = {"losses": losses, "seconds": seconds[int(warm) :], "load_seconds": loaded}
    facts |= {"peak_bytes": resident("VmHWM"), "own_peak_bytes": own.most}
    print(json.dumps(facts | {"nodes": contender.nodes() if name == "tli" else None}))


def step_work(config: TrainConfig, nodes: int) -> tuple[int, int]:
    """The fewest floating-point operations of a step on so many nodes, and the weights that they multiply with.

    Each weight multiplies each node once forward and once backward, but block 0's q, k and v, whose products are looked up by token and
    into which no gradient goes; adapters, attention and norms are left out.
    """
    from tli.model.checkpoint import open_checkpoint
    from tli.model.starter import starter_folder

    shape = open_checkpoint(config.model or str(starter_folder())).config
    width, hidden = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.head_dim * shape.num_attention_heads, shape.head_dim * shape.num_key_value_heads
    block = 2 * width * queries + 2 * width * keys + 3 * width * hidden
    weights = config.layer * block - width * (queries + 2 * keys)
    return 4 * nodes * weights, weights


def floor(config: TrainConfig, nodes: int) -> dict:
    """``step_work`` and how long it takes where nothing else is to be done: at ``product_rate`` of the config's dtype."""
    from tli.runtime.device import resolve_device

    flops, _ = step_work(config, nodes)
    rate = product_rate(resolve_device(config.device, config.dtype).dtype)
    return {"flops": flops, "flops_per_second": rate, "seconds": flops / rate}


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best of ten products of 1024 x 4096 x 4096."""
    from tli.runtime import cpu, ops

    multiply = ops.on_cpu(cpu.ways().matmul_for(dtype)).linear
    x, weight = torch.randn(1024, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
    seconds = []
    # the first one makes oneDNN's program
    for _ in range(11):
        began = time.monotonic()
        multiply(x, weight)
        seconds.append(time.monotonic() - began)
    return 2 * 1024 * 4096 * 4096 / min(seconds[1:])


def agree(rows: list[dict]) -> None:
    """Raise ``TliError`` unless those that compute the same function begin with the same loss."""
    first = {row["subject"]: row["losses"][0] for row in rows}
    if {"tli-nf4-float32", "peft-bitsandbytes"} <= first.keys():
        ours, theirs = first["tli-nf4-float32"], first["peft-bitsandbytes"]
        if abs(ours - theirs) > LOSS_TOLERANCE * abs(theirs):
            raise TliError("losses", f"both must begin with the same loss, to {LOSS_TOLERANCE}", f"{ours} and {theirs}", "find out why")


def main() -> None:
    """The command."""
    config = parse(LargeConfig, "bench.large")
    console, names = Console(width=120), chosen("--subjects", config.subjects.split(","), list(CONTENDERS))
    settings = {"model": config.folder, "layer": config.layer, "rank": config.rank, "batch": config.batch, "device": "cpu"}
    fastest = dtypes("cpu")[-1]
    rows = []
    for name in names:
        which, weights, dtype, steps = CONTENDERS[name]
        train = TrainConfig(**settings, weights=weights, dtype=dtype or fastest, dropout=0.0, warmup=0, schedule="constant")
        facts = measure(which, train, warm=int(which == "tli"), steps=steps)
        rows.append({"subject": name, "dtype": dtype or fastest, **facts})
        console.print(f"{name}: {statistics.median(facts['seconds']):.2f} s, loss {facts['losses'][0]:.6f}")
    agree(rows)
    nodes = next((row["nodes"] for row in rows if row["nodes"]), None)
    least = floor(TrainConfig(**settings, dtype=fastest), nodes) if nodes else None
    console.print(_table(rows, least))
    content = {"setting": as_dict(config), "model": json.loads((pathlib.Path(config.folder) / "config.json").read_text())}
    path = record.write("large", content | {"rows": rows, "floor": least}, pathlib.Path(config.results))
    console.print("written:", str(path))


def _table(rows: list[dict], least: dict | None) -> Table:
    shown = Table(title="one step, seconds (median) and peak memory")
    for column in ("", "dtype", "loss", "seconds", "times tli's", "resident, GB", "own, GB", "times tli's", "loading, s"):
        shown.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    own = rows[0]
    for row in rows:
        median = statistics.median(row["seconds"])
        ratios = median / statistics.median(own["seconds"]), row["own_peak_bytes"] / own["own_peak_bytes"]
        peaks = [f"{row[key] / 1e9:.2f}" for key in ("peak_bytes", "own_peak_bytes")]
        cells = [f"{median:.2f}", f"{ratios[0]:.2f}", *peaks, f"{ratios[1]:.2f}"]
        shown.add_row(row["subject"], row["dtype"], f"{row['losses'][0]:.5f}", *cells, f"{row['load_seconds']:.0f}")
    if least:
        ratio = least["seconds"] / statistics.median(own["seconds"])
        shown.add_row("floor", own["dtype"], "", f"{least['seconds']:.2f}", f"{ratio:.2f}", "", "", "", "")
    return shown


if __name__ == "__main__":
    run_command(main)
