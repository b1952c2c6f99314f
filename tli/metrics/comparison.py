"""Adapters against the base: what the tests say of each pair's numbers at some layers, with and without each adapter.

``assess`` turns what ``layer_pass.measure_layers`` found into means with intervals and into tests: paired ones of each adapter against
the base, Welch's and an equivalence test of trained against held-out gain; Holm's correction runs over layers.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from tli.data import word_pairs
from tli.data.pair_store import Pair
from tli.metrics.alignment import CLIPSCORE, RETRIEVAL
from tli.metrics.clipscore import REF_CLIPSCORE
from tli.metrics.layer_pass import Measured
from tli.metrics.measures import DIFFERENCE
from tli.model.shape import Layer
from tli.stats.bootstrap import bootstrap_interval, word_clusters
from tli.stats.tests import P_VALUES, compare_groups, compare_rows, correct

TESTED = ("gap", "p_at_1", "mrr", "cosine", "mismatched", *CLIPSCORE, *REF_CLIPSCORE)
# trained and held-out retrieval have different numbers of candidates; their gains are not comparable
TESTED_BETWEEN = ("gap", "cosine")


def assess(
    found: dict[tuple[str, str | None, Layer], Measured], splits: Mapping[str, Sequence[Pair]], seed: int, margin: float
) -> tuple[list[dict], list[dict]]:
    """All means with their intervals, and all tests, of what ``measure_layers`` found.

    Intervals and sign-flip tests take pairs that share a word together. ``margin`` is the largest difference between the mean
    gains of trained and held-out pairs that counts as none.

    Returns:
        ``measurements``: a record for each (adapter, split, layer, metric); adapter None and when ``before`` for the base.
        ``tests``: ``paired`` ones, and with two splits ``welch`` ones with their ``equivalence``; every p with its ``_holm``.
    """
    measurements, tests, gains = [], [], {}
    for split, pairs in splits.items():
        here = {(stream, layer): measured for (of, stream, layer), measured in found.items() if of == split}
        clusters = word_clusters(len(pairs), word_pairs.false_negative_pairs(pairs))
        everything = {key: measured.per_pair() for key, measured in here.items()}
        means, changes = _assess(everything, clusters, seed)
        for record in means:
            measured = here[record["adapter"], record["layer"]]
            record["chance"] = measured.alignment.chance(record["metric"]) if record["metric"] in RETRIEVAL else None
        referenced = {key: measured.per_referenced_pair() for key, measured in here.items() if measured.referenced is not None}
        if referenced:
            numbers = next(measured.referenced.pairs for measured in here.values() if measured.referenced is not None)
            more_means, more_changes = _assess(referenced, clusters[numbers], seed)
            means, changes = means + [{**record, "chance": None} for record in more_means], changes + more_changes
        measurements += [{"split": split, **record} for record in means]
        tests += [{"test": "paired", "split": split, **record} for record in changes]
        for (stream, layer), metric in itertools.product(everything, TESTED_BETWEEN):
            if stream is not None:
                gains[split, stream, layer, metric] = everything[stream, layer][metric] - everything[None, layer][metric]
    if {"trained", "held_out"} <= splits.keys():
        for split, stream, layer, metric in gains:
            if split == "trained":
                compared = compare_groups(gains["trained", stream, layer, metric], gains["held_out", stream, layer, metric], margin)
                tests.append({"test": "welch", "split": DIFFERENCE, "adapter": stream, "layer": layer, "metric": metric, **compared})
    _correct_over_layers(tests)
    return measurements, tests


def _assess(values: dict[tuple[str | None, Layer], dict[str, np.ndarray]], clusters: np.ndarray, seed: int) -> tuple[list, list]:
    """Means and paired tests of per-pair values, by (stream, layer) and metric: all resampled alike, in one go."""
    keys = [(stream, layer, metric) for (stream, layer), metrics in values.items() for metric in metrics]
    matrix = np.stack([values[stream, layer][metric] for stream, layer, metric in keys])
    number, n = len(np.unique(clusters)), matrix.shape[1]
    lows, highs = bootstrap_interval(matrix, seed, clusters=clusters) if number > 1 else (np.full(len(keys), None),) * 2
    means = [
        {
            "when": "before" if stream is None else "after",
            "adapter": stream,
            "layer": layer,
            "metric": metric,
            "value": float(row.mean()),
            "low": None if low is None else float(low),
            "high": None if high is None else float(high),
            "n": n,
            "clusters": number,
        }
        for (stream, layer, metric), row, low, high in zip(keys, matrix, lows, highs)
    ]
    tested = [key for key in keys if key[0] is not None and key[2] in TESTED]
    before = np.stack([values[None, layer][metric] for _, layer, metric in tested])
    after = np.stack([values[stream, layer][metric] for stream, layer, metric in tested])
    changes = compare_rows(before, after, seed, clusters)
    return means, [
        {"adapter": stream, "layer": layer, "metric": metric, **change} for (stream, layer, metric), change in zip(tested, changes)
    ]


def _correct_over_layers(tests: list[dict]) -> None:
    families: dict[tuple, list[dict]] = {}
    for test in tests:
        families.setdefault((test["test"], test["split"], test["adapter"], test["metric"]), []).append(test)
    for (kind, *_), family in families.items():
        correct(family, P_VALUES if kind == "paired" else ("p",))
        if kind == "welch":
            correct([test["equivalence"] for test in family], ("p",))
