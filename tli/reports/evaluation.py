"""An evaluation's tables, on the console and as Markdown.

A mean cosine, and a CLIPScore, which is one rescaled, never stands alone: its row has the value of mismatched pairs, the gap and
the retrieval beside it. The p-values shown are Holm's; what they were before is in ``evaluation.json``.
"""

from __future__ import annotations

import json
import typing

from tli.metrics.measures import DIFFERENCE
from tli.model.shape import Layer
from tli.reports.tables import Table, as_markdown, once
from tli.reports.wording import interval, number, p_value

if typing.TYPE_CHECKING:
    import pathlib

# with more layers than this the console's tables keep to one line a layer
_FEW_LAYERS = 6
_MOST_COMPARISONS = 20
_SPLITS = {"trained": "trained", "held_out": "held out", "all": "all"}
# the names of Hessel et al.: CLIP-S is CLIPScore
_SCORES = {
    "cosine": ("cosine", "mismatched", "gap", "p_at_1", "mrr"),
    "CLIP-S": ("clipscore", "clipscore_mismatched", "clipscore_gap"),
    "RefCLIP-S": ("ref_clipscore", "ref_clipscore_mismatched", "ref_clipscore_gap"),
}
_SHOWN_TESTS = ("gap", "p_at_1", "mrr")
_UNDEFINED = "-"

_READING = """\
How to read this. The *gap* is the mean score of true pairs minus that of mismatched pairs; a mean cosine or CLIPScore that rises
for mismatched pairs as well is a shift of all words. *P@1* is how often the true partner is the nearest candidate, *MRR* the mean of
1/rank, both directions averaged; *chance* is their value for ranks drawn by lot. Brackets are 95 % BCa bootstrap intervals; they and
the sign-flip test take pairs that share a word together, t and Wilcoxon know of no such ties. Wilcoxon's p asks which way most pairs
went, the others where their mean went: a few large gains or losses set them apart. All p are Holm's over the layers here. *d_z* is the
mean gain over its scatter. *TOST*, two one-sided tests, asks whether trained and held-out gains differ by less than the margin: p < .05
says so. *CLIP-S* is 2.5 times the cosine, none below 0; *RefCLIP-S* is its harmonic mean with the cosine of a target and the nearest of
its own synonyms, which is high without any alignment of languages, so not even its gap is zero then."""


def tables_of_adapters(facts: dict, full: bool = False) -> list[Table]:
    """Values and tests by list, what trained and held-out gains have in common, and harm; ``full`` holds every metric and interval."""
    tables = []
    splits = [split for split in _SPLITS if split in facts["pairs"]]
    for name in [adapter["name"] for adapter in facts["adapters"]]:
        of = f"{name}: " if len(facts["adapters"]) > 1 else ""
        tables += [_values(facts, name, split, of, full) for split in splits]
        tables.append(_gains(facts, name, splits, of, full))
        if "held_out" in splits:
            tables.append(_between(facts, name, of, full))
        if facts["harm"]:
            tables.append(_harm(facts, name, of))
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
            _UNDEFINED if g["t"] is None else number(g["t"], digits=2),
            *(p_value(g[f"{p}_holm"]) for p in ("p_t", "p_wilcoxon", "p_sign_flip")),
            _UNDEFINED if g["d_z"] is None else number(g["d_z"], digits=2),
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
    rest = {key: facts[key] for key in facts if key not in ("measurements", "tests", "harm", "groups", "between")}
    parts += ["## To repeat it", "```json\n" + json.dumps(rest, indent=1, allow_nan=False) + "\n```"]
    return "\n\n".join(parts) + "\n"


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
        row += [_UNDEFINED if test["t"] is None else number(test["t"], digits=2), p_value(test["p_holm"])]
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
        return " -> ".join(f"{number(r['value'])} {_interval(r)}" for r in (before, after))
    below = f"\n{_interval(after)}" if with_interval else ""
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
                if full or test["metric"] in (_SHOWN_TESTS if few else ("gap",)):
                    rows.append([_SPLITS[split] if few else str(layer), *([_metric(test["metric"])] if few else []), *_tested(test)])
    head = ["pairs", ""] if few else ["layer"]
    what = "gain, after - before" if few else f"{_SPLITS[splits[-1]]} pairs: gain of the gap, after - before"
    columns = ["gain", "95 % interval", "t", "p", "Wilcoxon", "sign flip", "d_z"]
    return Table(f"{of}{what}{_over(facts)}", [*head, *columns], once(rows))


def _over(facts: dict) -> str:
    layers = len(facts["layers"])
    return f"; p corrected for {layers} layers (Holm)" if layers > 1 else ""


def _name(layer: Layer) -> str:
    return "output" if layer == "output" else f"layer {layer}"


def _tested(test: dict) -> list[str]:
    t, d_z = (_UNDEFINED if test[key] is None else number(test[key], digits=digits) for key, digits in (("t", 1), ("d_z", 2)))
    return [
        number(test["mean_gain"], "+"),
        _interval(test),
        t,
        *(p_value(test[f"{p}_holm"]) for p in ("p_t", "p_wilcoxon", "p_sign_flip")),
        d_z,
    ]


def _between(facts: dict, adapter: str, of: str, full: bool) -> Table:
    tests = [test for test in facts["tests"] if (test["test"], test["adapter"], test["split"]) == ("welch", adapter, DIFFERENCE)]
    margin = tests[0]["equivalence"]["margin"]
    rows = []
    for test in tests:
        if test["metric"] == "gap" or len(facts["layers"]) <= _FEW_LAYERS or full:
            equal, differ = (p is not None and p < 0.05 for p in (test["equivalence"]["p_holm"], test["p_holm"]))
            said = "alike" if equal else "differ" if differ else "undecided"
            if test["equivalence"]["p"] is None:
                said = _UNDEFINED
            numbers = [
                number(test["difference"], "+"),
                _interval(test),
                p_value(test["p_holm"]),
                p_value(test["equivalence"]["p_holm"]),
                said,
            ]
            rows.append([str(test["layer"]), _metric(test["metric"]), *numbers])
    rows.sort(key=lambda row: [str(layer) for layer in facts["layers"]].index(row[0]))
    title = f"{of}gain of trained pairs minus gain of held-out pairs; alike: by less than {margin:g} (TOST){_over(facts)}"
    return Table(title, ["layer", "", "difference", "95 % interval", "Welch p", "TOST p", "gains"], once(rows))


def _harm(facts: dict, adapter: str, of: str) -> Table:
    harm, text = facts["harm"], facts["harm"]["text"]
    after = harm["after"][[recorded["name"] for recorded in facts["adapters"]].index(adapter)]
    part = (
        f"the first {text['tokens']:,} of {text['tokens_in_file']:,}" if text["tokens"] < text["tokens_in_file"] else f"{text['tokens']:,}"
    )
    windows = f"{text['windows']} window{'s' * (text['windows'] > 1)} of {text['width']}"
    shown = (
        ("perplexity of the base", harm["before"]["perplexity"], 2),
        ("perplexity with the adapter", after["perplexity"], 2),
        ("times the base's", after["perplexity_ratio"], 3),
        ("KL from the base, nats", after["kl"], 4),
        ("total variation", after["total_variation"], 4),
    )
    rows = []
    for name, record, digits in shown:
        # the mean is always there, its interval may be None
        parts: list[typing.Any] = [None if record[key] is None else f"{record[key]:.{digits}f}" for key in ("value", "low", "high")]
        value, *ends = parts
        rows.append([name, value, _UNDEFINED if None in ends else f"[{', '.join(ends)}]"])
    return Table(f"{of}language model on {text['name']}: {part} tokens in {windows}", ["", "mean", "95 % interval"], rows)


def _metric(metric: str) -> str:
    """A metric's name where no row says which score it is of."""
    for score, prefix in (("RefCLIPScore", "ref_clipscore"), ("CLIPScore", "clipscore")):
        if metric.startswith(prefix):
            return f"{score}{metric.removeprefix(prefix).replace('_', ', ')}"
    return {"gap": "gap", "p_at_1": "P@1", "mrr": "MRR", "cosine": "cosine, true", "mismatched": "cosine, mismatched"}[metric]


def _interval(record: dict) -> str:
    return _UNDEFINED if record["low"] is None else interval(record)


def _range(record: dict) -> str:
    return _UNDEFINED if record["low"] is None else f"[{_any_number(record['low'])}, {_any_number(record['high'])}]"


def _any_number(value: float) -> str:
    """Four digits of a value of any size."""
    return f"{value:.4g}"


def _small(value: float) -> str:
    return f"{value:.2g}"
