"""``python -m bench.recipe``: what the recipes learn, beside their controls and what needs no training, over several seeds.

Each run is the command itself in a process of its own: the default recipe, that of before, the default on shuffled pairs, and the paper's
protocol. A seed draws its own split, so the spread over seeds is that of the words, too; gains over what needs no training have an interval
over seeds and words together. One record goes to ``bench/results/``.
"""

import dataclasses
import pathlib
import statistics
import tempfile

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import record
from bench.command import tli_train
from bench.harness import chosen, results_option
from tli.config import TrainConfig
from tli.metrics.baseline_records import AFTER, ALL, BEFORE, BEHIND_MAP, PLAIN, WITH_MAPS
from tli.runtime.cli import as_dict, option, parse
from tli.runtime.errors import run_command
from tli.stats.across_runs import crossed_interval

VARIANTS = {"default": [], "contrastive": ["--recipe", "contrastive"], "shuffled": ["--shuffle-pairs"], "paper": ["--recipe", "paper"]}
METRICS = ("cosine", "mismatched", "gap", "p_at_1", "mrr")
# of what finds the held-out pairs: candidates, and group of pairs
_AMONG = {"split": ALL, "class": "no loan words", "list": ALL}
# of each way to use the trained states those that need no training and are of equal information: plain cosine is held against maps, too
_RIVALS = {PLAIN: WITH_MAPS[BEHIND_MAP], **WITH_MAPS}
# of these a record keeps every pair's reciprocal rank
_COMPARED = {(way, AFTER) for way in _RIVALS} | {(way, BEFORE) for free in _RIVALS.values() for way in free}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Run the default recipe, its shuffled control and the paper's protocol over several seeds."""

    seeds: str = option("0,1,2,3,4", "bench", "a comma list")
    layer: int = option(2, "bench", "hidden state to align")
    rank: int = option(16, "bench", "LoRA rank")
    variants: str = option(",".join(VARIANTS), "bench", "a comma list of these")
    results: str = results_option()


def run(variant: str, seed: int, layer: int, rank: int) -> dict:
    """One run of the command: what it measured at layer L and at the output, and how long it took in all."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--layer", str(layer), "--rank", str(rank), "--seed", str(seed), "--json", "--output", f"{folder}/run", *VARIANTS[variant]]
        done = tli_train(flags)
    report = done.said
    measured = {
        f"{m['split']} {m['when']} {m['layer']} {m['metric']}": m["value"]
        for m in report["measurements"]
        if m["layer"] in (layer, "output") and m["metric"] in METRICS
    }
    gain = next(t for t in report["tests"] if (t["split"], t["layer"], t["metric"]) == ("held_out", layer, "gap"))
    return {
        "variant": variant,
        "seed": seed,
        "seconds": done.seconds,
        "training": report["training"],
        "adapter": report["adapter"],
        "measured": measured,
        # MRR of every way to find the held-out pairs: at layer L, and without a model
        "ways": {
            f"{r['way']} {r['stream'] or 'words'} {r['candidates']}": r["value"]
            for r in report["baselines"]["records"]
            if r["layer"] in (layer, None) and r["metric"] == "mrr" and _AMONG[r["candidates"]] == r["group"]
        },
        "pairs": report["baselines"]["pairs"],
        "reciprocal_ranks": {
            f"{one['way']} {one['stream'] or 'words'}": one["values"]
            for one in report["baselines"]["reciprocal_ranks"]
            if one["layer"] in (layer, None) and (one["way"], one["stream"]) in _COMPARED
        },
        "perplexity_ratio": {one["text"]["name"]: one["after"][0]["perplexity_ratio"]["value"] for one in report["harm"]},
        "held_out_gap_gain": {key: gain[key] for key in ("mean_gain", "low", "high")},
        "verdict": report["verdict"],
    }


def summarise(runs: list[dict], layer: int) -> list[dict]:
    """Of each variant: means over its seeds at layer L."""
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == variant]

        def mean(key: str, own: list[dict] = own) -> float:
            return statistics.mean(run["measured"][key] for run in own)

        row = {
            f"{split} {when} {metric}": mean(f"{split} {when} {layer} {metric}")
            for split in ("trained", "held_out")
            for when in ("before", "after")
            for metric in METRICS
        }
        ratios = [run["measured"][f"held_out after {layer} mrr"] / run["measured"][f"held_out before {layer} mrr"] for run in own]
        gains = [run["held_out_gap_gain"] for run in own]
        rows.append(
            {
                "variant": variant,
                "seeds": len(own),
                "seconds": statistics.mean(run["seconds"] for run in own),
                **row,
                "held_out_mrr_ratio": statistics.mean(ratios),
                "ways": {way: [run["ways"][way] for run in own] for way in own[0]["ways"]},
                "perplexity_ratio": {name: [run["perplexity_ratio"][name] for run in own] for name in own[0]["perplexity_ratio"]},
                "held_out_gap_gains": gains,
                "gains": _gains(own),
            }
        )
    return rows


def _gains(runs: list[dict]) -> dict[str, dict]:
    """Of each way to use the trained states, the gain in held-out MRR over the best of equal information that needs no training.

    The best is the one with the highest mean over the seeds; the interval is that of other seeds and other words together.
    """
    found = {}
    for trained, free in _RIVALS.items():
        ours, theirs = f"{trained} {AFTER}", [f"{way} {BEFORE}" for way in free]
        if all(ours in run["reciprocal_ranks"] for run in runs):
            best = max(theirs, key=lambda way: statistics.mean(statistics.mean(run["reciprocal_ranks"][way]) for run in runs))
            gains = [np.subtract(run["reciprocal_ranks"][ours], run["reciprocal_ranks"][best]) for run in runs]
            words = [source for run in runs for source, _ in run["pairs"]]
            _, numbers = np.unique(words, return_inverse=True)
            found[f"{ours} - {best}"] = crossed_interval(
                np.concatenate(gains), np.repeat(np.arange(len(runs)), [len(g) for g in gains]), numbers
            )
    return found


def _show(console: Console, rows: list[dict], layer: int) -> None:
    shown = Table(title=f"layer {layer}, before -> after: means over seeds")
    for column in ("", *(row["variant"] for row in rows)):
        shown.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    for split in ("trained", "held_out"):
        for metric in METRICS:
            cells = [f"{row[f'{split} before {metric}']:.3f} -> {row[f'{split} after {metric}']:.3f}" for row in rows]
            shown.add_row(f"{split.replace('_', ' ')}, {metric}", *cells)
    shown.add_row("held-out MRR, after / before", *(f"{row['held_out_mrr_ratio']:.2f}" for row in rows))
    low = "held-out gap gain, 95 % interval of each seed"
    shown.add_row(
        low, *("\n".join(f"{g['mean_gain']:+.3f} [{g['low']:.3f}, {g['high']:.3f}]" for g in row["held_out_gap_gains"]) for row in rows)
    )
    for way in rows[0]["ways"]:
        shown.add_row(f"held-out MRR: {way}", *(f"{statistics.mean(row['ways'][way]):.3f}" for row in rows))
    for name in rows[0]["perplexity_ratio"]:
        shown.add_row(f"perplexity, times the base's: {name}", *(f"{statistics.mean(row['perplexity_ratio'][name]):.2f}" for row in rows))
    for gain in rows[0]["gains"]:
        cells = (row["gains"].get(gain) for row in rows)
        shown.add_row(
            f"{gain}, over seeds and words",
            *("" if g is None else f"{g['value']:+.3f} [{_end(g['low'])}, {_end(g['high'])}]" for g in cells),
        )
    shown.add_row("seconds, the whole command", *(f"{row['seconds']:.0f}" for row in rows))
    console.print(shown)


def _end(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    """The command."""
    config = parse(RecipeConfig, "bench.recipe")
    console, runs = Console(width=140), []
    variants, seeds = chosen("--variants", config.variants.split(","), list(VARIANTS)), [int(seed) for seed in config.seeds.split(",")]
    for seed in seeds:
        for variant in variants:
            runs.append(run(variant, seed, config.layer, config.rank))
            console.print(f"seed {seed}, {variant}: {runs[-1]['seconds']:.0f} s")
    rows = summarise(runs, config.layer)
    _show(console, rows, config.layer)
    content = {"setting": as_dict(config), **record.material(TrainConfig()), "summary": rows, "runs": runs}
    console.print("written:", str(record.write("recipe", content, pathlib.Path(config.results))))


if __name__ == "__main__":
    run_command(main)
