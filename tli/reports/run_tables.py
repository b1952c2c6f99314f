"""The tables of one training run, and how they are to be read: for report.md, the console and the model card."""

from __future__ import annotations

import pathlib
import re

from tli.metrics.measures import SPLITS
from tli.model.shape import Layer
from tli.reports.tables import Table, as_markdown, once
from tli.reports.wording import find_value, interval, number, p_value

LABELS = {
    "gap": "gap",
    "p_at_1": "P@1",
    "mrr": "MRR",
    "cosine": "cosine, true",
    "mismatched": "cosine, mismatched",
    "sink_share": "sink share",
}
TESTED = ("gap", "p_at_1", "mrr", "cosine", "mismatched")
# trained and held-out retrieval have different numbers of candidates; their gains are not comparable
TESTED_BETWEEN = ("gap", "cosine")


READING = """\
How to read this. The *gap* is the mean cosine of true pairs minus that of mismatched pairs. *P@1* is how often the true partner is the
nearest candidate, *MRR* the mean of 1/rank; both are means of the two directions unless one is named. *Chance* is their value for ranks
drawn by lot from as many candidates; trained and held-out lists differ in length, so in chance, too. The *sink share* is the part of a
word's states, by norm, that the first position would make up if it were pooled. A mean cosine that rises for mismatched pairs as well is
a shift of all words. Brackets are 95 % bootstrap intervals over pairs (BCa, 2,000 resamples); one without width means that all pairs
agree, not that the value is certain. The p-values are not corrected for their number: the held-out gap where the loss was is the question,
the rest is context. The control for all of it is the same run with `--shuffle-pairs`."""


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
    sizes = {record["split"]: record["n"] for record in report["measurements"]}
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
    rows = [["", "pairs", "gain", "95 % interval", "t", "p", "Wilcoxon", "d_z"]]
    for test in sorted((t for t in report["tests"] if t["layer"] == layer), key=lambda t: TESTED.index(t["metric"])):
        paired = test["test"] == "paired"
        ranks = [p_value(test["p_wilcoxon"]), "inf" if test["d_z"] is None else number(test["d_z"], digits=2)] if paired else ["", ""]
        t, p = "inf" if test["t"] is None else number(test["t"], digits=1), p_value(test["p_t"] if paired else test["p"])
        gain = number(test["mean_gain" if paired else "difference"], "+")
        rows.append([LABELS[test["metric"]], SPLITS.get(test["split"], "difference"), gain, interval(test), t, p, *ranks])
    return once(rows)


def rows_as_markdown(rows: list[list[str]]) -> str:
    return as_markdown(Table("", rows[0], rows[1:]))


def _label(report: dict, metric: str) -> str:
    source, target = report["config"]["source"], report["config"]["target"]
    if metric.endswith("_forward"):
        return f"{LABELS[metric.removesuffix('_forward')]}, {source} to {target}"
    return f"{LABELS[metric.removesuffix('_backward')]}, {target} to {source}" if metric.endswith("_backward") else LABELS[metric]


def languages(report: dict) -> str:
    return f"{report['config']['source'].capitalize()} and {report['config']['target'].capitalize()}"


def hub_name(name: str) -> str:
    # a card is made to be published: of a local path it shows the last part only
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else pathlib.Path(name).name
