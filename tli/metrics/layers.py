"""What every layer of a model shows about word pairs, in one pass, and which layer two rules would choose.

A word's vector depends on what goes into its mean, and so does all that is said of a layer. Four vectors are compared:

    word        each token state through the token norm, the first position (BOS, the sink) left out: what training aligns
    word_bos    the same with the first position pooled, and with it tokens that are the prefix's alone
    raw         token states as they are, the first position left out
    raw_bos     the same with the first position pooled, likewise: the paper's pilot

Everything is measured of ``word``; of the others what shows whether a mean cosine is the words' or the sink's.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from tli.data.batch import Batch
from tli.data.packing import TokenisedWords
from tli.data.pair_store import Pair
from tli.metrics.alignment import cosines, csls, measure
from tli.metrics.baseline_records import by_sub_token
from tli.metrics.geometry import centred, geometry, standardised
from tli.metrics.measures import MEASURES
from tli.metrics.sink import token_lengths
from tli.model.pooling import Pooling
from tli.model.shape import Layer
from tli.stats.bootstrap import means_with_intervals

VECTORS = ("word", "word_bos", "raw", "raw_bos")
_COSINES = ("cosine", "mismatched", "gap")
# what is measured of each kind of vector, pair by pair
_MEASURED = {
    "word": (*_COSINES, "auc", "mexa", *(name for name in MEASURES if name.startswith(("p_at_", "mrr")))),
    "raw_bos": (*_COSINES, "auc", "p_at_1", "mrr"),
}
# a pair's tokens, of both words
_TOKENS = ((2, 3), (4, 4), (5, 5))


@dataclasses.dataclass(frozen=True, slots=True)
class LayerScan:
    """One layer's measurements.

    per_pair   (vectors, metric) -> float64 [B], whose mean is the metric
    chance     (vectors, metric) -> what it would be by chance, where that is known
    of_set     (vectors, metric) -> a value of all words together
    clusters   int64 [B], ``word_clusters`` of the pairs
    """

    per_pair: dict[tuple[str, str], np.ndarray]
    chance: dict[tuple[str, str], float]
    of_set: dict[tuple[str, str], float]
    clusters: np.ndarray


def scan_layer(states: Tensor, batch: Batch, with_bos: Batch, pooling: Pooling, false_negatives: np.ndarray) -> LayerScan:
    """Measure one layer.

    states            [T, D]   token states
    batch             whose words leave the first position out
    with_bos          the same words with the first position pooled
    pooling           for ``word`` and ``word_bos``
    false_negatives   int64 [E, 2], ``false_negative_pairs`` of the pairs
    """
    per_pair: dict[tuple[str, str], np.ndarray] = {}
    chance: dict[tuple[str, str], float] = {}

    def keep(vectors: str, metric: str, values: np.ndarray, by_chance: float | None = None) -> None:
        per_pair[vectors, metric] = values
        if by_chance is not None:
            chance[vectors, metric] = by_chance

    def keep_cosines(vectors: str, before: str, source: Tensor, target: Tensor) -> None:
        cosine, mismatched = cosines(source, target, false_negatives)
        for metric, values in zip(_COSINES, (cosine, mismatched, cosine - mismatched), strict=True):
            keep(vectors, before + metric, values)

    plain = pooling.without_norm()
    kinds = ((pooling, batch), (pooling, with_bos), (plain, batch), (plain, with_bos))
    for vectors, (pool, pooled) in zip(VECTORS, kinds, strict=True):
        source, target = pool(states, pooled).chunk(2)
        if vectors not in _MEASURED:
            keep_cosines(vectors, "", source, target)
            continue
        alignment = measure(source, target, false_negatives)
        for metric in _MEASURED[vectors]:
            keep(vectors, metric, alignment.per_pair(metric), alignment.chance(metric))
        if vectors == "word":
            ways = csls(source, target, false_negatives)
            hits, by_chance = (np.mean([getattr(way, name)(1) for way in ways], axis=0) for name in ("hits_at", "hits_at_chance"))
            keep("word", "csls_p_at_1", hits, float(by_chance.mean()))
            keep_cosines("word", "centred_", centred(source), centred(target))
            keep_cosines("word", "standardised_", standardised(source), standardised(target))
            of_set = {("word", name): value for name, value in dataclasses.asdict(geometry(source, target)).items()}

    sink, own, squares = (lengths.double() for lengths in token_lengths(states, batch))
    keep("raw_bos", "sink_share", (sink / (sink + own)).view(2, -1).mean(0).cpu().numpy())
    # of tokens at right angles to the sink and to each other, the sink is all that two pooled words have in common
    keep("raw_bos", "sink_only", (sink / (sink.square() + squares).sqrt()).view(2, -1).prod(0).cpu().numpy())
    of_set["raw_bos", "norm_ratio"] = float(sink.mean() / (own.sum() / len(batch.indices)))
    return LayerScan(per_pair, chance, of_set, alignment.clusters)


def records(scans: Mapping[tuple[str, Layer], LayerScan], seed: int) -> list[dict]:
    """One flat record per value: stream, layer, vectors, metric, value, its 95 % interval (low, high; None of a set), n and chance.

    The interval is the bootstrap's over pairs, those that share a word drawn together.
    """
    found = []
    for (stream, layer), scan in scans.items():
        where = {"stream": stream, "layer": layer}
        means = means_with_intervals(np.stack(list(scan.per_pair.values())), seed, scan.clusters)
        for key, mean in zip(scan.per_pair, means, strict=True):
            found.append({**where, **_record(key, mean, scan.chance.get(key))})
        for key, value in scan.of_set.items():
            if key != ("word", "cka_chance"):
                by_chance = scan.of_set["word", "cka_chance"] if key == ("word", "cka") else None
                found.append({**where, **_record(key, {"value": value, "low": None, "high": None, "n": len(scan.clusters)}, by_chance)})
    return found


def _record(key: tuple[str, str], mean: dict, chance: float | None) -> dict:
    vectors, metric = key
    return {"vectors": vectors, "metric": metric, **{name: mean[name] for name in ("value", "low", "high", "n")}, "chance": chance}


def strata(pairs: Sequence[Pair], words: TokenisedWords) -> dict[str, np.ndarray]:
    """Kinds of pairs whose words may look alike for another reason than their meaning: name -> bool [B].

    A loan word or a shared sub-token is the same string in both languages; the number of a pair's tokens is that of both words.
    """
    tokens = (words.lengths - words.starts).reshape(2, -1).sum(0)
    loans = np.array([pair.loan is True for pair in pairs]), np.array([pair.loan is False for pair in pairs])
    found = {"loan words": loans[0], "no loan words": loans[1], **by_sub_token(words)}
    for low, high in _TOKENS:
        found[f"{low} tokens" if low == high else f"{low} to {high} tokens"] = (low <= tokens) & (tokens <= high)
    return found | {f"over {_TOKENS[-1][1]} tokens": tokens > _TOKENS[-1][1]}


def stratum_records(scans: Mapping[tuple[str, Layer], LayerScan], groups: Mapping[str, np.ndarray], seed: int) -> list[dict]:
    """The gap and P@1 of each group of pairs in each layer: records as of ``records``, and ``stratum``.

    Candidates and mismatched pairs are the whole list's, so that groups can be compared. A group that has no interval is left out.
    """
    found = []
    clusters = next(iter(scans.values())).clusters
    keys = [(place, ("word", metric)) for place in scans for metric in ("gap", "p_at_1")]
    values = np.stack([scans[place].per_pair[key] for place, key in keys])
    for name, group in groups.items():
        if len(np.unique(clusters[group])) < 2:
            continue
        for ((stream, layer), key), mean in zip(keys, means_with_intervals(values[:, group], seed, clusters[group]), strict=True):
            where = {"stratum": name, "stream": stream, "layer": layer}
            found.append({**where, **_record(key, mean, scans[stream, layer].chance.get(key))})
    return found


def by_layer(scans: Mapping[tuple[str, Layer], LayerScan], stream: str, vectors: str, metric: str) -> dict[Layer, np.ndarray]:
    """A metric's values, pair by pair, of one stream's layers."""
    return {layer: scan.per_pair[vectors, metric] for (of, layer), scan in scans.items() if of == stream}
