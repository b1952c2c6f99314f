"""``python -m bench.gpu.step FOLDER``: a training step of a large model on a GPU beside its peers', in one command of under nine minutes.

FOLDER is what ``python -m bench.synthetic --like llama-3-8b --blocks 0 FOLDER`` writes (16 GB). In rounds, each in a new random order:

    early    tli with bf16 weights and with NF4, recorded as CUDA graphs; tli step by step, without graphs
             peft, the first L blocks: bitsandbytes' NF4; bf16; bf16 through torch.compile
             peft + bitsandbytes, the whole model with a hook behind block L: the paper's way
    full     tli with NF4 and recomputed blocks; peft + bitsandbytes with its gradient checkpointing; both with the loss at the output

Of tli it also says where a step's time goes: the batch made, the GPU asked, the GPU's own time of a graph; and what a step takes where
steps follow one another as in training, batches made by another thread.

First losses must agree, or nothing is timed: to bf16's rounding among those that compute the same function. A contender's memory is what it
holds once it is built, and what its steps take at most on top, both as torch's allocator counts. The floor is the larger of two times:
the step's multiplications, counted, at the rate of a large bf16 product, and its weights, read forward and backward, at that of a copy.
Whatever the time ends is in the record all the same. ``--rehearse`` runs all of it on a CPU, where the numbers mean nothing.
"""

import dataclasses
import gc
import itertools
import json
import pathlib
import statistics
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import harness, record
from bench.gpu.card import card
from bench.large import step_work
from bench.peers.contenders import Contender, PeftBitsandbytes, PeftTruncated, Tli, truncated_config
from tli.config import TrainConfig
from tli.data.loader import prefetch
from tli.runtime.cli import argument, as_dict, option, parse
from tli.runtime.errors import TliError, run_command

# bf16 has eight bits of a number, and the sums run in other orders
LOSS_TOLERANCE = 0.02
_WARM_STEPS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuStepConfig:
    """Time a training step of a large model on this GPU beside peft + bitsandbytes."""

    folder: str = argument("a whole checkpoint of bench.synthetic")
    batch: int = option(64, "bench", "pairs per step")
    layer: int = option(2, "bench", "hidden state to align")
    rank: int = option(16, "bench", "LoRA rank, in all linear layers")
    rounds: int = option(9, "bench", "rounds of timed steps")
    seconds: float = option(500.0, "bench", "time for all of it; what it does not reach is left out")
    results: str = option(str(record.RESULTS.relative_to(record.ROOT)), "bench", "folder for the record")
    rehearse: bool = option(False, "bench", "run it on a CPU in float32, where times mean nothing")


class TliEager(Tli):
    """tli without graphs: what they are worth."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.stepper.use_cuda_graphs = False


class TliFull(Tli):
    """The full arm: adapters in all blocks, the loss at the output."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.pool = self.pool.for_layer("output")


class PeftTruncatedBitsandbytes(PeftBitsandbytes):
    """peft + bitsandbytes with the first L blocks alone."""

    name = "peft-bitsandbytes-truncated"

    def _build(self, folder: str) -> None:
        model = self._load(folder, **truncated_config(folder, self.config.layer))
        self.norm, model.norm = model.norm, nn.Identity()
        self.model = self._with_adapters(model)

    _states = PeftTruncated._states


class PeftCompiled(PeftTruncated):
    """peft truncated, compiled."""

    name = "peft-truncated-compiled"

    def _build(self, folder: str) -> None:
        super()._build(folder)
        self.model.compile()


class PeftFull(PeftBitsandbytes):
    """peft + bitsandbytes as a full fine-tuning: adapters in all blocks, gradient checkpointing, the loss at the output."""

    name = "peft-bitsandbytes-full"

    def _build(self, folder: str) -> None:
        model = self._load(folder, checkpointing=True)
        self.norm = nn.Identity()
        self.model = self._with_adapters(model, blocks=len(model.layers))

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


# name -> (class, options, contenders that compute the same function share a letter)
EARLY: dict[str, tuple[type[Contender], dict, str]] = {
    "tli bf16": (Tli, {"weights": "full"}, "a"),
    "tli bf16, no graphs": (TliEager, {"weights": "full"}, "a"),
    "tli NF4": (Tli, {"weights": "nf4"}, "b"),
    "peft truncated bf16": (PeftTruncated, {}, "a"),
    "peft + bitsandbytes truncated": (PeftTruncatedBitsandbytes, {}, "b"),
    "peft truncated bf16 compiled": (PeftCompiled, {}, "a"),
    "peft + bitsandbytes whole, hook": (PeftBitsandbytes, {}, "b"),
}
FULL: dict[str, tuple[type[Contender], dict, str]] = {
    "tli full NF4, recomputed": (TliFull, {"arm": "full", "weights": "nf4", "checkpointing": True}, "c"),
    "peft + bitsandbytes full, checkpointing": (PeftFull, {}, "c"),
}
GOALS = (
    ("times faster than peft + bitsandbytes, whole", "peft + bitsandbytes whole, hook", 60),
    ("times faster than peft + bitsandbytes, truncated", "peft + bitsandbytes truncated", 8),
    ("times faster than peft truncated, compiled, bf16", "peft truncated bf16 compiled", 3),
)


class Watch:
    """How much of the time is left."""

    def __init__(self, seconds: float):
        self.ends = time.monotonic() + seconds

    def left(self) -> float:
        return self.ends - time.monotonic()


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


def build(name: str, kinds: dict, config: TrainConfig, device: torch.device) -> tuple[Contender, dict]:
    """A contender that took its first steps, and what is known of it so far: its first loss, memory, seconds of loading."""
    contender_class, options, function = kinds[name]
    gc.collect()
    before, began = allocated(device), time.monotonic()
    contender = contender_class(dataclasses.replace(config, **options))
    nodes = {"nodes": contender.nodes()} if isinstance(contender, Tli) else {}
    settled(device)
    loaded = time.monotonic() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    held = allocated(device) - before
    losses = [contender.step() for _ in range(_WARM_STEPS)]
    settled(device)
    peak = allocated(device, peak=True) - before
    return contender, {
        "subject": name,
        "function": function,
        "losses": losses,
        "load_seconds": loaded,
        "held_bytes": held,
        "peak_bytes": peak,
        **nodes,
    }


def agree(rows: list[dict]) -> None:
    """Raise ``TliError`` unless those that compute the same function begin with the same loss."""
    for function in {row["function"] for row in rows}:
        first = {row["subject"]: row["losses"][0] for row in rows if row["function"] == function}
        low, high = min(first.values()), max(first.values())
        # not > so that a NaN fails, too
        if not high - low <= LOSS_TOLERANCE * abs(high):
            raise TliError(
                "losses", f"the same function must begin with the same loss, to {LOSS_TOLERANCE:g}", first, "find out which is wrong"
            )


def interleave(contenders: dict[str, Contender], rounds: int, device: torch.device, watch: Watch) -> dict[str, list[float]]:
    """Seconds of each contender's step in each round that the time allows; each waits for the GPU before and after."""
    seconds = {name: [] for name in contenders}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        if watch.left() < 0:
            break
        for name in order.permutation(list(contenders)):
            settled(device)
            began = time.perf_counter()
            contenders[name].step()
            settled(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def inside(tli: Tli, device: torch.device, steps: int = 24) -> dict:
    """Seconds (medians) of the parts of a step, each waited for, and of a step among others as in training."""
    parts: dict[str, list[float]] = {"batch": [], "asking": [], "waiting": []}
    for _ in range(steps):
        settled(device)
        times = [time.perf_counter()]
        ((micro_batches, false_negatives),) = tli.batches.epoch(tli.taken)
        times.append(time.perf_counter())
        tli.stepper(tli.taken, micro_batches, false_negatives)
        times.append(time.perf_counter())
        list(tli.stepper.pop_results(wait=True))
        settled(device)
        times.append(time.perf_counter())
        tli.taken += 1
        for part, begin, end in zip(parts, times, times[1:]):
            parts[part].append(end - begin)
    began = time.perf_counter()
    for micro_batches, false_negatives in prefetch(itertools.islice(tli.batches.steps(tli.taken), steps), device):
        tli.stepper(tli.taken, micro_batches, false_negatives)
        list(tli.stepper.pop_results())
        tli.taken += 1
    list(tli.stepper.pop_results(wait=True))
    settled(device)
    in_training = (time.perf_counter() - began) / steps
    graphs = [_replayed(captured.graph) for captured in tli.stepper.graphs.values()]
    medians = {part: statistics.median(seconds) for part, seconds in parts.items()}
    return {**medians, "in_training": in_training, "graphs": len(graphs), "graph": statistics.median(graphs) if graphs else None}


def _replayed(graph: torch.cuda.CUDAGraph, times: int = 20) -> float:
    """The GPU's seconds for a graph, replayed without a gap."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def measured(kinds: dict, config: TrainConfig, rounds: int, device: torch.device, watch: Watch, console: Console) -> list[dict]:
    """Each contender's row: losses, memory, and its seconds in the rounds. One that fails, or for which no time is left, says so."""
    contenders, rows = {}, []
    for name in kinds:
        if watch.left() < 60 and rows:
            rows.append({"subject": name, "failed": "no time was left"})
            continue
        try:
            contenders[name], row = build(name, kinds, config, device)
        except Exception as error:
            # a peer that does not run here must not take the others with it
            row = {"subject": name, "failed": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row)
        console.print(
            name, row.get("failed") or f"loss {row['losses'][0]:.4f}, {row['peak_bytes'] / 1e9:.2f} GB, {watch.left():.0f} s left"
        )
    agree([row for row in rows if "failed" not in row])
    seconds = interleave(contenders, rounds, device, watch)
    for row in rows:
        if seconds.get(row["subject"]):
            row |= {"rounds": seconds[row["subject"]], "seconds": statistics.median(seconds[row["subject"]])}
    for row in rows:
        if "seconds" in row and isinstance(contender := contenders[row["subject"]], Tli) and watch.left() > 0:
            row["inside"] = inside(contender, device)
            told = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in row["inside"].items() if isinstance(value, float))
            console.print(f"inside {row['subject']}: {told}", markup=False, soft_wrap=True)
    return rows


def floor(config: TrainConfig, nodes: int, device: torch.device) -> dict:
    """The least that a step can take: its multiplications at the rate of a large product, or its weights at that of a copy."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    flops, weights = step_work(config, nodes)
    rate = 2 * size**3 / _best(lambda: a @ b, device)
    copied = 2 * a.nbytes / _best(lambda: b.copy_(a), device)
    by_rate, by_copy = flops / rate, 2 * weights * dtype.itemsize / copied
    return {"flops": flops, "flops_per_second": rate, "bytes_per_second": copied, "weights": weights, "seconds": max(by_rate, by_copy)}


def _best(run, device: torch.device) -> float:
    seconds = []
    for _ in range(10):
        settled(device)
        began = time.perf_counter()
        run()
        settled(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def goals(rows: list[dict], full: list[dict], least: dict | None) -> list[dict]:
    """Each goal with what was got; None where a contender did not run."""
    of = {row["subject"]: row for row in [*rows, *full] if "seconds" in row}
    found = []

    def add(*told, at_least: bool) -> None:
        found.append(harness.goal(*told, at_least=at_least))

    def ratio(name: str, ours: str, what: str) -> float | None:
        # a CPU's allocator counts nothing
        return of[name][what] / of[ours][what] if name in of and ours in of and of[ours][what] else None

    best = min((name for name in ("tli bf16", "tli NF4") if name in of), key=lambda name: of[name]["seconds"], default="")
    for goal, peer, bound in GOALS:
        add(goal, bound, ratio(peer, best, "seconds"), at_least=True)
    if least:
        add("times the floor, at most", 2, of[best]["seconds"] / least["seconds"] if best else None, at_least=False)
    add("GB of memory in NF4, at most", 0.5, of["tli NF4"]["peak_bytes"] / 1e9 if "tli NF4" in of else None, at_least=False)
    add("of the whole peer's memory, at most", 0.1, ratio("tli NF4", "peft + bitsandbytes whole, hook", "peak_bytes"), at_least=False)
    ours, peer = FULL
    add("full arm: times faster than peft + bitsandbytes", 1.5, ratio(peer, ours, "seconds"), at_least=True)
    add("full arm: of peft + bitsandbytes's memory, at most", 1, ratio(ours, peer, "peak_bytes"), at_least=False)
    return found


def tables(rows: list[dict], full: list[dict], least: dict | None, reached: list[dict]) -> list[Table]:
    """Both arms, and the goals."""
    shown = []
    for title, part in (("one step, early arm", rows), ("one step, full arm", full)):
        own = next((row["seconds"] for row in part if "seconds" in row), None)
        table = Table("", "ms (median)", "times tli's", "held, GB", "at most, GB", "loading, s", title=title)
        for row in part:
            if "seconds" not in row:
                table.add_row(row["subject"], row.get("failed", "not timed"))
                continue
            sizes = [f"{row[key] / 1e9:.2f}" for key in ("held_bytes", "peak_bytes")]
            table.add_row(
                row["subject"], f"{row['seconds'] * 1e3:.2f}", f"{row['seconds'] / own:.2f}", *sizes, f"{row['load_seconds']:.0f}"
            )
        if least and part is rows:
            table.add_row("floor", f"{least['seconds'] * 1e3:.2f}")
        shown.append(table)
    return [*shown, harness.goals_table(reached)]


def main() -> None:
    """The command."""
    config, console = parse(GpuStepConfig, "bench.gpu.step"), Console(width=140)
    if not (torch.cuda.is_available() or config.rehearse):
        raise TliError(
            "bench.gpu.step", "there must be a GPU to measure", "none that torch sees", "run it where one is, or --rehearse it here"
        )
    device = torch.device("cpu" if config.rehearse else "cuda")
    folder = record.ROOT / "runs" / "rehearsal" if config.rehearse else pathlib.Path(config.results)
    run = {"device": str(device), "dtype": "float32" if config.rehearse else "bfloat16", "warmup": 0, "schedule": "constant"}
    train = TrainConfig(model=config.folder, layer=config.layer, rank=config.rank, batch=config.batch, dropout=0.0, epochs=10_000, **run)
    watch, least, rows, full = Watch(config.seconds), None, [], []
    content = {"setting": as_dict(config), "model": json.loads((pathlib.Path(config.folder) / "config.json").read_text())}
    try:
        rows = measured(EARLY, train, config.rounds, device, watch, console)
        nodes = next((row["nodes"] for row in rows if "nodes" in row), None)
        least = floor(train, nodes, device) if nodes else None
        gc.collect()
        full = measured(FULL, train, config.rounds, device, watch, console)
    finally:
        reached = goals(rows, full, least)
        for table in tables(rows, full, least, reached):
            console.print(table)
        content |= {"card": card(device), "early": rows, "full": full, "floor": least, "goals": reached}
        console.print("written:", str(record.write("gpu-step", content, folder)))


if __name__ == "__main__":
    run_command(main)
