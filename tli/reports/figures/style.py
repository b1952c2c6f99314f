"""What all figures share: how they are saved, and colours and hatches that can be told apart in grey."""

from __future__ import annotations

import os
import typing

from tli.runtime.files import atomic_write

if typing.TYPE_CHECKING:
    import matplotlib.figure


HATCHES = {"true": "////", "mismatched": "...."}
# dark blue and orange: apart for colour-blind readers, and dark against light in grey
COLOURS = {"true": "#08519c", "mismatched": "#e6861a", "trained": "#08519c", "held_out": "#e6861a"}


def save_figure(path: str | os.PathLike, figure: matplotlib.figure.Figure) -> None:
    """Write a figure as PNG, completely or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
