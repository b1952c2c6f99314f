"""What all figures share: how they are made and saved, their colours and hatches, curves with bands, and the axis of layers."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable, Mapping, Sequence

from tli.model.shape import Layer
from tli.runtime.files import atomic_write

if typing.TYPE_CHECKING:
    import matplotlib.figure

# dark blue and orange: apart for colour-blind readers, and dark against light in grey
DARK, LIGHT = "#08519c", "#e6861a"
COLOURS = {"true": DARK, "mismatched": LIGHT, "trained": DARK, "held_out": LIGHT}
HATCHES = {"true": "////", "mismatched": "...."}
# lines: what chance gives
DOTTED = (0, (1, 1))


def new_figure(size: tuple[float, float], rows: int = 1, columns: int = 1, **shared) -> tuple[matplotlib.figure.Figure, typing.Any]:
    """A figure, and its panels as an array [rows, columns].

    size     width and height, in inches
    shared   ``sharex`` and ``sharey``, as for matplotlib's ``subplots``
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def legend_above(figure: matplotlib.figure.Figure, panels: Iterable, columns: int) -> None:
    """One legend above all panels: of what is drawn in these, each name once."""
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def curve_with_band(panel, x: Sequence[float], records: Sequence[dict], color: str, **style) -> None:
    """A curve through the records' values, in the band of their intervals where they have some."""
    panel.plot(x, [record["value"] for record in records], color=color, **{"linewidth": 1.4, "markersize": 4} | style)
    if records[0]["low"] is not None:
        low, high = ([record[end] for record in records] for end in ("low", "high"))
        panel.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def layer_positions(layers: Iterable[Layer], blocks: int) -> dict[Layer, int]:
    """Where each layer stands on the axis: the number of blocks passed, ``output`` behind the last."""
    return {layer: layer if isinstance(layer, int) else blocks + 1 for layer in layers}


def draw_layer_axis(panel, positions: Mapping[Layer, int], named: Mapping[int, str] | None = None) -> None:
    """Name as many layers below the panel as there is room for, ``output`` and those in ``named`` (by position) always."""
    named = dict(named or {}) | ({positions["output"]: "output"} if "output" in positions else {})
    step = max(1, round(len(positions) / 40) * 5)
    # a panel is about 60 characters wide: a long name needs the room of its neighbours
    room = len(positions) / 60
    others = [at for at in positions.values() if at % step == 0 and all(abs(at - to) > room * len(name) for to, name in named.items())]
    ticks = {at: str(at) for at in others} | named
    panel.set_xticks(list(ticks), list(ticks.values()))
    panel.set_xlabel("hidden state (blocks passed)")


def mark_layer(panel, at: int) -> None:
    """A grey bar behind a layer that was chosen or trained."""
    panel.axvline(at, color="0.6", linewidth=7, alpha=0.3, zorder=0)


def save_figure(path: str | os.PathLike, figure: matplotlib.figure.Figure) -> None:
    """Write a figure as PNG, completely or not at all; a dollar sign in a name is one, and begins no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
