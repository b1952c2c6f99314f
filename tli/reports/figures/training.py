"""A training run's figures: distributions of cosines, curves over the layers before and after."""

from __future__ import annotations

import typing

import numpy as np

from tli.metrics.alignment import HISTOGRAM_EDGES, Alignment
from tli.metrics.measures import SPLITS
from tli.model.shape import Layer
from tli.reports.figures.style import (
    COLOURS,
    DOTTED,
    HATCHES,
    curve_with_band,
    draw_layer_axis,
    layer_positions,
    legend_above,
    mark_layer,
    new_figure,
)
from tli.reports.wording import aligned_layer, compared_layers, find_value, interval, number, place_name

if typing.TYPE_CHECKING:
    import matplotlib.figure


def draw_distributions(report: dict, alignments: dict[tuple[str, str, Layer], Alignment]) -> matplotlib.figure.Figure:
    """Figure 1: how the cosines of true and of mismatched pairs lie, before and after, at L and ``output``, trained and held out."""
    layers = compared_layers(report, report["measurements"])
    splits = [split for split in SPLITS if (split, "after", layers[0]) in alignments]
    figure, panels = new_figure((5.4 * len(splits), 0.8 + 3.2 * len(layers)), len(layers), len(splits), sharex="row", sharey="row")
    for row, layer in zip(panels, layers):
        edges = _common_edges([alignments[split, when, layer] for split in splits for when in ("before", "after")])
        for panel, split in zip(row, splits):
            for when, line, width in (("before", (0, (3, 1.5)), 1.2), ("after", "-", 2.0)):
                for kind, counts in _counts(alignments[split, when, layer], edges).items():
                    density, colour = counts / counts.sum() / np.diff(edges), COLOURS[kind]
                    panel.stairs(density, edges, label=f"{kind} pairs, {when}", color=colour, linestyle=line, linewidth=width)
                    if when == "after":
                        hatching = {"facecolor": "none", "edgecolor": colour, "hatch": HATCHES[kind], "linewidth": 0, "alpha": 0.4}
                        panel.stairs(density, edges, fill=True, **hatching)
            gaps = [find_value(report, split, when, layer, "gap") for when in ("before", "after")]
            change = ", ".join(f"{gap['when']} {number(gap['value'])} {interval(gap)}" for gap in gaps)
            panel.set_title(f"{place_name(layer)}, {SPLITS[split]}, n = {gaps[0]['n']:,} pairs\ngap {change}", fontsize=9)
            panel.set_xlabel("cosine")
        row[0].set_ylabel("share of pairs per unit of cosine")
    legend_above(figure, [panels[0, 0]], 4)
    figure.supxlabel("brackets: 95 % bootstrap interval of the mean gap", fontsize=8)
    return figure


def draw_layers(report: dict) -> matplotlib.figure.Figure:
    """Figure 2: gap and MRR by layer, with intervals: how far above layer L what training did can still be seen."""
    from matplotlib.ticker import NullFormatter

    aligned = aligned_layer(report)
    positions = layer_positions((record["layer"] for record in report["measurements"]), report["model"]["blocks"])
    chosen = positions[aligned]
    # a line through two layers far apart would draw what nobody measured
    curves = len(positions) > 2
    figure, [row] = new_figure((10.8, 4.6), 1, 2)
    panels = dict(zip(("gap", "mrr"), row))
    aside = 0 if curves else 0.03 * max(1, max(positions.values()) - min(positions.values()))
    for metric, panel in panels.items():
        for split, marker, side in (("trained", "o", -1), ("held_out", "s", 1)):
            for when, line, fill, later in (("before", "--", "white", 0), ("after", "-", COLOURS[split], 1)):
                found = [r for r in report["measurements"] if (r["split"], r["when"], r["metric"]) == (split, when, metric)]
                if not found:
                    continue
                found.sort(key=lambda record: positions[record["layer"]])
                xs = [positions[record["layer"]] + aside * (side + later - 0.5) for record in found]
                style = {"marker": marker, "markerfacecolor": fill, "label": f"{SPLITS[split]}, {when} (n = {found[0]['n']:,})"}
                if curves:
                    curve_with_band(panel, xs, found, COLOURS[split], linestyle=line, **style)
                else:
                    panel.plot(xs, [record["value"] for record in found], color=COLOURS[split], linestyle="", markersize=7, **style)
                    ends = ([record[end] for record in found] for end in ("low", "high"))
                    panel.vlines(xs, *ends, color=COLOURS[split], linewidth=1.4, zorder=0)
                if metric == "mrr" and when == "after":
                    label = f"chance, {SPLITS[split]}"
                    panel.axhline(found[0]["chance"], label=label, color=COLOURS[split], linestyle=DOTTED, linewidth=2.2)
        mark_layer(panel, chosen)
        draw_layer_axis(panel, positions, {} if aligned == "output" else {chosen: f"L = {aligned}"})
        panel.margins(x=0.05 if curves else 0.3)
    panels["gap"].axhline(0, color="0.3", linewidth=0.8)
    panels["gap"].set_ylabel("gap (cosine, true - mismatched)")
    panels["mrr"].set_yscale("log")
    shares = [share for share in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if share > panels["mrr"].get_ylim()[0]]
    panels["mrr"].set_yticks(shares, [f"{share:g}" for share in shares])
    panels["mrr"].yaxis.set_minor_formatter(NullFormatter())
    panels["mrr"].set_ylabel("MRR (mean of both directions, log scale)")
    legend_above(figure, [panels["mrr"]], 3)
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
    # whole numbers, of which numpy's types say less
    first: typing.Any
    last: typing.Any
    first, *_, last = np.flatnonzero(counts).repeat(2)
    joined = max(1, round((last + 1 - first) / 35))
    bins = min(-(-(last + 1 - first) // joined), (len(HISTOGRAM_EDGES) - 1) // joined)
    start = min(first, len(HISTOGRAM_EDGES) - 1 - bins * joined)
    return HISTOGRAM_EDGES[start : start + bins * joined + 1 : joined]
