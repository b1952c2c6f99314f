"""Adapters against the base: means with intervals, and tests of each pair's change, from the alignments of one pass over the layers.

The one comparison of tli: training, evaluation and the protocol report what it finds. Intervals and sign-flip tests take pairs that
share a word together; trained and held-out gains are compared by Welch's test and, with a margin, by an equivalence test; every p has
Holm's correction over the layers beside it.
"""

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tli.metrics.alignment import Alignment
from tli.metrics.measures import DIFFERENCE, MEASURES, SPLITS, names
from tli.model.shape import Layer
from tli.stats.bootstrap import means_with_intervals
from tli.stats.tests import P_VALUES, add_holm, compare_groups, compare_paired

# (split, stream, layer): a stream is the base or an adapter
Found = Mapping[tuple[str, Any, Any], Alignment]


def summarize(
    found: Found, seed: int, base: str | None = None, margin: float | None = None, layers: Collection[Layer | None] | None = None
) -> tuple[list[dict], list[dict]]:
    """All means with their intervals, and all tests, as flat records.

    found    by (split, stream, layer); in each layer the base was measured, too, wherever an adapter was
    seed     of the resampling
    base     the stream that the others are compared with
    margin   the largest difference between the mean gains of trained and held-out pairs that counts as none; None: no such test
    layers   those that are tested; None: all

    Returns:
        ``measurements``: a record for each (stream, split, layer, metric); the base's are ``before``, the others' ``after``.
        ``tests``: ``paired`` ones, and with two splits ``welch`` ones; every p with its ``_holm``.
        A record names its stream as ``adapter`` where base is None; with a named base there are just two, and ``when`` tells them apart.
    """
    measurements, tests = [], []
    for (split, stream, layer), alignment in found.items():
        which = {"layer": layer} if base is not None else {"adapter": stream, "layer": layer}
        when = "before" if stream == base else "after"
        measurements += [{"split": split, "when": when, **which, **record} for record in _means(alignment, seed)]
        if stream != base and (layers is None or layer in layers):
            changes = _changes(found[split, base, layer], alignment, seed)
            tests += [{"test": "paired", "split": split, **which, **change} for change in changes]
            if split == "trained" and ("held_out", stream, layer) in found:
                for metric in names("between"):
                    trained, held_out = (_gain(found[part, base, layer], found[part, stream, layer], metric) for part in SPLITS)
                    between = compare_groups(trained, held_out, margin)
                    tests.append({"test": "welch", "split": DIFFERENCE, **which, "metric": metric, **between})
    _correct_over_layers(tests)
    return measurements, tests


def _means(alignment: Alignment, seed: int) -> list[dict]:
    records = []
    for chosen, values, clusters in _of_same_pairs(alignment, names("recorded")):
        for metric, record in zip(chosen, means_with_intervals(values, seed, clusters)):
            records.append({"metric": metric, **record, "chance": alignment.chance(metric)})
    return records


def _changes(before: Alignment, after: Alignment, seed: int) -> list[dict]:
    """The tests of each metric's change: all resampled alike."""
    records = []
    for (chosen, old, clusters), (_, new, _) in zip(*(_of_same_pairs(found, names("tested")) for found in (before, after))):
        records += [{"metric": metric, **change} for metric, change in zip(chosen, compare_paired(old, new, seed, clusters))]
    return records


def _gain(before: Alignment, after: Alignment, metric: str) -> np.ndarray:
    return after.per_pair(metric) - before.per_pair(metric)


def _of_same_pairs(alignment: Alignment, chosen: tuple[str, ...]) -> list[tuple[list[str], np.ndarray, np.ndarray]]:
    """Those that were measured: names, values [m, n] and clusters [n], of all pairs and, apart, of the pairs that have references."""
    measured = {name: values for name in chosen if (values := MEASURES[name].per_pair(alignment)) is not None}
    groups = [(list(measured), alignment.clusters)]
    if alignment.referenced is not None:
        few = [name for name in measured if name.startswith("ref_")]
        rest = [name for name in measured if name not in few]
        groups = [(rest, alignment.clusters), (few, alignment.clusters[alignment.referenced.pairs])]
    return [(group, np.stack([measured[name] for name in group]), clusters) for group, clusters in groups]


def _correct_over_layers(tests: list[dict]) -> None:
    families = itertools.groupby(sorted(tests, key=_family), _family)
    for (kind, *_), members in families:
        family = list(members)
        add_holm(family, P_VALUES if kind == "paired" else ("p",))
        add_holm([test["equivalence"] for test in family if "equivalence" in test], ("p",))


def _family(test: dict) -> tuple[str, ...]:
    return tuple(str(test.get(key)) for key in ("test", "split", "adapter", "metric"))
