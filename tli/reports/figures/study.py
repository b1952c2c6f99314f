"""A study's figures, readable in grey: what a rank buys, scores against rank, and scores against what they cost."""

from __future__ import annotations

import typing

from tli.model.shape import Layer
from tli.reports.figures.style import DARK, DOTTED, LIGHT, legend_above, new_figure
from tli.reports.study_results import ALIGNED, QUESTIONS, find, find_answer, find_free, find_harm, place_of
from tli.reports.wording import place_name, text_name

if typing.TYPE_CHECKING:
    import matplotlib.figure

_STYLES: dict[str, dict[str, typing.Any]] = {
    "early": {"color": DARK, "marker": "o", "linestyle": "-"},
    "full": {"color": LIGHT, "marker": "s", "linestyle": (0, (5, 2))},
}
_SCORES = {"mrr": "held-out MRR", "gap": "held-out gap\n(cosine, true - mismatched)", "clipscore": "held-out CLIPScore"}
# label, unit, scale
_COSTS = {
    "parameters": ("adapter parameters", 1, "log"),
    "training_seconds": ("training, seconds", 1, "log"),
    "peak_bytes": ("peak memory of the process, GiB", 2**30, "linear"),
}

# times the base's perplexity: more of it is drawn on a logarithmic axis
_MUCH_HARM = 3


def draw_bought(results: dict) -> matplotlib.figure.Figure:
    """What a rank buys where each arm's loss was: held-out MRR in several ways, beside what needs no training; memory; and harm."""
    texts = list(dict.fromkeys(one["text"] for one in results["harm"]))
    new = [name for name in QUESTIONS if any(answer["question"] == name for answer in results["answers"])]
    columns = max(len(new), 1 + len(texts))
    figure, panels = new_figure((3.1 * columns + 0.6, 6.8), 2, columns)
    for number in range(1, len(new)):
        panels[0][number].sharey(panels[0][0])
    for panel in (*panels[0][len(new) :], *panels[1][1 + len(texts) :]):
        panel.set_axis_off()
    for arm in results["search"]:
        for panel, name in zip(panels[0], new):
            of_rank = [find_answer(results, arm, rank, name) for rank in results["ranks"]]
            _curve(panel, arm, [one for one in of_rank if one is not None], f"{arm} arm")
            _shuffled(panel, arm, [one for one in [find_answer(results, arm, _control_rank(results), name, shuffled=True)] if one])
            if (free := find_free(results, place_of(results, arm, ALIGNED), name)) is not None:
                style = _STYLES[arm] | {"marker": "", "linestyle": DOTTED, "linewidth": 2.4}
                panel.axhline(free["value"], label=f"best without training, where the {arm} arm's loss was", **style)
            panel.set_title(QUESTIONS[name].label.replace("\n", " "), fontsize=10)
        memory = [find(results, arm, rank, ALIGNED, "mrr", "trained") for rank in results["ranks"]]
        _curve(panels[1][0], arm, memory, f"{arm} arm")
        for panel, text in zip(panels[1][1:], texts):
            _curve(panel, arm, [find_harm(results, arm, rank, text) for rank in results["ranks"]], f"{arm} arm")
            _shuffled(panel, arm, [find_harm(results, arm, _control_rank(results), text, shuffled=True)])
            panel.set_title(f"harm: perplexity of {text_name(text)},\ntimes the base's", fontsize=10)
            panel.axhline(1.0, color="0.35", linewidth=1.2, linestyle=(0, (8, 3, 1, 3)))
            if max(one["value"] for one in results["harm"]) > _MUCH_HARM:
                panel.set_yscale("log")
                _plain_numbers(panel.yaxis)
    panels[0][0].set_ylabel("held-out MRR")
    panels[0][0].set_ylim(bottom=0)
    panels[1][0].set_title("memory: the trained pairs' MRR", fontsize=10)
    panels[1][0].set_ylim(bottom=0)
    for panel in (*panels[0][: len(new)], *panels[1][: 1 + len(texts)]):
        _rank_axis(panel, results)
        panel.set_xlabel("LoRA rank R")
    legend_above(figure, panels[0], 2)
    figure.supxlabel(_about(results), fontsize=8)
    return figure


def draw_ranks(results: dict) -> matplotlib.figure.Figure:
    """MRR, gap and CLIPScore of held-out pairs against the rank, one column per layer."""
    layers = results["layers"]
    figure, panels = new_figure((3.9 * len(layers) + 0.6, 9.6), len(_SCORES), len(layers), sharex=True, sharey="row")
    for row, (metric, name) in zip(panels, _SCORES.items()):
        for panel, layer in zip(row, layers):
            for arm in results["search"]:
                _curve(panel, arm, _values(results, arm, layer, metric), f"{arm} arm")
                _shuffled(panel, arm, _values(results, arm, layer, metric, shuffled=True))
                if metric == "clipscore":
                    # mismatched pairs, without which a score says nothing
                    _curve(panel, arm, _values(results, arm, layer, "clipscore_mismatched"), f"{arm} arm, mismatched pairs", faint=True)
            before = next(v for v in results["values"] if _key(v) == ("before", layer, metric, "held_out"))
            panel.axhline(before["value"], color="0.35", linewidth=1.2, linestyle=(0, (8, 3, 1, 3)), label="before training")
            if metric == "mrr" and (free := find_free(results, layer, metric)) is not None:
                panel.axhline(free["value"], color="0.35", linewidth=2.4, linestyle=(0, (2, 1)), label="best without training")
            if before["chance"] is not None:
                panel.axhline(before["chance"], color="black", linewidth=1.4, linestyle=DOTTED, label="chance")
            _rank_axis(panel, results)
            if metric == "mrr":
                arms = [arm for arm in results["search"] if layer == ("output" if arm == "full" else results["config"]["layer"])]
                losses = f"\n(the {' and '.join(arms)} arm's loss is here)" if arms else "\n"
                panel.set_title(f"{place_name(layer)}{losses}", fontsize=10)
        row[0].set_ylabel(name)
        row[0].set_ylim(bottom=min(0.0, row[0].get_ylim()[0]))
    for panel in panels[-1]:
        panel.set_xlabel("LoRA rank R")
    legend_above(figure, panels[:, 0], len(layers) + 1)
    figure.supxlabel(_about(results), fontsize=8)
    return figure


def draw_costs(results: dict) -> matplotlib.figure.Figure:
    """Held-out MRR against adapter size, time and memory: at the output, and where each arm's loss was."""
    from matplotlib.ticker import LogLocator

    rows = [("each arm where its loss was", None)] + ([("at the output", "output")] if "output" in results["layers"] else [])
    figure, panels = new_figure((11.4, 3.6 * len(rows) + 0.8), len(rows), len(_COSTS), sharex="col", sharey="row")
    for row, (where, place) in zip(panels, rows):
        for panel, (cost, (_, unit, scale)) in zip(row, _COSTS.items()):
            for arm in results["search"]:
                layer = place or place_of(results, arm, ALIGNED)
                values = _values(results, arm, layer, "mrr")
                paid = {c["rank"]: c[cost] / unit for c in results["costs"] if c["arm"] == arm}
                xs = [paid[v["rank"]] for v in values]
                # only the size goes with the rank step by step
                style = _STYLES[arm] | ({} if cost == "parameters" else {"linestyle": "none"})
                panel.errorbar(xs, [v["value"] for v in values], _reach(values), label=f"{arm} arm", capsize=2.5, markersize=5, **style)
                for x, value in zip(xs, values):
                    text = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7, "color": "0.25"}
                    panel.annotate(str(value["rank"]), (x, value["value"]), **text)
            panel.set_xscale(scale)
            if scale == "log":
                panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if cost == "training_seconds" else (1,)))
                _plain_numbers(panel.xaxis)
            else:
                panel.set_xlim(0, 1.1 * max(c[cost] for c in results["costs"]) / unit)
            for arm in results["search"]:
                layer = place or place_of(results, arm, ALIGNED)
                style = {"color": _STYLES[arm]["color"] if place is None else "0.35", "linewidth": 1.6, "linestyle": DOTTED}
                if (free := find_free(results, layer, "mrr")) is not None:
                    panel.axhline(free["value"], label=f"best without training, {place_name(layer)}", **style)
        row[0].set_ylabel(f"held-out MRR,\n{where}")
        row[0].set_ylim(bottom=0)
    for panel, (name, *_) in zip(panels[-1], _COSTS.values()):
        panel.set_xlabel(name)
    legend_above(figure, panels[:, 0], 2)
    figure.supxlabel(f"numbers beside the points: rank; costs are medians over seeds. {_about(results)}", fontsize=8)
    return figure


def _rank_axis(panel, results: dict) -> None:
    from matplotlib.ticker import NullLocator

    panel.set_xscale("log", base=2)
    panel.set_xticks(results["ranks"], [str(rank) for rank in results["ranks"]])
    panel.xaxis.set_minor_locator(NullLocator())


def _control_rank(results: dict) -> int:
    return results["config"]["search_rank"]


def _plain_numbers(axis) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.15g}"))
    axis.set_minor_formatter(NullFormatter())


def _curve(panel, arm: str, values: list[dict], label: str, faint: bool = False) -> None:
    style = _STYLES[arm] | {"markersize": 5, "capsize": 2.5, "linewidth": 1.6}
    if faint:
        style |= {"markerfacecolor": "white", "markersize": 4, "linewidth": 0.9}
    # points of two arms at one rank must not hide each other's bars
    shift = {"early": 0.96, "full": 1.04}[arm]
    panel.errorbar([v["rank"] * shift for v in values], [v["value"] for v in values], _reach(values), label=label, **style)


def _shuffled(panel, arm: str, values: list[dict]) -> None:
    style = {"color": _STYLES[arm]["color"], "marker": {"early": "v", "full": "^"}[arm], "linestyle": "none", "markersize": 7}
    shift = {"early": 0.88, "full": 1.14}[arm]
    label = f"{arm} arm, trained on shuffled pairs"
    where = [v["rank"] * shift for v in values]
    panel.errorbar(where, [v["value"] for v in values], _reach(values), label=label, capsize=2.5, markerfacecolor="white", **style)


def _values(results: dict, arm: str, layer: Layer, metric: str, shuffled: bool = False) -> list[dict]:
    found = [v for v in results["values"] if _key(v) == ("after", layer, metric, "held_out")]
    return sorted((v for v in found if (v["arm"], v["shuffled"]) == (arm, shuffled)), key=lambda v: v["rank"])


def _key(value: dict) -> tuple:
    return value["when"], value["layer"], value["metric"], value["split"]


def _reach(values: list[dict]) -> list[list[float]] | None:
    if any(v["low"] is None for v in values):
        return None
    return [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]


def _about(results: dict) -> str:
    seeds, pairs = results["values"][0]["n"], results["pairs"]["held_out"]
    bars = "; bars: 95 % Student interval over seeds" if seeds > 1 else ""
    return f"n = {seeds} seed{'s' * (seeds > 1)} of {pairs:,} held-out pairs each, {results['steps']} steps{bars}"
