"""A closed-form map's report: what chose it, and what finds the held-out pairs."""

from __future__ import annotations

import typing

from tli.metrics.baseline_records import ALL, BEFORE, PLAIN
from tli.metrics.baselines import BASELINES
from tli.reports.baselines import baseline_table
from tli.reports.tables import Table
from tli.reports.tables import show as show_tables
from tli.reports.wording import interval, number, place_name, side_of_chance

if typing.TYPE_CHECKING:
    import rich.console


def verdict(report: dict) -> str:
    """What was chosen, what it finds, and what finds more."""
    chosen = report["map"]
    shrinkage = "" if chosen["shrinkage"] is None else f" with shrinkage {chosen['shrinkage']:g}"
    of = f" of {len(report['by_layer'])} layers" * (len(report["by_layer"]) > 1)
    name = f"{BASELINES[chosen['way']].label} at {place_name(chosen['layer'])}{shrinkage}"
    text = f"Chosen by a part of the trained pairs: {name} (MRR {number(chosen['mrr'])} there"
    best = max(report["by_layer"], key=lambda one: one["mrr"])
    if best["layer"] != chosen["layer"]:
        best_named = f"{place_name(best['layer'])} with {number(best['mrr'])}"
        text += f"; the first{of} within a standard error, {number(best['error'])}, of the best, {best_named}"
    text += ")."
    # none either where all held-out pairs share words: no interval can be had
    if not (report["baselines"] or {}).get("records"):
        return f"{text} Too few pairs are held out to judge it by."
    found = {
        (r["way"], r["stream"]): r
        for r in report["baselines"]["records"]
        if (r["candidates"], r["group"], r["metric"]) == ("split", ALL, "mrr")
    }
    own, plain = found[chosen["way"], BEFORE], found[PLAIN, BEFORE]
    mrr = f"{number(own['value'])} {interval(own)}"
    text += f" Of {own['n']:,} held-out pairs it finds an MRR of {mrr}, {side_of_chance(own)} chance ({number(own['chance'])}), where the "
    text += f"cosine of the states as they are has {number(plain['value'])} {interval(plain)}."
    more = [key for key, record in found.items() if record["value"] > own["value"] and key[0] != PLAIN and not BASELINES[key[0]].oracle]
    if more:
        best = max(more, key=lambda key: found[key]["value"])
        name, mrr = BASELINES[best[0]].label, f"{number(found[best]['value'])} {interval(found[best])}"
        text += f" More is found there by this: {name}, {mrr}."
    return text


def show(report: dict, console: rich.console.Console) -> None:
    """Print the best map of each layer, what finds the held-out pairs, and the verdict."""
    from rich.text import Text

    rows = [
        [
            f"{one['layer']}{'*' * (one['layer'] == report['map']['layer'])}",
            BASELINES[one["way"]].label,
            "" if one["shrinkage"] is None else f"{one['shrinkage']:g}",
            number(one["mrr"]),
        ]
        for one in report["by_layer"]
    ]
    tables = [
        Table(
            "The best map of each layer, by a part of the trained pairs that it was not fitted on", ["layer", "", "shrinkage", "MRR"], rows
        )
    ]
    beside = baseline_table(report, report["map"]["layer"], intervals=False, stream=BEFORE)
    show_tables(tables + ([] if beside is None else [beside]), console)
    console.print(Text(report["verdict"]))
