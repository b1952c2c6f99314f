"""A report's records, found and written: what tables, figures and the verdict have in common.

A report's ``measurements`` are flat records of a value with its interval; its ``tests`` are records of a gain with its own.
"""

from __future__ import annotations

import re
from typing import Any

from tli.model.shape import Layer

# a record, or None; ``Any`` beside it, because whether there is one is known where it is asked for, and most who ask know there is
Found = dict[str, Any] | Any


# what cannot be told from so few or so equal values
UNDEFINED = "-"
# a rise of the cosine of which less than this part is gap is called a shift of all words
SHIFT_BELOW = 1 / 3
# p-values below this are called a difference
SIGNIFICANT = 0.05


def compared_layers(run: dict, records: list[dict]) -> list[Layer]:
    """The layers that tables and tests are about: L, and ``output`` where it was measured."""
    return [run["config"]["layer"], *(["output"] if any(r["layer"] == "output" for r in records) else [])]


def aligned_layer(run: dict) -> Layer:
    """Where the loss was: L, or ``output`` in the full arm."""
    return "output" if run["config"].get("arm") == "full" else run["config"]["layer"]


def find_value(report: dict, *key: Layer) -> Found:
    """The measurement with this (split, when, layer, metric), or None."""
    return next((r for r in report["measurements"] if (r["split"], r["when"], r["layer"], r["metric"]) == key), None)


def find_gain(report: dict, *key: Layer) -> Found:
    """The test with this (layer, metric, split), or None; the split ``DIFFERENCE`` is trained against held out."""
    return next((t for t in report["tests"] if (t["layer"], t["metric"], t["split"]) == key), None)


def place_name(layer: Layer) -> str:
    """``layer 2`` or ``the output``."""
    return "the output" if layer == "output" else f"layer {layer}"


def text_name(file: str) -> str:
    """``swahili`` of the shipped page ``running-text-swahili.txt``."""
    return file.removesuffix(".txt").removeprefix("running-text-")


def side(record: dict, level: float = 0.0) -> str:
    """``above``, ``below`` or ``at``: where a record's 95 % interval lies against a level; without an interval it is ``at``."""
    if record["low"] is None:
        return "at"
    return "above" if record["low"] > level else "below" if record["high"] < level else "at"


def side_of_chance(record: dict) -> str:
    return side(record, record["chance"])


def is_shift(cosine: dict, gap: dict) -> bool:
    """Whether true pairs' mean cosine surely rose and little of the rise is gap: all words were drawn together."""
    return side(cosine) == "above" and gap["mean_gain"] < SHIFT_BELOW * cosine["mean_gain"]


def is_significant(p: float | None) -> bool:
    return p is not None and p < SIGNIFICANT


def number(value: float, sign: str = "", digits: int = 3) -> str:
    """A value as the tables write it."""
    # a cosine of .99998 must not be shown as 1, nor -.0001 as -0
    digits = 5 if digits == 3 and 0.9995 <= abs(value) < 1 else digits
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def number_or_dash(value: float | None, sign: str = "", digits: int = 3) -> str:
    return UNDEFINED if value is None else number(value, sign, digits)


def interval(record: dict) -> str:
    """The 95 % interval of a measurement or a test, in brackets; a dash where there is none."""
    if record["low"] is None:
        return UNDEFINED
    low, high = (re.sub(r"^(-?)0", r"\1", f"{round(record[end], 3) + 0.0:.3f}") for end in ("low", "high"))
    return f"[{low}, {high}]"


def signed_gain(test: dict) -> str:
    """A test's gain or difference with its interval."""
    return f"{number(test['mean_gain'] if test['test'] == 'paired' else test['difference'], '+')} {interval(test)}"


def p_value(p: float | None) -> str:
    """A p-value: three decimals, or its order of magnitude where that is small; a dash for a test that could not be made."""
    return UNDEFINED if p is None else "<1e-300" if p < 1e-300 else f"{p:.0e}" if p < 1e-3 else f"{p:.3f}"
