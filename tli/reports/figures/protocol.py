"""The protocol's figure: every switch's cosines and retrieval, before and after."""

from __future__ import annotations

import itertools
import typing

from tli.metrics.measures import SPLITS
from tli.reports.figures.style import COLOURS, DOTTED, legend_above, new_figure
from tli.reports.wording import find_value

if typing.TYPE_CHECKING:
    import matplotlib.figure


def draw_protocol(report: dict) -> matplotlib.figure.Figure:
    """The paper's protocol switch by switch: cosines of true and of mismatched pairs beside retrieval, trained and held out."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = report["rows"]
    figure, panels = new_figure((11, 1.6 + 0.66 * len(rows)), 2, 2, sharey=True)
    kinds = {"cosine": ("true", "o", -0.18), "mismatched": ("mismatched", "s", 0.18), "mrr": ("true", "o", 0.0)}
    for split, (cosines, ranks) in zip(SPLITS, panels):
        for (place, row), (metric, (kind, marker, aside)) in itertools.product(enumerate(rows), kinds.items()):
            for when, fill, later in (("before", "white", -0.08), ("after", COLOURS[kind], 0.08)):
                record = find_value(row, split, when, row["layer"], metric)
                if record is not None:
                    panel, at = ranks if metric == "mrr" else cosines, place + aside + later
                    # an interval may end at 0, which a logarithm has not
                    ends = [max(record["low"], record["chance"] / 10) if metric == "mrr" else record["low"], record["high"]]
                    panel.plot(ends, [at, at], color=COLOURS[kind], linewidth=1.2)
                    panel.plot(record["value"], at, color=COLOURS[kind], marker=marker, markerfacecolor=fill, markersize=4.5)
        first = find_value(rows[0], split, "after", rows[0]["layer"], "mrr")
        ranks.axvline(first["chance"], color="black", linestyle=DOTTED, linewidth=1.6, zorder=0)
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
        cosines.set_yticks(range(len(rows)), [row["title"] for row in rows])
        cosines.tick_params(axis="y", labelsize=8)
    panels[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    for kind, marker, name in (("true", "o", "true pairs"), ("mismatched", "s", "mismatched pairs")):
        for when, fill in (("before", "white"), ("after", COLOURS[kind])):
            panels[0, 0].plot([], [], label=f"{name}, {when}", color=COLOURS[kind], marker=marker, markerfacecolor=fill, linewidth=1.2)
    panels[0, 0].plot([], [], color="black", linestyle=DOTTED, linewidth=1.6, label="MRR by chance")
    legend_above(figure, [panels[0, 0]], 5)
    about = "each row changes one thing of the first; before and after training; bars: 95 % bootstrap interval of the mean over pairs"
    figure.supxlabel(about, fontsize=8)
    return figure
