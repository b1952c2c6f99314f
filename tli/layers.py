"""What every layer of a model shows about word pairs, in one pass, and which layer two rules would choose.

A word's vector depends on what goes into its mean, and so does all that is said of a layer. Four vectors are compared:

    word        each token state through the token norm, the first position (BOS, the sink) left out: what training aligns
    word_bos    the same with the first position pooled, and with it tokens that are the prefix's alone
    raw         token states as they are, the first position left out
    raw_bos     the same with the first position pooled, likewise: the paper's pilot

Everything is measured of ``word``; of the others what shows whether a mean cosine is the words' or the sink's.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from tli.alignment import cosines, csls, measure
from tli.data.batch import Batch, to_batch
from tli.data.packing import DEFAULT_WIDTH, TokenisedWords
from tli.data.pair_store import Pair
from tli.geometry import centred, geometry, standardised
from tli.model.checkpoint import Checkpoint
from tli.model.hidden_states import stream_layers
from tli.model.lora import Adapter
from tli.model.pooling import Pooling
from tli.model.shape import Layer
from tli.runtime.device import Placement
from tli.runtime.errors import TliError
from tli.stats.bootstrap import bootstrap_interval, word_clusters
from tli.streaming import token_lengths

VECTORS = ("word", "word_bos", "raw", "raw_bos")
_BOTH_WAYS = tuple(f"{metric}{way}" for metric in ("p_at_1", "p_at_5", "mrr") for way in ("", "_forward", "_backward"))
_COSINES = ("cosine", "mismatched", "gap")
# what is measured of each kind of vector, pair by pair
_MEASURED = {
    "word": (*_COSINES, "auc", "mexa", *_BOTH_WAYS),
    "raw_bos": (*_COSINES, "auc", "p_at_1", "mrr"),
}
# a pair's tokens, of both words
_TOKENS = ((2, 3), (4, 4), (5, 5))
# from this share on a pooled word is mostly sink
SINK_ABOVE = 0.5
# a mismatched cosine of at least this part of the true one is as high
AS_HIGH = 0.95


@dataclasses.dataclass(frozen=True, slots=True)
class LayerScan:
    """One layer's measurements.

    per_pair   (vectors, metric) -> float64 [B], whose mean is the metric
    chance     (vectors, metric) -> what it would be by chance, where that is known
    of_set     (vectors, metric) -> a value of all words together
    """

    per_pair: dict[tuple[str, str], np.ndarray]
    chance: dict[tuple[str, str], float]
    of_set: dict[tuple[str, str], float]


def scan_layers(
    checkpoint: Checkpoint,
    words: TokenisedWords,
    same: np.ndarray,
    pooling: Pooling,
    placement: Placement,
    streams: Mapping[str, Adapter | None],
    done: Callable[[], None] = lambda: None,
    width: int = DEFAULT_WIDTH,
) -> tuple[dict[tuple[str, Layer], LayerScan], str | None]:
    """Measure all layers 0..N and ``output`` for each stream in one pass, with one block in memory at a time.

    Args:
        checkpoint:  an open checkpoint
        words:       all words, sources of all pairs first, then targets
        same:        ``same_meaning`` of the pairs
        pooling:     token states -> word states, for ``word`` and ``word_bos``
        placement:   as for ``truncate``
        streams:     name -> adapter, or None for the base
        done:        called when a layer is measured
        width:       of the bins that words are packed in; changes nothing but the time

    Returns:
        The measurements by (stream, layer), and why the pass ended before ``output``, or None.

    Raises:
        TliError: an adapter that does not fit the model, a pair without a stranger, states that are not finite.
    """
    numbers = np.arange(len(words))
    batch, with_bos = (to_batch(words.pack(numbers, pool_bos, width), placement.dtype, placement.device) for pool_bos in (False, True))
    scans: dict[tuple[str, Layer], LayerScan] = {}

    def visit(layer: Layer, states: Sequence[Tensor]) -> None:
        for stream, nodes in zip(streams, states, strict=True):
            scans[stream, layer] = scan_layer(nodes, batch, with_bos, pooling.at(layer), same)
        done()

    reason = stream_layers(checkpoint, batch, words.rows, placement, list(streams.values()), visit)
    if not scans:
        raise TliError(checkpoint.name, "at least the first block must be there", reason, "download the missing file")
    return scans, reason


def scan_layer(states: Tensor, batch: Batch, with_bos: Batch, pooling: Pooling, same: np.ndarray) -> LayerScan:
    """Measure one layer.

    states     [T, D]   token states
    batch      whose words leave the first position out
    with_bos   the same words with the first position pooled
    pooling    for ``word`` and ``word_bos``
    same       int64 [E, 2], ``same_meaning`` of the pairs
    """
    per_pair: dict[tuple[str, str], np.ndarray] = {}
    chance: dict[tuple[str, str], float] = {}

    def keep(vectors: str, metric: str, values: np.ndarray, by_chance: float | None = None) -> None:
        per_pair[vectors, metric] = values
        if by_chance is not None:
            chance[vectors, metric] = by_chance

    def keep_cosines(vectors: str, before: str, source: Tensor, target: Tensor) -> None:
        cosine, mismatched = cosines(source, target, same)
        for metric, values in zip(_COSINES, (cosine, mismatched, cosine - mismatched), strict=True):
            keep(vectors, before + metric, values)

    plain = pooling.plain()
    kinds = ((pooling, batch), (pooling, with_bos), (plain, batch), (plain, with_bos))
    for vectors, (pool, pooled) in zip(VECTORS, kinds, strict=True):
        source, target = pool(states, pooled).chunk(2)
        if vectors not in _MEASURED:
            keep_cosines(vectors, "", source, target)
            continue
        alignment = measure(source, target, same)
        for metric in _MEASURED[vectors]:
            keep(vectors, metric, alignment.per_pair(metric), alignment.chance(metric))
        if vectors == "word":
            ways = csls(source, target, same)
            hits, by_chance = (np.mean([getattr(way, name)(1) for way in ways], axis=0) for name in ("within", "within_chance"))
            keep("word", "csls_p_at_1", hits, float(by_chance.mean()))
            keep_cosines("word", "centred_", centred(source), centred(target))
            keep_cosines("word", "standardised_", standardised(source), standardised(target))
            of_set = {("word", name): value for name, value in dataclasses.asdict(geometry(source, target)).items()}

    sink, own, squares = (lengths.double() for lengths in token_lengths(states, batch))
    keep("raw_bos", "sink_share", (sink / (sink + own)).view(2, -1).mean(0).cpu().numpy())
    # of tokens at right angles to the sink and to each other, the sink is all that two pooled words have in common
    keep("raw_bos", "sink_only", (sink / (sink.square() + squares).sqrt()).view(2, -1).prod(0).cpu().numpy())
    of_set["raw_bos", "norm_ratio"] = float(sink.mean() / (own.sum() / len(batch.indices)))
    return LayerScan(per_pair, chance, of_set)


def records(scans: Mapping[tuple[str, Layer], LayerScan], same: np.ndarray, seed: int) -> list[dict]:
    """One flat record per value: stream, layer, vectors, metric, value, its 95 % interval (low, high; None of a set), n and chance.

    The interval is the bootstrap's over pairs, those that share a word drawn together.
    """
    found = []
    for place, scan in scans.items():
        values = np.stack(list(scan.per_pair.values()))
        pairs = values.shape[1]
        ends = bootstrap_interval(values, seed, clusters=word_clusters(pairs, same))
        for key, value, low, high in zip(scan.per_pair, values.mean(1), *ends, strict=True):
            found.append(_record((*place, *key), value, low, high, pairs, scan.chance.get(key)))
        for key, value in scan.of_set.items():
            if key != ("word", "cka_chance"):
                by_chance = scan.of_set["word", "cka_chance"] if key == ("word", "cka") else None
                found.append(_record((*place, *key), value, None, None, pairs, by_chance))
    return found


def _record(key: tuple, value: float, low: float | None, high: float | None, n: int, chance: float | None) -> dict:
    stream, layer, vectors, metric = key
    ends = [None if end is None else float(end) for end in (low, high)]
    return {
        "stream": stream,
        "layer": layer,
        "vectors": vectors,
        "metric": metric,
        "value": float(value),
        "low": ends[0],
        "high": ends[1],
        "n": n,
        "chance": chance,
    }


def strata(pairs: Sequence[Pair], words: TokenisedWords) -> dict[str, np.ndarray]:
    """Kinds of pairs whose words may look alike for another reason than their meaning: name -> bool [B].

    A loan word or a shared sub-token is the same string in both languages; the number of a pair's tokens is that of both words.
    """
    own = [set(words.ids[begin + start : end].tolist()) for begin, start, end in zip(words.indptr, words.starts, words.indptr[1:])]
    shared = np.array([bool(source & target) for source, target in zip(own, own[len(pairs) :])])
    tokens = (words.lengths - words.starts).reshape(2, -1).sum(0)
    loans = np.array([pair.loan is True for pair in pairs]), np.array([pair.loan is False for pair in pairs])
    found = {"loan words": loans[0], "no loan words": loans[1], "share a sub-token": shared, "share none": ~shared}
    for low, high in _TOKENS:
        found[f"{low} tokens" if low == high else f"{low} to {high} tokens"] = (low <= tokens) & (tokens <= high)
    return found | {f"over {_TOKENS[-1][1]} tokens": tokens > _TOKENS[-1][1]}


def stratum_records(
    scans: Mapping[tuple[str, Layer], LayerScan], groups: Mapping[str, np.ndarray], same: np.ndarray, seed: int
) -> list[dict]:
    """The gap and P@1 of each group of pairs in each layer: records as of ``records``, and ``stratum``.

    Candidates and strangers are the whole list, so that groups can be compared. A group that has no interval is left out.
    """
    metrics, found = ("gap", "p_at_1"), []
    clusters = word_clusters(next(len(group) for group in groups.values()), same)
    keys = [(*place, "word", metric) for place in scans for metric in metrics]
    values = np.stack([scans[key[:2]].per_pair[key[2:]] for key in keys])
    for name, group in groups.items():
        if len(np.unique(clusters[group])) < 2:
            continue
        mine = values[:, group]
        ends = bootstrap_interval(mine, seed, clusters=clusters[group])
        for key, value, low, high in zip(keys, mine.mean(1), *ends, strict=True):
            by_chance = scans[key[:2]].chance.get(key[2:])
            found.append({"stratum": name, **_record(key, value, low, high, int(group.sum()), by_chance)})
    return found


def choose_layer(gaps: Mapping[Layer, np.ndarray], same: np.ndarray, seed: int) -> int:
    """The layer to train at: that whose mean gap is surely the largest, by the lower end of its 95 % interval.

    gaps   layer -> float64 [B], each pair's gap with the first position left out, of the base model on the pairs to choose by
    same   int64 [E, 2], ``same_meaning`` of these pairs
    seed   of the bootstrap

    Only layers 1..N can be trained at; among equals the first, which costs least. The lower end rather than the mean, so that a
    layer where a few pairs have a large gap does not win. Choose by trained pairs alone where held-out ones are to judge the result.
    """
    layers = sorted(layer for layer in gaps if isinstance(layer, int) and layer > 0)
    values = np.stack([gaps[layer] for layer in layers])
    low, _ = bootstrap_interval(values, seed, clusters=word_clusters(values.shape[1], same))
    return layers[int(low.argmax())]


def choose_layer_by_cosine(cosine: Mapping[Layer, np.ndarray]) -> int:
    """The paper's rule: the layer 1..N with the highest mean cosine of true pairs, of ``raw_bos`` vectors; no control asked for."""
    return max(sorted(layer for layer in cosine if isinstance(layer, int) and layer > 0), key=lambda layer: cosine[layer].mean())


def of_stream(scans: Mapping[tuple[str, Layer], LayerScan], stream: str, vectors: str, metric: str) -> dict[Layer, np.ndarray]:
    """A metric's values, pair by pair, of one stream's layers."""
    return {layer: scan.per_pair[vectors, metric] for (of, layer), scan in scans.items() if of == stream}


def sink_layers(scans: Mapping[tuple[str, Layer], LayerScan], stream: str) -> list[Layer]:
    """Where the mean cosine with the first position pooled is the sink's: it is most of a word, lifts strangers as high as translations.

    That is: over half of a pooled word's states by length; a mismatched cosine of at least .95 of the true one, and above the one
    that the same words have without it.
    """
    found = []
    for (of, layer), scan in scans.items():
        mean = {key: values.mean() for key, values in scan.per_pair.items()}
        as_high = mean["raw_bos", "mismatched"] >= AS_HIGH * mean["raw_bos", "cosine"]
        lifted = mean["raw_bos", "mismatched"] > mean["raw", "mismatched"]
        if of == stream and mean["raw_bos", "sink_share"] > SINK_ABOVE and as_high and lifted:
            found.append(layer)
    return found
