"""An evaluation's tables, on the console and as Markdown.

A mean cosine, and a CLIPScore, which is one rescaled, never stands alone: its row has the value of mismatched pairs, the gap and
the retrieval beside it. The p-values shown are Holm's; what they were before is in ``evaluation.json``.
"""

from __future__ import annotations

import typing

from tli.metrics.measures import DIFFERENCE, MEASURES, SPLITS, names
from tli.model.shape import Layer
from tli.reports.baselines import baseline_table
from tli.reports.glossary import how_to_read
from tli.reports.harm import harm_table
from tli.reports.run_tables import cells_of_test
from tli.reports.tables import Table, as_markdown, once, to_repeat
from tli.reports.wording import UNDEFINED, interval, is_significant, number, number_or_dash, p_value

if typing.TYPE_CHECKING:
    import pathlib

FILES = ("evaluation.json", "evaluation.md")
# with more layers than this the console's tables keep to one line a layer
_FEW_LAYERS = 6
_MOST_COMPARISONS = 20
_SPLITS = SPLITS | {"all": "all"}
# a row of the values each, with the measures in its columns; the names of Hessel et al.: CLIP-S is CLIPScore
_SCORES = {
    "cosine": ("cosine", "mismatched", "gap", "p_at_1", "mrr"),
    "CLIP-S": ("clipscore", "clipscore_mismatched", "clipscore_gap"),
    "RefCLIP-S": ("ref_clipscore", "ref_clipscore_mismatched", "ref_clipscore_gap"),
}
# of the tests, those that a console has room for
_FEW_TESTS = names("judged")[:3]
_READING = how_to_read("gap", "retrieval", "baselines", "intervals", "tests", "TOST", "CLIPScore", "RefCLIPScore")


def tables_of_adapters(facts: dict, full: bool = False) -> list[Table]:
    """Values and tests by list, what trained and held-out gains have in common, and harm; ``full`` holds every metric and interval."""
    tables = []
    splits = [split for split in _SPLITS if split in facts["pairs"]]
    for index, name in enumerate(adapter["name"] for adapter in facts["adapters"]):
        of = f"{name}: " if len(facts["adapters"]) > 1 else ""
        tables += [_values(facts, name, split, of, full) for split in splits]
        tables.append(_gains(facts, name, splits, of, full))
        if "held_out" in splits:
            tables.append(_between(facts, name, of, full))
        for layer in facts["layers"]:
            if (beside := baseline_table(facts, layer, full, name)) is not None:
                tables.append(beside._replace(title=of + beside.title))
        tables += [harm_table(harm, index, of) for harm in facts["harm"]]
    return tables


def tables_of_values(facts: dict) -> list[Table]:
    """Means and tests of each group of a table, and groups against one another."""
    groups, config = facts["groups"], facts["config"]
    grouped = groups[0]["group"] is not None
    left_out = facts["table"]["rows_left_out"]
    title = f"{facts['table']['name']}: {config['before']} -> {config['after']}, {facts['table']['rows']} rows"
    if left_out:
        lines = facts["table"]["lines_left_out"]
        title += f"; left out, a value is missing: {left_out} (line{'s' * (left_out > 1)} {', '.join(map(str, lines[:5]))}"
        title += ", ...)" if left_out > 5 else ")"
    first = [config["group"]] if grouped else []
    means = [
        [*([g["group"]] if grouped else []), str(g["n"]), *map(_any_number, (g["mean_before"], g["mean_after"], g["mean_gain"])), _range(g)]
        for g in groups
    ]
    tests = [
        [
            *([g["group"]] if grouped else []),
            number_or_dash(g["t"], digits=2),
            *(p_value(g[f"{p}_holm"]) for p in ("p_t", "p_wilcoxon", "p_sign_flip")),
            number_or_dash(g["d_z"], digits=2),
        ]
        for g in groups
    ]
    tested = sum(g["p_sign_flip"] is not None for g in groups)
    corrected = f"; p corrected for {tested} groups (Holm)" if tested > 1 else ""
    tables = [
        Table(title, [*first, "n", "before", "after", "gain", "95 % interval"], means),
        Table(f"tests of the gain{corrected}", [*first, "t", "p", "Wilcoxon", "sign flip", "d_z"], tests),
    ]
    return tables + ([_groups_compared(facts)] if facts["between"] else [])


def markdown(title: str, tables: list[Table], facts: dict) -> str:
    """evaluation.md: the tables, how to read them, and all that a repetition needs."""
    parts = [title]
    for table in tables:
        parts += [f"## {table.title}", as_markdown(table)]
    parts += [_READING] if "adapters" in facts else []
    rest = {key: facts[key] for key in facts if key not in ("measurements", "tests", "baselines", "harm", "groups", "between")}
    return "\n\n".join([*parts, to_repeat(rest)])


def last_line_of_adapters(facts: dict, output: pathlib.Path) -> str:
    """Where the evaluation differs from the training, what is missing, and where all of it is."""
    lines = []
    for difference in facts["differences"]:
        if difference["setting"] is None:
            lines.append(f"{difference['adapter']} has no report.json: its split, rounding and pooling in training are not known")
        else:
            lines.append("{adapter} differs from its training in {setting}: {here} here, {training} there".format(**difference))
    if facts["missing"]:
        lines.append(f"layers are missing: {facts['missing']}")
    return "\n".join([*lines, f"in {output}: evaluation.json, evaluation.md"])


def last_line_of_values(facts: dict, output: str | None) -> str:
    """What the table cannot say, and where the statistics are."""
    said = "These are statistics of the values alone: if they are cosines, only mismatched pairs can say whether a gain is alignment."
    return said + ("" if output is None else f"\nin {output}: evaluation.json, evaluation.md")


def _groups_compared(facts: dict) -> Table:
    tests, margin = facts["between"], facts["config"]["margin"]
    tested = sum(test["p"] is not None for test in tests)
    title = "gain of one group minus another's" + (f"; p corrected for {tested} comparisons (Holm)" if tested > 1 else "")
    if margin is not None:
        title += f"; TOST: they differ by less than {margin:g}"
    shown = tests
    if len(tests) > _MOST_COMPARISONS:
        shown = sorted(tests, key=lambda test: (test["p"] is None, test["p"]))[:_MOST_COMPARISONS]
        title += f"; the {len(shown)} smallest p, all are in evaluation.json (--output)"
    rows = []
    for test in shown:
        row = [f"{test['first']} - {test['second']}", _any_number(test["difference"]), _range(test)]
        row += [number_or_dash(test["t"], digits=2), p_value(test["p_holm"])]
        rows.append(row + ([] if margin is None else [p_value(test["equivalence"]["p_holm"])]))
    return Table(title, ["", "difference", "95 % interval", "t", "Welch p"] + ([] if margin is None else ["TOST p"]), rows)


def _values(facts: dict, adapter: str, split: str, of: str, full: bool) -> Table:
    found = {
        (r["when"], r["layer"], r["metric"]): r for r in facts["measurements"] if r["split"] == split and r["adapter"] in (None, adapter)
    }
    layers = facts["layers"]
    chance = {metric: found["before", layers[0], metric]["chance"] for metric in ("p_at_1", "mrr")}
    n, listed = found["before", layers[0], "gap"]["n"], facts["pairs"][split]
    drawn = f" of {listed}, drawn at random" if n < listed else ""
    title = f"{of}{_SPLITS[split].replace(' ', '-')} pairs (n={n}{drawn}), before -> after"
    title += f"; chance: P@1 {_small(chance['p_at_1'])}, MRR {_small(chance['mrr'])}"
    referenced = next((r["n"] for (_, _, metric), r in found.items() if metric == "ref_clipscore"), 0)
    if referenced and (full or len(layers) <= _FEW_LAYERS):
        title += f"; RefCLIP-S: of the {referenced} with further accepted glosses"
    few = len(layers) <= _FEW_LAYERS or full
    if not few:
        title += "; intervals and CLIPScores are in evaluation.md"
    rows = []
    for layer in layers:
        if few:
            rows.append([_name(layer)])
        for score, metrics in _SCORES.items() if few else [(str(layer), _SCORES["cosine"])]:
            if ("before", layer, metrics[0]) in found:
                pairs = [(found["before", layer, metric], found["after", layer, metric]) for metric in metrics]
                rows.append([score, *(_change(*pair, few and (full or i > 1), full) for i, pair in enumerate(pairs))])
    return Table(title, ["" if few else "layer", "true", "mismatched", "gap", "P@1", "MRR"], rows)


def _change(before: dict, after: dict, with_interval: bool, full: bool) -> str:
    """A value before and after; below it, or in full beside each, the interval."""
    if full:
        return " -> ".join(f"{number(r['value'])} {interval(r)}" for r in (before, after))
    below = f"\n{interval(after)}" if with_interval else ""
    return f"{number(before['value'])}→{number(after['value'])}{below}"


def _gains(facts: dict, adapter: str, splits: list[str], of: str, full: bool) -> Table:
    tests = [test for test in facts["tests"] if test["test"] == "paired" and test["adapter"] == adapter]
    layers = facts["layers"]
    few = len(layers) <= _FEW_LAYERS or full
    rows = []
    for layer in layers:
        if few:
            rows.append([_name(layer)])
        for split in splits if few else splits[-1:]:
            here = [test for test in tests if (test["layer"], test["split"]) == (layer, split)]
            for test in here:
                if full or test["metric"] in (_FEW_TESTS if few else ("gap",)):
                    first = [_SPLITS[split], MEASURES[test["metric"]].label] if few else [str(layer)]
                    rows.append([*first, *cells_of_test(test, sign_flip=True)])
    head = ["pairs", ""] if few else ["layer"]
    what = "gain, after - before" if few else f"{_SPLITS[splits[-1]]} pairs: gain of the gap, after - before"
    columns = ["gain", "95 % interval", "t", "p", "Wilcoxon", "sign flip", "d_z"]
    return Table(f"{of}{what}{_over(facts)}", [*head, *columns], once(rows))


def _over(facts: dict) -> str:
    layers = len(facts["layers"])
    return f"; p corrected for {layers} layers (Holm)" if layers > 1 else ""


def _name(layer: Layer) -> str:
    return "output" if layer == "output" else f"layer {layer}"


def _between(facts: dict, adapter: str, of: str, full: bool) -> Table:
    tests = [test for test in facts["tests"] if (test["test"], test["adapter"], test["split"]) == ("welch", adapter, DIFFERENCE)]
    margin = tests[0]["equivalence"]["margin"]
    rows = []
    for test in tests:
        if test["metric"] == "gap" or len(facts["layers"]) <= _FEW_LAYERS or full:
            equal, differ = map(is_significant, (test["equivalence"]["p_holm"], test["p_holm"]))
            said = "alike" if equal else "differ" if differ else "undecided"
            if test["equivalence"]["p"] is None:
                said = UNDEFINED
            numbers = [
                number(test["difference"], "+"),
                interval(test),
                p_value(test["p_holm"]),
                p_value(test["equivalence"]["p_holm"]),
                said,
            ]
            rows.append([str(test["layer"]), MEASURES[test["metric"]].label, *numbers])
    rows.sort(key=lambda row: [str(layer) for layer in facts["layers"]].index(row[0]))
    title = f"{of}gain of trained pairs minus gain of held-out pairs; alike: by less than {margin:g} (TOST){_over(facts)}"
    return Table(title, ["layer", "", "difference", "95 % interval", "Welch p", "TOST p", "gains"], once(rows))


def _range(record: dict) -> str:
    return UNDEFINED if record["low"] is None else f"[{_any_number(record['low'])}, {_any_number(record['high'])}]"


def _any_number(value: float) -> str:
    """Four digits of a value of any size."""
    return f"{value:.4g}"


def _small(value: float) -> str:
    return f"{value:.2g}"
