"""``python -m bench.cost``: what a step costs as the work grows, in seconds and memory, beside the floor.

Four series, in each of which one thing changes: the layer, the rank, the pairs of a step (all three on the starter), and the model's
shape (two blocks of each of ``bench.synthetic``'s, written to a temporary folder one after the other, the smallest first). Each point is a
process of its own that takes its steps as ``tli.train`` would, in the dtype that it would choose; its floor is ``bench.large``'s: the
step's multiplications, counted, at the rate at which this machine multiplies large matrices of that dtype. One record goes to
``bench/results/``, and the figure of it to ``docs/cost.png``.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import tempfile
import typing

from rich.console import Console
from rich.table import Table

from bench import record, synthetic
from bench.harness import dtypes, results_option
from bench.large import floor, measure
from tli.config import MODELS, TrainConfig
from tli.reports.figures.style import save_figure
from tli.runtime.cli import as_dict, option, parse
from tli.runtime.errors import TliError, run_command

if typing.TYPE_CHECKING:
    import matplotlib.figure

SERIES = {
    "layer": ("layers", "layer L (blocks that are run)"),
    "rank": ("ranks", "LoRA rank, in all linear layers"),
    "batch": ("batches", "pairs per step"),
    "shape": ("shapes", "shape of the model, L = 2"),
}
# dark blue and orange: apart for colour-blind readers, and dark against light in grey
_SECONDS, _MEMORY = "#08519c", "#e6861a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Measure a training step's seconds and memory against layer, rank, pairs and model, and draw them."""

    layers: str = option("1,2,4,8,16,30", "bench", "layers, a comma list; empty leaves the series out")
    ranks: str = option("1,4,16,64,192", "bench", "ranks, likewise; the starter has room for 192")
    batches: str = option("16,64,256,1024,2048", "bench", "pairs per step, likewise")
    shapes: str = option("smollm2-135m,llama-3.2-1b,gemma-3-4b,qwen3-4b,llama-3-8b", "bench", "shapes of bench.synthetic, likewise")
    layer: int = option(2, "bench", "the layer where another thing changes")
    rank: int = option(16, "bench", "the rank there")
    batch: int = option(128, "bench", "the pairs there; 64 for the shapes")
    steps: int = option(5, "bench", "timed steps of each point, behind two that are not")
    figure: str = option("docs/cost.png", "bench", "the figure's file")
    results: str = results_option()


def points(config: CostConfig) -> list[tuple[str, int | str, TrainConfig]]:
    """Every point: its series, its place in it, and what is run; the shapes' models are yet to be written."""
    same = {"dropout": 0.0, "warmup": 0, "schedule": "constant", "device": "cpu", "dtype": dtypes("cpu")[-1]}
    usual = {name: getattr(config, name) for name in ("layer", "rank", "batch")}
    found = []
    for name, (flag, _) in SERIES.items():
        for place in filter(None, getattr(config, flag).split(",")):
            if name == "shape":
                if place not in MODELS:
                    raise TliError("--shapes", f"each must be one of {', '.join(MODELS)}", place, "choose among these")
                found.append((name, place, TrainConfig(**same, **usual | {"batch": 64})))
            else:
                try:
                    found.append((name, int(place), TrainConfig(**same, **usual | {name: int(place)})))
                except ValueError:
                    raise TliError(f"--{flag}", "the value must be a comma list of numbers", place, "write, say, 1,2") from None
    return found


def measured(series: str, place: int | str, config: TrainConfig, steps: int) -> dict:
    """One point's row."""
    with tempfile.TemporaryDirectory() as folder:
        if series == "shape":
            synthetic.write(synthetic.SyntheticConfig(folder=f"{folder}/model", like=str(place), blocks=config.layer))
            # only its final norm's shard is missing
            config = dataclasses.replace(config, model=f"{folder}/model")
        facts = measure("tli", config, warm=2, steps=steps)
        least = floor(config, facts["nodes"])
    row = {"series": series, "place": place, "seconds": statistics.median(facts["seconds"]), "runs": facts["seconds"]}
    row |= {"floor_seconds": least["seconds"], "flops": least["flops"]}
    return row | {key: facts[key] for key in ("nodes", "peak_bytes", "own_peak_bytes", "load_seconds")}


def draw(rows: list[dict], about: str) -> matplotlib.figure.Figure:
    """Seconds of a step, its floor and its peak memory in one panel for each series."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    present = [name for name in SERIES if any(row["series"] == name for row in rows)]
    figure = Figure(figsize=(10.8, 0.9 + 3.4 * -(-len(present) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(present) // 2), 2, squeeze=False).flat
    for name, panel in zip(present, panels):
        own = [row for row in rows if row["series"] == name]
        x = list(range(len(own))) if name == "shape" else [row["place"] for row in own]
        beside = panel.twinx()
        memory = [row["peak_bytes"] / 1e9 for row in own]
        # between two shapes there is nothing
        line = {"linewidth": 1.5, "markersize": 5} if name != "shape" else {"linewidth": 0, "markersize": 7}
        beside.plot(
            x,
            memory,
            label="peak resident memory (right)",
            color=_MEMORY,
            linestyle=(0, (5, 2)),
            marker="s",
            markerfacecolor="white",
            **line,
        )
        panel.plot(x, [row["seconds"] for row in own], label="step", color=_SECONDS, marker="o", **line)
        panel.plot(x, [row["floor_seconds"] for row in own], label="floor", color="black", linestyle=(0, (1, 1)), marker="_", **line)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        beside.set_ylim(0, 1.15 * max(memory))
        if name == "shape":
            panel.set_xticks(x, [row["place"] for row in own], fontsize=8)
            panel.margins(x=0.12)
        else:
            panel.set_xscale("log", base=2)
            panel.set_xticks(x, [str(at) for at in x])
            panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(SERIES[name][1])
        panel.set_ylabel("seconds a step (log)")
        beside.set_ylabel("GB")
        for side in (panel, beside):
            side.spines["top"].set_visible(False)
    for panel in list(panels):
        panel.set_axis_off()
    handles = [pair for side in (figure.axes[0], beside) for pair in zip(*side.get_legend_handles_labels())]
    figure.legend(*zip(*handles), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel(about, fontsize=8)
    return figure


def main() -> None:
    """The command."""
    config = parse(CostConfig, "bench.cost")
    console, load, rows = Console(width=120), {"before": os.getloadavg()}, []
    for series, place, train in points(config):
        rows.append(measured(series, place, train, config.steps))
        console.print(f"{series} {place}: {rows[-1]['seconds']:.4f} s, floor {rows[-1]['floor_seconds']:.4f} s")
    load["after"] = os.getloadavg()
    shown = Table("series", "", "median s", "floor s", "times the floor", "nodes", "peak, MB", title="one step")
    for row in rows:
        ratio = f"{row['seconds'] / row['floor_seconds']:.2f}"
        seconds = [f"{row[key]:.4f}" for key in ("seconds", "floor_seconds")]
        shown.add_row(row["series"], str(row["place"]), *seconds, ratio, f"{row['nodes']:,}", f"{row['peak_bytes'] / 1e6:,.0f}")
    console.print(shown)
    facts = record.machine()
    about = f"{facts['processor']}, {facts['cores']} cores, {dtypes('cpu')[-1]}; the rest: L = {config.layer}, rank {config.rank}, "
    about += f"{config.batch} pairs (64 for the shapes); medians of {config.steps} steps; floor: multiplications at this machine's rate"
    if rows:
        save_figure(config.figure, draw(rows, about))
    content = {"setting": as_dict(config), "dtype": dtypes("cpu")[-1], "load_average": load, "points": rows}
    console.print("written:", config.figure, str(record.write("cost", content, pathlib.Path(config.results))))


if __name__ == "__main__":
    run_command(main)
