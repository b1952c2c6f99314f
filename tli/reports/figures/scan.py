"""A scan's figure: cosines, sink share, gap and retrieval at every layer."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    import matplotlib.figure


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
