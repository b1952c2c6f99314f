"""Figures, readable in grey: distributions of cosines, curves over the layers before and after, a scan of layers, a step's memory."""

from __future__ import annotations

import itertools
import os
import typing

import numpy as np

from tli.metrics.alignment import HISTOGRAM_EDGES, Alignment
from tli.metrics.measures import SPLITS
from tli.model.shape import Layer
from tli.records import aligned_layer, compared_layers, find_value, interval, number, place_name
from tli.runtime.files import replacing

if typing.TYPE_CHECKING:
    import matplotlib.figure

_HATCHES = {"true": "////", "mismatched": "...."}
# dark blue and orange: apart for colour-blind readers, and dark against light in grey
_COLOURS = {"true": "#08519c", "mismatched": "#e6861a", "trained": "#08519c", "held_out": "#e6861a"}


def save_figure(path: str | os.PathLike, figure: matplotlib.figure.Figure) -> None:
    """Write a figure as PNG, completely or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def draw_distributions(report: dict, alignments: dict[tuple[str, str, Layer], Alignment]) -> matplotlib.figure.Figure:
    """Figure 1: how the cosines of true and of mismatched pairs lie, before and after, at L and ``output``, trained and held out."""
    from matplotlib.figure import Figure

    layers = compared_layers(report, report["measurements"])
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
            gaps = [find_value(report, split, when, layer, "gap") for when in ("before", "after")]
            change = ", ".join(f"{gap['when']} {number(gap['value'])} {interval(gap)}" for gap in gaps)
            panel.set_title(f"{place_name(layer)}, {SPLITS[split]}, n = {gaps[0]['n']:,} pairs\ngap {change}", fontsize=9)
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

    aligned = aligned_layer(report)
    place = {r["layer"]: r["layer"] for r in report["measurements"] if r["layer"] != "output"}
    if any(r["layer"] == "output" for r in report["measurements"]):
        place["output"] = report["model"]["blocks"] + 1
    chosen = place[aligned]
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
        names = {at: f"L = {at}" if layer == aligned != "output" else str(layer) for layer, at in place.items()}
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


def draw_scan(report: dict) -> matplotlib.figure.Figure:
    """A scan's layers: mean cosines with BOS pooled and left out, the gap, and retrieval; of base and adapter where there is one."""
    from matplotlib.figure import Figure

    streams = ["base"] if report["adapter"] is None else ["base", "adapter"]
    found = {(r["stream"], r["layer"], r["vectors"], r["metric"]): r for r in report["measurements"]}
    layers = list(dict.fromkeys(layer for _, layer, *_ in found))
    place = {layer: report["model"]["blocks"] + 1 if layer == "output" else layer for layer in layers}
    figure = Figure(figsize=(10.8, 7.6), layout="constrained")
    pooled, words, gaps, ranks = figure.subplots(2, 2, sharex=True).flat

    def curve(panel, stream: str, vectors: str, metric: str, label: str, **style) -> list[dict]:
        records = [found[stream, layer, vectors, metric] for layer in layers]
        x = list(place.values())
        options = {"linewidth": 1.4, "markersize": 4, "markerfacecolor": "white" if style.get("linestyle", "-") != "-" else style["color"]}
        panel.plot(x, [r["value"] for r in records], label=label, **options | style)
        if records[0]["low"] is not None:
            panel.fill_between(x, [r["low"] for r in records], [r["high"] for r in records], color=style["color"], alpha=0.18, linewidth=0)
        return records

    dark, light, grey = "#08519c", "#e6861a", "0.35"
    shown = streams[-1]
    for panel, vectors in ((pooled, "raw_bos"), (words, "word")):
        curve(panel, shown, vectors, "cosine", "true pairs", color=dark, marker="o")
        curve(panel, shown, vectors, "mismatched", "mismatched pairs", color=light, marker="s", linestyle="--")
    curve(pooled, shown, "raw_bos", "sink_share", "share of the sink in a word", color=grey, marker="^", linestyle=":")
    curve(pooled, shown, "raw_bos", "sink_only", "cosine that the sink alone gives", color="black", linestyle=(0, (4, 1, 1, 1)))
    of = "" if shown == "base" else ", with the adapter"
    pooled.set_title(f"BOS pooled, token states as they are (the paper's){of}", fontsize=9)
    words.set_title(f"BOS left out, token norm: {report['config']['token_norm']}{of}", fontsize=9)
    for panel in (pooled, words):
        panel.set_ylabel("mean cosine (share: of norms)" if panel is pooled else "mean cosine")
        panel.set_ylim(min(0.0, panel.get_ylim()[0]), 1.03)
    for stream, first, second in zip(streams, (dark, light), (light if len(streams) == 1 else dark, light), strict=False):
        name = "" if len(streams) == 1 else f", {stream}"
        curve(gaps, stream, "word", "gap", f"BOS left out{name}", color=first, marker="o")
        curve(gaps, stream, "raw_bos", "gap", f"BOS pooled{name}", color=second, marker="s", linestyle="--")
        curve(ranks, stream, "word", "mrr", f"MRR{name}", color=first, marker="o")
        hits = curve(ranks, stream, "word", "p_at_1", f"P@1{name}", color=second, marker="s", linestyle="--")
    gaps.axhline(0, color="0.3", linewidth=0.8)
    gaps.set_ylabel("gap (mean cosine, true - mismatched)")
    for metric, dots in (("mrr", (0, (1, 1))), ("p_at_1", (0, (1, 3)))):
        by_chance = found[streams[0], layers[0], "word", metric]["chance"]
        ranks.axhline(by_chance, color="black", linestyle=dots, linewidth=1.6, label=f"{'MRR' if metric == 'mrr' else 'P@1'} by chance")
    ranks.set_ylabel("MRR and P@1 (mean of both directions)")
    # the legend needs room above the bands
    ranks.set_ylim(0, 1.3 * ranks.get_ylim()[1])
    for panel in (pooled, words, gaps, ranks):
        panel.axvline(place[report["choice"]["gap"]], color="0.6", linewidth=7, alpha=0.3, zorder=0)
        panel.axvline(place[report["choice"]["paper"]], color="black", linewidth=0.8, linestyle=(0, (6, 3)), zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, edgecolor="none", framealpha=0.8)
    step = max(1, round(len(place) / 40) * 5)
    ticks = {at: "out" if layer == "output" else str(layer) for layer, at in place.items() if layer == "output" or at % step == 0}
    ticks = {at: name for at, name in ticks.items() if name == "out" or place.get("output", 1 << 30) - at > 1}
    for panel in (gaps, ranks):
        panel.set_xticks(list(ticks), list(ticks.values()))
        panel.set_xlabel("hidden state (blocks passed)")
    about = f"{hits[0]['n']:,} pairs; bands: 95 % bootstrap interval of the mean over pairs; grey bar: the layer that the gap chooses, "
    choice = report["choice"]
    figure.supxlabel(f"{about}{choice['gap']}; dashed line: that of the paper's rule, {choice['paper']}", fontsize=8)
    return figure


def draw_protocol(report: dict) -> matplotlib.figure.Figure:
    """The paper's protocol switch by switch: cosines of true and of mismatched pairs beside retrieval, trained and held out."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = report["rows"]
    figure = Figure(figsize=(11, 1.6 + 0.66 * len(rows)), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    kinds = {"cosine": ("true", "o", -0.18), "mismatched": ("mismatched", "s", 0.18), "mrr": ("true", "o", 0.0)}
    for split, (cosines, ranks) in zip(SPLITS, panels):
        for (place, row), (metric, (kind, marker, aside)) in itertools.product(enumerate(rows), kinds.items()):
            for when, fill, later in (("before", "white", -0.08), ("after", _COLOURS[kind], 0.08)):
                record = find_value(row, split, when, row["layer"], metric)
                if record is not None:
                    panel, at = ranks if metric == "mrr" else cosines, place + aside + later
                    # an interval may end at 0, which a logarithm has not
                    ends = [max(record["low"], record["chance"] / 10) if metric == "mrr" else record["low"], record["high"]]
                    panel.plot(ends, [at, at], color=_COLOURS[kind], linewidth=1.2)
                    panel.plot(record["value"], at, color=_COLOURS[kind], marker=marker, markerfacecolor=fill, markersize=4.5)
        first = find_value(rows[0], split, "after", rows[0]["layer"], "mrr")
        ranks.axvline(first["chance"], color="black", linestyle=(0, (1, 1)), linewidth=1.6, zorder=0)
        ranks.set_xscale("log")
        ranks.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ranks.xaxis.set_major_formatter("{x:g}")
        ranks.xaxis.set_minor_formatter(NullFormatter())
        cosines.set_xlabel("mean cosine")
        ranks.set_xlabel("MRR (mean of both directions, log scale)")
        for panel in (cosines, ranks):
            panel.set_title(f"{SPLITS[split]}, n = {first['n']:,} pairs", fontsize=9)
            panel.axhline(0.5, color="0.5", linewidth=0.8)
            panel.set_axisbelow(True)
            panel.grid(axis="y", color="0.88", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        cosines.set_yticks(range(len(rows)), [row["title"] for row in rows])
        cosines.tick_params(axis="y", labelsize=8)
    panels[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    for kind, marker, name in (("true", "o", "true pairs"), ("mismatched", "s", "mismatched pairs")):
        for when, fill in (("before", "white"), ("after", _COLOURS[kind])):
            panels[0, 0].plot([], [], label=f"{name}, {when}", color=_COLOURS[kind], marker=marker, markerfacecolor=fill, linewidth=1.2)
    panels[0, 0].plot([], [], color="black", linestyle=(0, (1, 1)), linewidth=1.6, label="MRR by chance")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    about = "each row changes one thing of the first; before and after training; bars: 95 % bootstrap interval of the mean over pairs"
    figure.supxlabel(about, fontsize=8)
    return figure


def draw_memory(curves: dict[str, np.ndarray], spans: list[tuple[str, float, float]]) -> matplotlib.figure.Figure:
    """One step's memory over time, stacked by category, what stays at the bottom; ``spans`` are named parts of it, in ms."""
    from matplotlib.figure import Figure

    names = [name for name in curves if name != "ms"]
    shades = dict(zip(names, ("#2b3a4a", "#54708c", "#08519c", "#e6861a", "#a63603", "#f6c98b")))
    hatches = dict(zip(names, ("", "", "", "////", "", "....")))
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    panel = figure.subplots()
    below = np.zeros(len(curves["ms"]))
    for name in names:
        above = below + curves[name] / 1e6
        look = {"facecolor": shades[name], "edgecolor": "white", "hatch": hatches[name], "linewidth": 0, "step": "post"}
        label = f"{name} (at most {max(curves[name]) / 1e6:,.1f} MB)"
        panel.fill_between(curves["ms"], below, above, label=label, **look)
        below = above
    top = int(below.argmax())
    panel.plot(curves["ms"][top], below[top], marker="v", color="black", markersize=6)
    panel.annotate(f"{below[top]:,.0f} MB", (curves["ms"][top], below[top]), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    ends = {name: (first, last) for name, first, last in spans}
    if {"loss", "optimiser"} <= ends.keys():
        spans = [*spans, ("backward", ends["loss"][1], ends["optimiser"][0])]
    for name, first, last in spans:
        panel.axvline(first, color="0.35", linestyle=(0, (1, 2)), linewidth=0.9)
        panel.axvline(last, color="0.35", linestyle=(0, (1, 2)), linewidth=0.9)
        panel.text(
            (first + last) / 2,
            1.01,
            name,
            transform=panel.get_xaxis_transform(),
            ha="right" if name == "optimiser" else "center",
            fontsize=8,
        )
    panel.set_xlim(curves["ms"][0], curves["ms"][-1])
    panel.set_ylim(0, 1.1 * below[top])
    panel.set_xlabel("ms of one step, under the profiler (slower than without)")
    panel.set_ylabel("MB allocated")
    panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
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
