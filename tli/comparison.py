"""Adapters against the base: what each pair's numbers are at some layers, with and without each adapter, and what the tests say.

One pass over the model's blocks measures the base and all adapters at once. Of a pair it keeps cosine, mismatched cosine, gap, ranks
and CLIPScores (``alignment``, ``clipscore``). ``assess`` turns these into means with intervals and into tests: paired ones of
each adapter against the base, Welch's and an equivalence test of trained against held-out gain; Holm's correction runs over layers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from tli.alignment import CLIPSCORE, RETRIEVAL, Alignment, measure
from tli.clipscore import Scores, ref_clip_scores
from tli.data import word_pairs
from tli.data.batch import to_batch
from tli.data.packing import tokenise
from tli.data.pair_store import Pair
from tli.model.checkpoint import Checkpoint, sight
from tli.model.hidden_states import stream_layers
from tli.model.lora import Adapter
from tli.model.pooling import Pooling
from tli.model.shape import Layer
from tli.records import DIFFERENCE
from tli.runtime.device import Placement
from tli.stats.bootstrap import bootstrap_interval, word_clusters
from tli.stats.tests import P_VALUES, compare_groups, compare_rows, correct
from tli.streaming import sink_share

REF_CLIPSCORE = tuple(f"ref_{name}" for name in CLIPSCORE)
TESTED = ("gap", "p_at_1", "mrr", "cosine", "mismatched", *CLIPSCORE, *REF_CLIPSCORE)
# trained and held-out retrieval have different numbers of candidates; their gains are not comparable
TESTED_BETWEEN = ("gap", "cosine")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One stream's pairs in one layer; ``referenced`` is None where no pair has a further accepted gloss."""

    alignment: Alignment
    referenced: Scores | None

    def per_pair(self) -> dict[str, np.ndarray]:
        """float64 [B] by metric, of all pairs."""
        return {metric: self.alignment.per_pair(metric) for metric in self.alignment.metrics}

    def per_referenced_pair(self) -> dict[str, np.ndarray]:
        """float64 [M] by metric, of the pairs that have references."""
        return dict(zip(REF_CLIPSCORE, (self.referenced.score, self.referenced.mismatched, self.referenced.gap)))


class _Enough(Exception):
    """The last layer that was asked for is measured."""


def measure_layers(
    checkpoint: Checkpoint,
    splits: dict[str, Sequence[Pair]],
    layers: Sequence[Layer],
    pooling: Pooling,
    placement: Placement,
    streams: dict[str | None, Adapter | None],
    prefix: str,
    pool_bos: bool = False,
    done: Callable[[], None] = lambda: None,
) -> tuple[dict[tuple[str, str | None, Layer], Measured], str | None]:
    """Measure every split's pairs for each stream at these layers; blocks above the last of them are not read.

    Args:
        checkpoint:  an open checkpoint
        splits:      pairs by the name of their list; each list is measured by itself
        layers:      0..N and ``output``
        pooling:     token states -> word states; at ``output``, where states are normalised already, without its norm
        placement:   dtype, device and rounding of the weights
        streams:     adapters by name; None is the base
        prefix:      text before each word
        pool_bos:    pool the sink, too
        done:        called after each layer, measured or not

    Returns:
        What was measured, by (split, stream, layer), and why layers are missing, or None.
    """
    pairs = [pair for part in splits.values() for pair in part]
    owners = np.repeat(np.arange(len(pairs)), [len(pair.synonyms) for pair in pairs])
    texts = [pair.source for pair in pairs] + [pair.target for pair in pairs] + [gloss for pair in pairs for gloss in pair.synonyms]
    words = tokenise(checkpoint.tokenizer(), texts, sight(checkpoint), prefix)
    batch = to_batch(words.pack(np.arange(len(texts)), pool_bos), placement.dtype, placement.device)
    ends = list(itertools.accumulate(map(len, splits.values()), initial=0))
    parts = {split: (slice(*ends[i : i + 2]), word_pairs.same_meaning(part)) for i, (split, part) in enumerate(splits.items())}
    found = {}

    def visit(layer: Layer, states: Sequence[Tensor]) -> None:
        if layer in layers:
            for stream, nodes in zip(streams, states, strict=True):
                source, target, references = pooling.at(layer)(nodes, batch).tensor_split([len(pairs), 2 * len(pairs)])
                share = sink_share(nodes, batch)[: 2 * len(pairs)].view(2, -1).mean(0).cpu().numpy()
                for split, (own, same) in parts.items():
                    of_split = (owners >= own.start) & (owners < own.stop)
                    words_of = source[own], target[own]
                    referenced = None
                    if of_split.any():
                        referenced = ref_clip_scores(*words_of, references[of_split], owners[of_split] - own.start, same)
                    found[split, stream, layer] = Measured(measure(*words_of, same, share[own]), referenced)
        done()
        if layer == layers[-1]:
            raise _Enough

    try:
        reason = stream_layers(checkpoint, batch, words.rows, placement, list(streams.values()), visit)
    except _Enough:
        reason = None
    return found, reason


def assess(
    found: dict[tuple[str, str | None, Layer], Measured], splits: dict[str, Sequence[Pair]], seed: int, margin: float
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
        clusters = word_clusters(len(pairs), word_pairs.same_meaning(pairs))
        everything = {key: measured.per_pair() for key, measured in here.items()}
        means, changes = _assess(everything, clusters, seed)
        for record in means:
            measured = here[record["adapter"], record["layer"]]
            record["chance"] = measured.alignment.chance(record["metric"]) if record["metric"] in RETRIEVAL else None
        referenced = {key: measured.per_referenced_pair() for key, measured in here.items() if measured.referenced is not None}
        if referenced:
            numbers = next(measured.referenced.pairs for measured in here.values())
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
