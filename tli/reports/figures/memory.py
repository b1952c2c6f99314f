"""A step's memory over time, by category."""

from __future__ import annotations

import typing

import numpy as np

from tli.reports.figures.style import legend_above, new_figure

if typing.TYPE_CHECKING:
    import matplotlib.figure


def draw_memory(curves: dict[str, np.ndarray], spans: list[tuple[str, float, float]]) -> matplotlib.figure.Figure:
    """One step's memory over time, stacked by category, what stays at the bottom; ``spans`` are named parts of it, in ms."""
    names = [name for name in curves if name != "ms"]
    shades = dict(zip(names, ("#2b3a4a", "#54708c", "#08519c", "#e6861a", "#a63603", "#f6c98b")))
    hatches = dict(zip(names, ("", "", "", "////", "", "....")))
    figure, [[panel]] = new_figure((9.6, 4.8))
    below = np.zeros(len(curves["ms"]))
    for name in names:
        above = below + curves[name] / 1e6
        look = {"facecolor": shades[name], "edgecolor": "white", "hatch": hatches[name], "linewidth": 0}
        label = f"{name} (at most {max(curves[name]) / 1e6:,.1f} MB)"
        panel.fill_between(curves["ms"], below, above, label=label, step="post", **look)
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
        aligned = "right" if name == "optimiser" else "center"
        panel.text((first + last) / 2, 1.01, name, transform=panel.get_xaxis_transform(), ha=aligned, fontsize=8)
    panel.set_xlim(curves["ms"][0], curves["ms"][-1])
    panel.set_ylim(0, 1.1 * below[top])
    panel.set_xlabel("ms of one step, under the profiler (slower than without)")
    panel.set_ylabel("MB allocated")
    legend_above(figure, [panel], 3)
    return figure
