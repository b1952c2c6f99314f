"""The tables of one training run: for report.md, the console and the model card."""

from __future__ import annotations

import pathlib
import re

from tli.metrics.measures import MEASURES, SPLITS, names
from tli.model.shape import Layer
from tli.reports.glossary import how_to_read
from tli.reports.tables import Table, as_markdown, once
from tli.reports.wording import find_value, interval, number, number_or_dash, p_value

READING = how_to_read("gap", "retrieval", "lists", "sink share", "baselines", "intervals", "tests", "control")


def summary(report: dict) -> str:
    model, pairs, training, adapter = (report[key] for key in ("model", "pairs", "training", "adapter"))
    chance = "" if training["chance_loss"] is None else f" (chance {training['chance_loss']:.3f})"
    return (
        f"{hub_name(model['name'])}, {model['blocks']} blocks; {pairs['name']}: {pairs['trained']:,} pairs trained"
        f"{', shuffled into false ones' if report['shuffled'] else ''}, {pairs['held_out']:,} held out{_samples(report)}; "
        f"{adapter['parameters']:,} adapter parameters, {training['steps']:,} steps in {training['seconds']:.1f} s, "
        f"{training['words_per_second']:,.0f} words/s; loss {training['loss_first']:.3f} -> {training['loss_last']:.3f}{chance}."
    )


def _samples(report: dict) -> str:
    """What is said of splits of which a random part was measured."""
    sizes = {record["split"]: record["n"] for record in report["measurements"] if record["metric"] == "gap"}
    parts = [f"{n:,} {SPLITS[split]}" for split, n in sizes.items() if n < report["pairs"][split]]
    return f" (measured: a random sample, {' and '.join(parts)})" if parts else ""


def value_rows(report: dict, layer: Layer, metrics: tuple[str, ...], between: str) -> list[list[str]]:
    """A head and a row per metric; ``between`` stands between a value and its interval."""
    splits = [split for split in SPLITS if find_value(report, split, "after", layer, "gap")]
    counts = {split: f"(n={find_value(report, split, 'after', layer, 'gap')['n']})" for split in splits}
    rows = [[""]]
    for split in splits:
        # in a narrow table a split's name and number stand side by side above its two columns
        above = (SPLITS[split], counts[split]) if between == "\n" else (f"{SPLITS[split]} {counts[split]}",) * 2
        rows[0] += [f"{above[0]}\nbefore", f"{above[1]}\nafter", "\nchance"]
    for metric in metrics:
        row = [_label(report, metric)]
        for split in splits:
            cells = [find_value(report, split, when, layer, metric) for when in ("before", "after")]
            row += ["" if cell is None else f"{number(cell['value'])}{between}{interval(cell)}" for cell in cells]
            row.append(number(cells[1]["chance"]) if cells[1] and cells[1]["chance"] is not None else "")
        rows += [row] if any(row[1:]) else []
    return rows


def gain_rows(report: dict, layer: Layer) -> list[list[str]]:
    """A head and the tests of each headline measure: each split's gain, and the difference of the two."""
    shown = names("headline")
    rows = [["", "pairs", "gain", "95 % interval", "t", "p", "Wilcoxon", "d_z"]]
    here = [test for test in report["tests"] if test["layer"] == layer and test["metric"] in shown]
    for test in sorted(here, key=lambda test: shown.index(test["metric"])):
        rows.append([MEASURES[test["metric"]].label, SPLITS.get(test["split"], "difference"), *cells_of_test(test)])
    return once(rows)


def cells_of_test(test: dict, sign_flip: bool = False) -> list[str]:
    """Gain, interval, t, p, Wilcoxon's p, the sign flips' if asked for, d_z; of a difference of two splits the first four."""
    if test["test"] == "welch":
        return [number(test["difference"], "+"), interval(test), number_or_dash(test["t"], digits=1), p_value(test["p_holm"]), "", ""]
    p_values = ["p_t", "p_wilcoxon"] + ["p_sign_flip"] * sign_flip
    numbers = [number(test["mean_gain"], "+"), interval(test), number_or_dash(test["t"], digits=1)]
    return numbers + [p_value(test[f"{name}_holm"]) for name in p_values] + [number_or_dash(test["d_z"], digits=2)]


def rows_as_markdown(rows: list[list[str]]) -> str:
    return as_markdown(Table("", rows[0], rows[1:]))


def _label(report: dict, metric: str) -> str:
    label, source, target = MEASURES[metric].label, report["config"]["source"], report["config"]["target"]
    if metric.endswith("_forward"):
        return f"{label}, {source} to {target}"
    return f"{label}, {target} to {source}" if metric.endswith("_backward") else label


def languages(report: dict) -> str:
    return f"{report['config']['source'].capitalize()} and {report['config']['target'].capitalize()}"


def hub_name(name: str) -> str:
    # a card is made to be published: of a local path it shows the last part only
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else pathlib.Path(name).name
