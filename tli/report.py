"""The report of a run, and the adapter's model card: tables, figures and a verdict, all from the same numbers.

No mean cosine stands alone here: beside it stand the cosine of mismatched pairs, the gap, retrieval with its chance, and the sink's
share. Each number is given before and after, on trained pairs and on pairs that training never saw, at layer L, where the loss
was, and at ``output``, where a user of the whole model would feel it. The verdict says in words what those numbers show, and
nothing else: each of its sentences is a rule about numbers in the tables, and the rules are the functions below ``verdict``.
"""

from __future__ import annotations

import json
import pathlib
import re
import typing

import numpy as np

from tli import significance
from tli.alignment import HISTOGRAM_EDGES, RETRIEVAL, Alignment, measurements
from tli.files import replacing, write_text

if typing.TYPE_CHECKING:
    import matplotlib.figure
    import rich.console

Layer = int | str

LABELS = {
    "gap": "gap",
    "p_at_1": "P@1",
    "mrr": "MRR",
    "cosine": "cosine, true",
    "mismatched": "cosine, mismatched",
    "sink_share": "sink share",
}
SPLITS = {"trained": "trained", "held_out": "held out"}
TESTED = ("gap", "p_at_1", "mrr", "cosine", "mismatched")
# trained and held-out retrieval have different numbers of candidates; their gains are not comparable
TESTED_BETWEEN = ("gap", "cosine")
DIFFERENCE = "trained - held_out"

# a rise of the cosine of which less than this part is gap is called a shift of all words
_SHIFT_BELOW = 1 / 3
_SINK_ABOVE = 0.5
_FEW_PAIRS = 30
_LOSS_AT_CHANCE = 0.99
_WIDE_COLUMNS = 110
_HATCHES = {"true": "////", "mismatched": "...."}
# dark blue and orange: apart for colour-blind readers, and dark against light in grey
_COLOURS = {"true": "#08519c", "mismatched": "#e6861a", "trained": "#08519c", "held_out": "#e6861a"}
_LANGUAGE_CODES = {"swahili": "sw", "english": "en"}


def write_report(
    folder: str | pathlib.Path, run: dict, alignments: dict[tuple[str, str, Layer], Alignment], console: rich.console.Console
) -> dict:
    """Write report.json, report.md, distributions.png, layers.png and README.md into ``folder``, print the tables, return the report.

    run          plain JSON values: config, model {name, family, blocks, width, sha256}, pairs {name, sha256, trained, held_out},
                 adapter {sha256, parameters, bytes}, training {steps, seconds, words_per_second, loss_first, loss_last, chance_loss},
                 versions, machine, missing_output (None or the reason), shuffled (bool). chance_loss may be None.
    alignments   by (split, when, layer): "trained" or "held_out", "before" or "after", 0..N or "output". Layer L must be there
                 before and after; other layers go into the curves, ``output`` into the tables, too.

    Each file is complete or absent; report.json comes last. No NaN is ever written.
    """
    folder = pathlib.Path(folder)
    report = assemble(run, alignments)
    _write_figure(folder / "distributions.png", draw_distributions(report, alignments))
    _write_figure(folder / "layers.png", draw_layers(report))
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "README.md", model_card(report))
    write_text(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    show(report, console)
    return report


def assemble(run: dict, alignments: dict[tuple[str, str, Layer], Alignment]) -> dict:
    """The facts of the run, and of them all: ``measurements`` in every layer, ``tests`` at L and ``output``, ``verdict``."""
    seed = run["config"]["seed"]
    records = [record for key, alignment in alignments.items() for record in measurements(alignment, *key, seed)]
    tests = []
    for layer in _layers(run, records):
        gains = {}
        for split in [s for s in SPLITS if (s, "after", layer) in alignments]:
            before, after = (alignments[split, when, layer] for when in ("before", "after"))
            for metric in TESTED:
                values = before.per_pair(metric), after.per_pair(metric)
                gains[split, metric] = values[1] - values[0]
                compared = significance.compare_paired(*values, seed)
                tests.append({"test": "paired", "split": split, "layer": layer, "metric": metric, **compared})
        for metric in TESTED_BETWEEN if ("held_out", "gap") in gains else ():
            compared = significance.welch(gains["trained", metric], gains["held_out", metric])
            tests.append({"test": "welch", "split": DIFFERENCE, "layer": layer, "metric": metric, **compared})
    report = {**run, "measurements": records, "tests": tests}
    return {**report, "verdict": verdict(report)}


def verdict(report: dict) -> str:
    """What the numbers show, in words: a paragraph for layer L and one for ``output``."""
    layer, *deeper = _layers(report, report["measurements"])
    first = [_control(report), _loss(report), *_at_layer(report, layer), _sink(report, layer)]
    last = _at_layer(report, deeper[0]) if deeper else [f"The output was not measured: {report['missing_output']}."]
    return "\n\n".join(" ".join(sentence for sentence in paragraph if sentence) for paragraph in (first, last))


def _at_layer(report: dict, layer: Layer) -> list[str]:
    shifts = [_shift(report, layer, split) for split in SPLITS]
    return [_carries_over(report, layer), _by_heart(report, layer), *shifts, *(_retrieval(report, layer, split) for split in SPLITS)]


def _control(report: dict) -> str:
    if not report["shuffled"]:
        return ""
    return "This is the control run: it was trained on shuffled pairs, so whatever rises here is not alignment."


def _loss(report: dict) -> str:
    last, chance = report["training"]["loss_last"], report["training"]["chance_loss"]
    if chance is None or last < _LOSS_AT_CHANCE * chance:
        return ""
    return f"Training learnt nothing: the loss ended at {last:.3f}, and chance is {chance:.3f}, the logarithm of the batch size."


def _carries_over(report: dict, layer: Layer) -> str:
    gap, mrr = (_gain(report, layer, metric, "held_out") for metric in ("gap", "mrr"))
    where = f"At {_place(layer)}"
    if gap is None:
        return f"{where}, no pairs were held out: nothing here shows whether words outside the training list were aligned."
    few = f" Only {gap['n']} pairs are held out, so these intervals are rough." if gap["n"] < _FEW_PAIRS else ""
    moved = f"{_signed(gap)} to {_number(_value(report, 'held_out', 'after', layer, 'gap')['value'])}"
    if gap["low"] > 0 and mrr["low"] > 0:
        rank = _value(report, "held_out", "after", layer, "mrr")
        reach = "the alignment reaches words that training never saw"
        if rank["low"] <= rank["chance"]:
            reach = "too little to lift retrieval above chance"
        elif report["shuffled"]:
            reach = "without one true pair to learn from"
        return f"{where}, the held-out gap rose by {moved} and the held-out MRR by {_signed(mrr)}: {reach}.{few}"
    if gap["low"] > 0:
        why = "words moved apart, but true partners were not found more easily. A gap that grows alone is a change of scale"
        return f"{where}, the held-out gap rose by {moved}, but the held-out MRR did not rise ({_signed(mrr)}): {why}.{few}"
    if gap["high"] < 0:
        return f"{where}, the held-out gap fell by {moved}: training did harm to words that it never saw.{few}"
    change = (
        f"the change of the held-out gap, {_signed(gap)}, may be zero" if gap["low"] < gap["high"] else "the held-out gap did not change"
    )
    if mrr["low"] > 0:
        return f"{where}, {change}, though the held-out MRR rose by {_signed(mrr)}.{few}"
    return f"{where}, {change}: nothing is shown to reach words that training never saw.{few}"


def _by_heart(report: dict, layer: Layer) -> str:
    between, trained, held_out = (_gain(report, layer, "gap", split) for split in (DIFFERENCE, *SPLITS))
    if between is None or not (trained["low"] > 0 or held_out["low"] > 0):
        return ""
    gains = f"Trained pairs' gap changed by {_signed(trained)}, held-out pairs' by {_signed(held_out)}"
    difference = f"{_signed(between)} (Welch's p {_p(between['p'])})"
    if between["low"] > 0:
        return f"{gains}: the difference, {difference}, was learnt by heart and stays with the trained words."
    if between["high"] < 0:
        return f"{gains}: held-out pairs gained more than trained ones, by {difference}."
    return f"{gains}: the difference, {difference}, may be zero, so trained words have no lead over new ones."


def _shift(report: dict, layer: Layer, split: str) -> str:
    cosine, mismatched, gap = (_gain(report, layer, metric, split) for metric in ("cosine", "mismatched", "gap"))
    if cosine is None or cosine["low"] <= 0 or gap["mean_gain"] >= _SHIFT_BELOW * cosine["mean_gain"]:
        return ""
    kind = "mostly a global shift" if gap["low"] > 0 else "a global shift, not alignment"
    return (
        f"The mean cosine of {SPLITS[split].replace(' ', '-')} true pairs rose by {_signed(cosine)}, "
        f"and so did that of mismatched pairs, by {_signed(mismatched)}: {kind}."
    )


def _retrieval(report: dict, layer: Layer, split: str) -> str:
    after = _value(report, split, "after", layer, "mrr")
    if after is None or (split == "trained" and after["low"] > after["chance"]):
        return ""
    side = "above" if after["low"] > after["chance"] else "below" if after["high"] < after["chance"] else "at"
    before = _value(report, split, "before", layer, "mrr")
    numbers = f"MRR {_number(after['value'])} {_interval(after)} against {_number(after['chance'])}"
    name = SPLITS[split].capitalize().replace(" ", "-")
    return f"{name} retrieval is {side} chance ({numbers}; before training {_number(before['value'])})."


def _sink(report: dict, layer: Layer) -> str:
    measured, trained = report["config"]["eval_pool_bos"], report["config"]["pool_bos"]
    share = max((r["value"] for r in report["measurements"] if r["metric"] == "sink_share" and r["layer"] == layer), default=0.0)
    if share <= _SINK_ABOVE or not (measured or trained):
        return ""
    if measured:
        return (
            f"These vectors pool the first position, the sink, which is {share:.0%} of them: their cosines mostly compare it with itself."
        )
    return f"Training pooled the first position, the sink, which is {share:.0%} of such a vector; the measurements leave it out."


def show(report: dict, console: rich.console.Console) -> None:
    """Print the tables and the verdict to ``console``: intervals beside the values if it is wide, below them if it is not."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wide = console.width >= _WIDE_COLUMNS

    def table(title: str, rows: list[list[str]]) -> None:
        padding = (0, int(wide), 0, 0)
        shown = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=padding, show_edge=False, pad_edge=False)
        for i, head in enumerate(rows[0]):
            shown.add_column(Text(head), justify="right" if i else "left", no_wrap=True)
        for label, *cells in rows[1:]:
            shown.add_row(Text(label if wide else label.replace(", ", ",\n").replace(" share", "\nshare")), *map(Text, cells))
        console.print(shown)
        console.print()

    console.print(Text(_summary(report)))
    console.print()
    for layer in _layers(report, report["measurements"]):
        table(f"{_place(layer).capitalize()}: mean and 95 % interval", _value_rows(report, layer, tuple(LABELS), " " if wide else "\n"))
        table(f"{_place(layer).capitalize()}: gain, after - before (paired t; difference: Welch's t)", _gain_rows(report, layer))
    console.print(Text(report["verdict"]))


def markdown(report: dict) -> str:
    """report.md: the verdict, the tables with both directions of retrieval, the figures, and all that a repetition needs."""
    parts = [f"# Alignment of {_languages(report)} at layer {report['config']['layer']}", _summary(report), "## Verdict", report["verdict"]]
    rows = ("gap", *RETRIEVAL, "cosine", "mismatched", "sink_share")
    for layer in _layers(report, report["measurements"]):
        parts += [f"## {_place(layer).capitalize()}", _markdown_table(_value_rows(report, layer, rows, " "))]
        parts += ["Gain, after - before:", _markdown_table(_gain_rows(report, layer))]
    parts += [_READING, "## Figures", "![Cosines of true and mismatched pairs](distributions.png)", "![Gap and MRR by layer](layers.png)"]
    facts = {key: report[key] for key in report if key not in ("measurements", "tests", "verdict")}
    parts += ["## To repeat it", "```json\n" + json.dumps(facts, indent=1, allow_nan=False) + "\n```"]
    return "\n\n".join(parts) + "\n"


def model_card(report: dict) -> str:
    """README.md of the adapter: front matter for the hub, the numbers with their controls, how to load it, what it is not for."""
    config, layer = report["config"], report["config"]["layer"]
    base = _hub_name(report["model"]["name"])
    codes = [code for code in map(_language_code, (config["source"], config["target"])) if code]
    front = [f"base_model: {json.dumps(base)}", "library_name: peft", "pipeline_tag: feature-extraction"]
    front += ["language:", *(f"- {code}" for code in codes)] if codes else []
    front += ["tags:", *(f"- {tag}" for tag in ("lora", "peft", "tli", "cross-lingual-alignment", "lexical-alignment"))]
    parts = ["---\n" + "\n".join(front) + "\n---", f"# {base}: {_languages(report)} words aligned at layer {layer}", _summary(report)]
    parts += ["## What the numbers show", report["verdict"]]
    for place in _layers(report, report["measurements"]):
        parts += [f"### {_place(place).capitalize()}", _markdown_table(_value_rows(report, place, tuple(LABELS), " "))]
    parts += [_READING, "## How to load it", _LOADING.format(base=base, layer=layer, pool=_pool(config))]
    return "\n\n".join([*parts, _CAVEATS.format(layer=layer)]) + "\n"


def draw_distributions(report: dict, alignments: dict[tuple[str, str, Layer], Alignment]) -> matplotlib.figure.Figure:
    """Figure 1: how the cosines of true and of mismatched pairs lie, before and after, at L and ``output``, trained and held out."""
    from matplotlib.figure import Figure

    layers = _layers(report, report["measurements"])
    splits = [split for split in SPLITS if (split, "after", layers[0]) in alignments]
    figure = Figure(figsize=(5.4 * len(splits), 0.8 + 3.2 * len(layers)), layout="constrained")
    panels = figure.subplots(len(layers), len(splits), squeeze=False, sharex="row", sharey="row")
    for row, layer in zip(panels, layers):
        edges = _common_edges([alignments[split, when, layer] for split in splits for when in ("before", "after")])
        for panel, split in zip(row, splits):
            for when, line, width in (("before", (0, (3, 1.5)), 1.2), ("after", "-", 2.0)):
                for kind, counts in _counts(alignments[split, when, layer], edges).items():
                    density, colour = counts / counts.sum() / np.diff(edges), _COLOURS[kind]
                    panel.stairs(density, edges, label=f"{kind} pairs, {when}", color=colour, linestyle=line, linewidth=width)
                    if when == "after":
                        hatching = {"facecolor": "none", "edgecolor": colour, "hatch": _HATCHES[kind], "linewidth": 0, "alpha": 0.4}
                        panel.stairs(density, edges, fill=True, **hatching)
            gaps = [_value(report, split, when, layer, "gap") for when in ("before", "after")]
            change = ", ".join(f"{gap['when']} {_number(gap['value'])} {_interval(gap)}" for gap in gaps)
            panel.set_title(f"{_place(layer)}, {SPLITS[split]}, n = {gaps[0]['n']:,} pairs\ngap {change}", fontsize=9)
            panel.set_xlabel("cosine")
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("share of pairs per unit of cosine")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.supxlabel("brackets: 95 % bootstrap interval of the mean gap", fontsize=8)
    return figure


def draw_layers(report: dict) -> matplotlib.figure.Figure:
    """Figure 2: gap and MRR by layer, with intervals: how far above layer L what training did can still be seen."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    chosen = report["config"]["layer"]
    place = {r["layer"]: r["layer"] for r in report["measurements"] if r["layer"] != "output"}
    if any(r["layer"] == "output" for r in report["measurements"]):
        place["output"] = report["model"]["blocks"] + 1
    # a line through two layers far apart would draw what nobody measured
    curves = len(place) > 2
    figure = Figure(figsize=(10.8, 4.6), layout="constrained")
    panels = dict(zip(("gap", "mrr"), figure.subplots(1, 2)))
    aside = 0 if curves else 0.03 * max(1, max(place.values()) - min(place.values()))
    for metric, panel in panels.items():
        for split, marker, side in (("trained", "o", -1), ("held_out", "s", 1)):
            for when, line, fill, later in (("before", "--", "white", 0), ("after", "-", _COLOURS[split], 1)):
                found = [r for r in report["measurements"] if (r["split"], r["when"], r["metric"]) == (split, when, metric)]
                if not found:
                    continue
                curve = {place[r["layer"]]: r for r in found}
                x = sorted(curve)
                value, low, high, chance = ([curve[at][name] for at in x] for name in ("value", "low", "high", "chance"))
                style = {"color": _COLOURS[split], "marker": marker, "markerfacecolor": fill, "markersize": 4 if curves else 7}
                label = f"{SPLITS[split]}, {when} (n = {found[0]['n']:,})"
                x = [at + aside * (side + later - 0.5) for at in x]
                panel.plot(x, value, label=label, linewidth=1.4, linestyle=line if curves else "", **style)
                if curves:
                    panel.fill_between(x, low, high, color=_COLOURS[split], alpha=0.18, linewidth=0)
                else:
                    panel.vlines(x, low, high, color=_COLOURS[split], linewidth=1.4, zorder=0)
                if metric == "mrr" and when == "after":
                    dots = {"color": _COLOURS[split], "linestyle": (0, (1, 1)), "linewidth": 2.2}
                    panel.axhline(chance[0], label=f"chance, {SPLITS[split]}", **dots)
        panel.axvline(chosen, color="0.6", linewidth=7, alpha=0.3, zorder=0)
        step = max(1, round(len(place) / 40) * 5)
        names = {at: f"L = {at}" if layer == chosen else str(layer) for layer, at in place.items()}
        ticks = [at for at in names if at in (chosen, place.get("output")) or at % step == 0 and abs(at - chosen) > 1]
        ticks = [at for at in ticks if at == place.get("output") or place.get("output", 1 << 30) - at > 2]
        panel.set_xticks(ticks, [names[at] for at in ticks])
        panel.set_xlabel("hidden state (blocks passed)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.05 if curves else 0.3)
    panels["gap"].axhline(0, color="0.3", linewidth=0.8)
    panels["gap"].set_ylabel("gap (cosine, true - mismatched)")
    panels["mrr"].set_yscale("log")
    shares = [share for share in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if share > panels["mrr"].get_ylim()[0]]
    panels["mrr"].set_yticks(shares, [f"{share:g}" for share in shares])
    panels["mrr"].yaxis.set_minor_formatter(NullFormatter())
    panels["mrr"].set_ylabel("MRR (mean of both directions, log scale)")
    figure.legend(*panels["mrr"].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    about = "bands and bars: 95 % bootstrap interval of the mean over pairs; dotted: MRR by chance; grey: the layer that was trained"
    figure.supxlabel(about, fontsize=8)
    return figure


def _counts(alignment: Alignment, edges: np.ndarray) -> dict[str, np.ndarray]:
    centres = (HISTOGRAM_EDGES[1:] + HISTOGRAM_EDGES[:-1]) / 2
    mismatched, _ = np.histogram(centres, edges, weights=alignment.mismatched_histogram)
    # the dot product of two unit vectors may pass 1 by its rounding
    true, _ = np.histogram(np.clip(alignment.cosine, -1, 1), edges)
    return {"true": true, "mismatched": mismatched}


def _common_edges(alignments: list[Alignment]) -> np.ndarray:
    """About 35 bins, made of whole bins of HISTOGRAM_EDGES, over the range in which any of the cosines lie."""
    counts = sum(sum(_counts(alignment, HISTOGRAM_EDGES).values()) for alignment in alignments)
    first, *_, last = np.flatnonzero(counts).repeat(2)
    joined = max(1, round((last + 1 - first) / 35))
    bins = min(-(-(last + 1 - first) // joined), (len(HISTOGRAM_EDGES) - 1) // joined)
    start = min(first, len(HISTOGRAM_EDGES) - 1 - bins * joined)
    return HISTOGRAM_EDGES[start : start + bins * joined + 1 : joined]


def _write_figure(path: pathlib.Path, figure: matplotlib.figure.Figure) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


_READING = """\
How to read this. The *gap* is the mean cosine of true pairs minus that of mismatched pairs. *P@1* is how often the true partner is the
nearest candidate, *MRR* the mean of 1/rank; both are means of the two directions unless one is named. *Chance* is their value for ranks
drawn by lot from as many candidates; trained and held-out lists differ in length, so in chance, too. The *sink share* is the part of a
word's states, by norm, that the first position would make up if it were pooled. A mean cosine that rises for mismatched pairs as well is
a shift of all words. Brackets are 95 % bootstrap intervals over pairs (BCa, 2,000 resamples); one without width means that all pairs
agree, not that the value is certain. The p-values are not corrected for their number: the held-out gap at layer L was the question, the
rest is context. The control for all of it is the same run with `--shuffle-pairs`."""

_LOADING = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

A word's vector is made from `output_hidden_states=True`, `hidden_states[{layer}]` of the word alone with its beginning-of-sequence token:
{pool}."""

_CAVEATS = """\
## What it is not

It aligns single words of one list at layer {layer}. It was not tested on sentences, translation or text generation; blocks above the
adapters see changed states, and the model's other abilities may have suffered. Held-out words come from the same list as the trained ones.
`report.md` and `report.json` hold all numbers, tests, versions and hashes."""


def _pool(config: dict) -> str:
    norms = {
        "final": "each token state through the model's final norm",
        "rms": "each token state over its root mean square",
        "none": "the token states",
    }
    first = "the first position included" if config["eval_pool_bos"] else "the first position left out"
    return f"{norms[config['token_norm']]}, their mean over the word's tokens, {first}, then unit length"


def _summary(report: dict) -> str:
    model, pairs, training, adapter = (report[key] for key in ("model", "pairs", "training", "adapter"))
    chance = "" if training["chance_loss"] is None else f" (chance {training['chance_loss']:.3f})"
    return (
        f"{_hub_name(model['name'])}, {model['blocks']} blocks; {pairs['name']}: {pairs['trained']:,} pairs trained"
        f"{', shuffled into false ones' if report['shuffled'] else ''}, {pairs['held_out']:,} held out; "
        f"{adapter['parameters']:,} adapter parameters, {training['steps']:,} steps in {training['seconds']:.1f} s, "
        f"{training['words_per_second']:,.0f} words/s; loss {training['loss_first']:.3f} -> {training['loss_last']:.3f}{chance}."
    )


def _value_rows(report: dict, layer: Layer, metrics: tuple[str, ...], between: str) -> list[list[str]]:
    """A head and a row per metric; ``between`` stands between a value and its interval."""
    splits = [split for split in SPLITS if _value(report, split, "after", layer, "gap")]
    counts = {split: f"(n={_value(report, split, 'after', layer, 'gap')['n']})" for split in splits}
    rows = [[""]]
    for split in splits:
        # in a narrow table a split's name and number stand side by side above its two columns
        above = (SPLITS[split], counts[split]) if between == "\n" else (f"{SPLITS[split]} {counts[split]}",) * 2
        rows[0] += [f"{above[0]}\nbefore", f"{above[1]}\nafter", "\nchance"]
    for metric in metrics:
        row = [_label(report, metric)]
        for split in splits:
            cells = [_value(report, split, when, layer, metric) for when in ("before", "after")]
            row += ["" if cell is None else f"{_number(cell['value'])}{between}{_interval(cell)}" for cell in cells]
            row.append(_number(cells[1]["chance"]) if cells[1] and cells[1]["chance"] is not None else "")
        rows += [row] if any(row[1:]) else []
    return rows


def _gain_rows(report: dict, layer: Layer) -> list[list[str]]:
    rows = [["", "pairs", "gain", "95 % interval", "t", "p", "Wilcoxon", "d_z"]]
    for test in sorted((t for t in report["tests"] if t["layer"] == layer), key=lambda t: TESTED.index(t["metric"])):
        paired = test["test"] == "paired"
        ranks = [_p(test["p_wilcoxon"]), "inf" if test["d_z"] is None else _number(test["d_z"], digits=2)] if paired else ["", ""]
        t, p = "inf" if test["t"] is None else _number(test["t"], digits=1), _p(test["p_t"] if paired else test["p"])
        gain = _number(test["mean_gain" if paired else "difference"], "+")
        rows.append([LABELS[test["metric"]], SPLITS.get(test["split"], "difference"), gain, _interval(test), t, p, *ranks])
    return [row if i == 0 or row[0] != rows[i - 1][0] else ["", *row[1:]] for i, row in enumerate(rows)]


def _markdown_table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("\n", " ").strip() for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def _label(report: dict, metric: str) -> str:
    source, target = report["config"]["source"], report["config"]["target"]
    if metric.endswith("_forward"):
        return f"{LABELS[metric.removesuffix('_forward')]}, {source} to {target}"
    return f"{LABELS[metric.removesuffix('_backward')]}, {target} to {source}" if metric.endswith("_backward") else LABELS[metric]


def _layers(run: dict, records: list[dict]) -> list[Layer]:
    return [run["config"]["layer"], *(["output"] if any(r["layer"] == "output" for r in records) else [])]


def _value(report: dict, *key: Layer) -> dict | None:
    return next((r for r in report["measurements"] if (r["split"], r["when"], r["layer"], r["metric"]) == key), None)


def _gain(report: dict, *key: Layer) -> dict | None:
    return next((t for t in report["tests"] if (t["layer"], t["metric"], t["split"]) == key), None)


def _place(layer: Layer) -> str:
    return "the output" if layer == "output" else f"layer {layer}"


def _number(value: float, sign: str = "", digits: int = 3) -> str:
    # a cosine of .99998 must not be shown as 1, nor -.0001 as -0
    digits = 5 if digits == 3 and 0.9995 <= abs(value) < 1 else digits
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def _interval(record: dict) -> str:
    low, high = (re.sub(r"^(-?)0", r"\1", f"{round(record[end], 3) + 0.0:.3f}") for end in ("low", "high"))
    return f"[{low}, {high}]"


def _signed(test: dict) -> str:
    return f"{_number(test['mean_gain'] if test['test'] == 'paired' else test['difference'], '+')} {_interval(test)}"


def _p(p: float) -> str:
    return "<1e-300" if p < 1e-300 else f"{p:.0e}" if p < 1e-3 else f"{p:.3f}"


def _languages(report: dict) -> str:
    return f"{report['config']['source'].capitalize()} and {report['config']['target'].capitalize()}"


def _language_code(name: str) -> str | None:
    return _LANGUAGE_CODES.get(name.lower()) or (name.lower() if re.fullmatch(r"[A-Za-z]{2,3}", name) else None)


def _hub_name(name: str) -> str:
    # a card is made to be published: of a local path it shows the last part only
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else pathlib.Path(name).name
