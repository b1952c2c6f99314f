"""A scan's figure: cosines, sink share, gap and retrieval at every layer."""

from __future__ import annotations

import typing

from tli.reports.figures.style import DARK, DOTTED, LIGHT, curve_with_band, draw_layer_axis, layer_positions, mark_layer, new_figure

if typing.TYPE_CHECKING:
    import matplotlib.figure


def draw_scan(report: dict) -> matplotlib.figure.Figure:
    """A scan's layers: mean cosines with BOS pooled and left out, the gap, and retrieval; of base and adapter where there is one."""
    streams = ["base"] if report["adapter"] is None else ["base", "adapter"]
    found = {(r["stream"], r["layer"], r["vectors"], r["metric"]): r for r in report["measurements"]}
    layers = list(dict.fromkeys(layer for _, layer, *_ in found))
    positions = layer_positions(layers, report["model"]["blocks"])
    figure, panels = new_figure((10.8, 7.6), 2, 2, sharex=True)
    pooled, words, gaps, ranks = panels.flat

    def curve(panel, stream: str, vectors: str, metric: str, label: str, **style) -> list[dict]:
        records = [found[stream, layer, vectors, metric] for layer in layers]
        inside = "white" if style.get("linestyle", "-") != "-" else style["color"]
        curve_with_band(panel, list(positions.values()), records, label=label, markerfacecolor=inside, **style)
        return records

    shown = streams[-1]
    for panel, vectors in ((pooled, "raw_bos"), (words, "word")):
        curve(panel, shown, vectors, "cosine", "true pairs", color=DARK, marker="o")
        curve(panel, shown, vectors, "mismatched", "mismatched pairs", color=LIGHT, marker="s", linestyle="--")
    curve(pooled, shown, "raw_bos", "sink_share", "share of the sink in a word", color="0.35", marker="^", linestyle=":")
    curve(pooled, shown, "raw_bos", "sink_only", "cosine that the sink alone gives", color="black", linestyle=(0, (4, 1, 1, 1)))
    of = "" if shown == "base" else ", with the adapter"
    pooled.set_title(f"BOS pooled, token states as they are (the paper's){of}", fontsize=9)
    words.set_title(f"BOS left out, token norm: {report['config']['token_norm']}{of}", fontsize=9)
    for panel in (pooled, words):
        panel.set_ylabel("mean cosine (share: of norms)" if panel is pooled else "mean cosine")
        panel.set_ylim(min(0.0, panel.get_ylim()[0]), 1.03)
    for stream, first, second in zip(streams, (DARK, LIGHT), (LIGHT if len(streams) == 1 else DARK, LIGHT), strict=False):
        name = "" if len(streams) == 1 else f", {stream}"
        curve(gaps, stream, "word", "gap", f"BOS left out{name}", color=first, marker="o")
        curve(gaps, stream, "raw_bos", "gap", f"BOS pooled{name}", color=second, marker="s", linestyle="--")
        curve(ranks, stream, "word", "mrr", f"MRR{name}", color=first, marker="o")
        hits = curve(ranks, stream, "word", "p_at_1", f"P@1{name}", color=second, marker="s", linestyle="--")
    gaps.axhline(0, color="0.3", linewidth=0.8)
    gaps.set_ylabel("gap (mean cosine, true - mismatched)")
    for metric, dots in (("mrr", DOTTED), ("p_at_1", (0, (1, 3)))):
        by_chance = found[streams[0], layers[0], "word", metric]["chance"]
        ranks.axhline(by_chance, color="black", linestyle=dots, linewidth=1.6, label=f"{'MRR' if metric == 'mrr' else 'P@1'} by chance")
    ranks.set_ylabel("MRR and P@1 (mean of both directions)")
    # the legend needs room above the bands
    ranks.set_ylim(0, 1.3 * ranks.get_ylim()[1])
    for panel in (pooled, words, gaps, ranks):
        mark_layer(panel, positions[report["choice"]["gap"]])
        panel.axvline(positions[report["choice"]["paper"]], color="black", linewidth=0.8, linestyle=(0, (6, 3)), zorder=0)
        panel.legend(fontsize=8, edgecolor="none", framealpha=0.8)
    for panel in (gaps, ranks):
        draw_layer_axis(panel, positions)
    about = f"{hits[0]['n']:,} pairs; bands: 95 % bootstrap interval of the mean over pairs; grey bar: the layer that the gap chooses, "
    choice = report["choice"]
    figure.supxlabel(f"{about}{choice['gap']}; dashed line: that of the paper's rule, {choice['paper']}", fontsize=8)
    return figure
