"""What needs no training, beside the adapters: the table, and the verdict's first sentence."""

from __future__ import annotations

from typing import Any

from tli.metrics.baseline_records import ALL, BEFORE, BEHIND_MAP, PLAIN, WITH_MAPS
from tli.metrics.baselines import BASELINES
from tli.model.shape import Layer
from tli.reports.tables import Table
from tli.reports.wording import interval, number, place_name, side, side_of_chance

# set of candidates, and metric, of each column; of all pairs, but in the fourth
_COLUMNS = (("split", "mrr"), ("split", "p_at_1"), ("class", "mrr"), ("class", "mrr"), ("list", "mrr"))
_OTHERS = {"no loan words": "no\nloans", "not spelt alike": "spelt\napart"}


def baseline_table(report: dict, layer: Layer, intervals: bool = True, stream: str = "after") -> Table | None:
    """Every way to find the held-out pairs' translations at this layer, the best first; None where none was measured.

    intervals   in all columns; else of the MRR alone, in one of its own
    stream      the adapters' name, where there are several
    """
    found = _records(report, layer, stream)
    if (PLAIN, stream) not in {way for way, *_ in found}:
        return None
    others = next((group for *_, group in found if group in _OTHERS), ALL)
    keys = [(*column, ALL) for column in _COLUMNS]
    keys[3] = (*_COLUMNS[3], others)
    ways = list(dict.fromkeys(way for way, *_ in found))
    ways.sort(key=lambda way: -found[way, "split", "mrr", ALL]["value"])
    rows = []
    for way in ways:
        mrr, *others_found = (found.get((way, *key)) for key in keys)
        cells = [_cell(mrr, False), interval(mrr or {"low": None})]
        rows.append([_label(way), *cells, *(_cell(record, intervals) for record in others_found)])
    chance, *chances = (found.get((ways[0], *key)) for key in keys)
    rows.append(["chance", *("" if record is None else number(record["chance"]) for record in (chance, None, *chances))])
    n = found[ways[0], "split", "mrr", ALL]["n"]
    pairs, how = report["pairs"], "without training" if stream == BEFORE else "with training and without"
    split = f"split by {pairs['split']}, {pairs['with_relative']:,} of {pairs['held_out']:,} with a trained relative"
    title = f"{place_name(layer).capitalize()}: what finds the held-out pairs (n={n}; {split}), {how}"
    return Table(title, ["", "MRR", "95 % interval", "P@1", "own\nclass", _OTHERS.get(others, "own\nclass"), "whole\nlist"], rows)


def bought(report: dict, layer: Layer, stream: str = "after") -> str:
    """What training bought over the best of what needs none, in a sentence; empty where no such thing was measured."""
    found = _records(report, layer, stream)
    free = [way for way, candidates, metric, group in found if way[1] != stream and (candidates, metric, group) == ("split", "mrr", ALL)]
    free = [way for way in free if way[0] == PLAIN or not BASELINES[way[0]].oracle]
    tests = _tests(report, layer, stream, PLAIN)
    if not tests:
        return ""
    best = max(free, key=lambda way: found[way, "split", "mrr", ALL]["value"])
    theirs, ours = found[best, "split", "mrr", ALL], found[(PLAIN, stream), "split", "mrr", ALL]
    test = tests[best[0]]
    numbers = (
        f"held-out MRR {number(theirs['value'])} {interval(theirs)} against {number(ours['value'])} {interval(ours)} with the adapters"
    )
    gain = f"{number(test['mean_gain'], '+')} {interval(test)}"
    where = f"At {place_name(layer)}"
    if side_of_chance(theirs) != "above" and side_of_chance(ours) != "above":
        return f"{where}, neither training nor anything that needs none finds new words' translations above chance ({numbers})."
    if side(test) == "above":
        return f"{where}, training adds {gain} beyond the best that needs none, {_name(best)}: {numbers}."
    if side(test) == "below":
        return f"{where}, {_name(best)} finds more without any training: {numbers}, {gain} for training."
    return f"{where}, training is not shown to add anything to {_name(best)}, which needs none: {numbers}, a difference of {gain}."


def bought_with_maps(report: dict, layer: Layer, stream: str = "after") -> str:
    """What training bought where both sides may use a map, and where both may look at spelling, too; empty where it was not measured."""
    found, told = _records(report, layer, stream), []
    for way, how in ((BEHIND_MAP, "Behind a map"), ("cca_spelling", "with spelling beside the states, in one map,")):
        tests = _tests(report, layer, stream, way)
        if tests:
            best = max(WITH_MAPS[way], key=lambda rival: found[(rival, BEFORE), "split", "mrr", ALL]["value"])
            ours, theirs = (found[key, "split", "mrr", ALL]["value"] for key in ((way, stream), (best, BEFORE)))
            gain = f"{number(tests[best]['mean_gain'], '+')} {interval(tests[best])}"
            told.append(f"{how} the trained states find {number(ours)}, the frozen ones {number(theirs)}, {gain}")
    return f"{'; '.join(told)}." if told else ""


def _tests(report: dict, layer: Layer, stream: str, trained: str) -> dict[str, dict[str, Any]]:
    """By way that needs no training: the test of what was trained, in this way, against it."""
    where = stream, layer, "split", ALL, trained
    return {
        test["way"]: test
        for test in (report.get("baselines") or {}).get("tests", [])
        # reports from before there were maps tested the plain cosine alone
        if (*(test[key] for key in ("stream", "layer", "candidates", "group")), test.get("trained", PLAIN)) == where
    }


def _records(report: dict, layer: Layer, stream: str) -> dict[tuple[tuple[str, str | None], str, str, str], dict[str, Any]]:
    """By (way, stream), candidates, metric and group: what was measured at this layer, or without any."""
    return {
        ((record["way"], record["stream"]), record["candidates"], record["metric"], record["group"]): record
        for record in (report.get("baselines") or {}).get("records", [])
        if record["layer"] in (layer, None) and record["stream"] in (stream, BEFORE, None)
    }


def _cell(record: dict | None, with_interval: bool) -> str:
    return "" if record is None else number(record["value"]) + f" {interval(record)}" * with_interval


def _name(way: tuple[str, str | None]) -> str:
    return "the frozen model's own cosine" if way[0] == PLAIN else BASELINES[way[0]].label


def _label(way: tuple[str, str | None]) -> str:
    name, stream = way
    if name == PLAIN:
        return "frozen model (cosine)" if stream == BEFORE else "adapters (cosine)"
    if name == BEHIND_MAP:
        return "adapters, saved map"
    label = BASELINES[name].label
    return label if stream in (BEFORE, None) else label.replace("states", "trained states")
