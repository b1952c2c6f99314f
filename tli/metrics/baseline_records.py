"""What the baselines found beside what the adapters found, as flat records: means with intervals, and the adapters' gain over each.

All of it is about held-out pairs. A record names its ``way`` to find a translation: a baseline, or ``plain``, the cosine of the model's
word states as they are, of the ``stream`` before or after training. Where several adapters are compared, their streams have their names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tli.data import word_pairs
from tli.data.pair_store import Pair
from tli.metrics.baseline_cache import cached
from tli.metrics.baselines import BASELINES, Baselines
from tli.metrics.candidates import Ranks
from tli.model.linear_map import LinearMap, Sides
from tli.model.shape import Layer
from tli.stats.bootstrap import means_with_intervals, word_clusters
from tli.stats.tests import add_holm, compare_paired

if TYPE_CHECKING:
    from tli.data.packing import TokenisedWords

PLAIN, BEHIND_MAP = "plain", "map"
# streams of word states: the frozen model's, and one trained model's
BEFORE, AFTER = "before", "after"
# ways to use trained states, by what of the frozen ones is of equal information: other tests of them would only take time
WITH_MAPS = {BEHIND_MAP: ("procrustes", "cca"), "cca_spelling": ("cca_spelling",)}
ALL = "all pairs"
# what a word state after training is judged by beside its plain cosine: maps of the trained model's states
_AFTER, _AFTER_AT_OUTPUT = ("procrustes", "cca", "cca_spelling"), ("procrustes", "cca")
_BEFORE_AT_OUTPUT = ("centred", "procrustes", "cca")
# a pair this alike in spelling counts as a loan where the list does not say
_ALIKE = 0.5
# pairs of a kind, and held-out pairs at all
_FEWEST, _FEWEST_HELD_OUT = 10, 4
_FIELD = "field: "
# of the pairs of a scan
_JUDGED_SHARE = 0.2

# (way, stream, layer): stream and layer are None of a baseline that looks at no model
Way = tuple[str, str | None, Layer | None]


def judge(
    splits: Mapping[str, Sequence[Pair]],
    states: Mapping[tuple[str, Layer], Sides],
    seed: int,
    maps: Mapping[tuple[str, Layer], LinearMap] | None = None,
    words: Callable[[Sequence[Pair]], TokenisedWords] | None = None,
) -> dict[str, list] | None:
    """Records of all ways, and tests of the trained model against each of those that need no training.

    splits   ``trained`` pairs, and ``held_out`` ones
    states   by (stream, layer): word states of trained pairs, then of held-out ones; the stream of the frozen model is ``BEFORE``
    maps     by (stream, layer): the map that was saved for these states
    words    tokenises all sources, then all targets of some pairs; with it pairs with a common sub-token are told apart

    Returns:
        None where fewer than four pairs are held out.
        ``records``: way, stream, layer, candidates (``candidates.SETS``), group (all pairs, or a kind of them), metric (mrr or p_at_1),
        value, low, high, n, clusters, chance.
        ``tests``: of MRR, stream, ``trained`` (its way: plain cosine, against all others; or one of ``WITH_MAPS``, against those), way,
        layer, candidates, group, and what ``compare_paired`` says of the gain over that way; p with Holm's correction over the ways.
        ``pairs``: source and target of the held-out ones; ``reciprocal_ranks``: way, stream, layer and the values of these pairs among the
        split's, the mean of both directions, by which one run can be compared with another word by word.
    """
    if len(splits.get("held_out", ())) < _FEWEST_HELD_OUT:
        return None
    baselines = Baselines(splits["trained"], splits["held_out"], seed)
    # all that their ranks depend on beside the states
    text = json.dumps([len(splits["trained"]), seed, list(map(dataclasses.astuple, baselines.pairs))]).encode()
    of_words = cached(len(baselines.pairs), [text], baselines.of_words)
    found: dict[Way, Mapping[str, Ranks]] = {(name, None, None): ranks for name, ranks in of_words.items()}
    for (stream, layer), sides in states.items():
        found[PLAIN, stream, layer] = baselines.plain(*sides)
        if (stream, layer) in (maps or {}):
            found[BEHIND_MAP, stream, layer] = baselines.behind((maps or {})[stream, layer], *sides)
        at_layer, at_output = (tuple(BASELINES), _BEFORE_AT_OUTPUT) if stream == BEFORE else (_AFTER, _AFTER_AT_OUTPUT)
        names = at_output if layer == "output" else at_layer
        compute = functools.partial(baselines.of_states, *sides, names)
        parts = [text, repr(names).encode(), *(np.ascontiguousarray(side).tobytes() for side in sides)]
        # trained states are another run's never
        of_states = cached(len(baselines.pairs), parts, compute) if stream == BEFORE else compute()
        found |= {(name, stream, layer): ranks for name, ranks in of_states.items()}
    held_out = [baselines.pairs[number] for number in baselines.judged]
    clusters, groups = _clusters(baselines), kinds(held_out, words)
    return {
        "records": list(_records(found, groups, clusters, seed)),
        "tests": list(_tests(found, groups, clusters, seed)),
        "pairs": [[pair.source, pair.target] for pair in held_out],
        "reciprocal_ranks": [
            {"way": name, "stream": stream, "layer": layer, "values": _of_each_pair(ranks["split"], len(held_out))}
            for (name, stream, layer), ranks in found.items()
        ],
    }


def _of_each_pair(ranks: Ranks, pairs: int) -> list[float | None]:
    """Each pair's reciprocal rank, the mean of both directions; None of a pair without candidates."""
    found: list[float | None] = [None] * pairs
    for number, value in zip(ranks.pairs.tolist(), _values(ranks)[0].round(6).tolist()):
        found[number] = value
    return found


class LayerMaps:
    """Where a model *holds* translations, not only shows them: closed-form maps fitted in every layer on a part of the pairs.

    pairs   those that are scanned: a fifth of them, in families of their own where that can be, judges what the others fitted
    seed    draws that fifth, and the resamples
    by      ``families`` or ``words``, as for ``word_pairs.split_pairs``

    Raises:
        TliError: so few pairs that they cannot be split.
    """

    WAYS = ("procrustes", "cca")

    def __init__(self, pairs: Sequence[Pair], seed: int, by: str):
        known = {pair: number for number, pair in enumerate(pairs)}
        parts = word_pairs.split_pairs(pairs, _JUDGED_SHARE, seed, by)
        self.order = np.array([known[pair] for part in parts for pair in part])
        self.baselines, self.seed = Baselines(*parts, seed), seed
        self.found: dict[Way, Mapping[str, Ranks]] = {}

    def see(self, stream: str, layer: Layer, source: np.ndarray, target: np.ndarray) -> None:
        """Fit and judge one layer's word states, [B, D] in the order of the pairs."""
        sides = source[self.order], target[self.order]
        self.found[PLAIN, stream, layer] = self.baselines.plain(*sides)
        for name, ranks in self.baselines.of_states(*sides, self.WAYS).items():
            self.found[name, stream, layer] = ranks

    def records(self) -> dict[str, Any]:
        """How many pairs fitted and judged, and records as of ``judge``, among the judged pairs alone."""
        counts = {"fitted": len(self.baselines.fitted), "judged": len(self.baselines.judged)}
        among = {way: {"split": ranks["split"]} for way, ranks in self.found.items()}
        everyone = {ALL: np.ones(counts["judged"], bool)}
        return {**counts, "records": list(_records(among, everyone, _clusters(self.baselines), self.seed))}


def _clusters(baselines: Baselines) -> np.ndarray:
    """int64 [J]: ``word_clusters`` of the judged pairs."""
    inside = np.isin(baselines.false_negatives, baselines.judged).all(1)
    return word_clusters(len(baselines.judged), baselines.false_negatives[inside] - baselines.judged[0])


def kinds(pairs: Sequence[Pair], words: Callable[[Sequence[Pair]], TokenisedWords] | None = None) -> dict[str, np.ndarray]:
    """Groups of ten pairs or more whose translations may be found for different reasons: name -> bool [B]; ``words`` as for ``judge``."""
    found = {ALL: np.ones(len(pairs), bool)}
    told = [pair.loan for pair in pairs]
    if any(loan is not None for loan in told):
        found |= {"loan words": np.array([loan is True for loan in told]), "no loan words": np.array([loan is False for loan in told])}
    else:
        alike = np.array([_likeness(pair) >= _ALIKE for pair in pairs])
        found |= {"spelt alike": alike, "not spelt alike": ~alike}
    if words is not None:
        found |= by_sub_token(words(pairs))
    fields = np.array([pair.field for pair in pairs])
    found |= {f"{_FIELD}{field}": fields == field for field in np.unique(fields) if field}
    return {name: group for name, group in found.items() if name == ALL or group.sum() >= _FEWEST}


def by_sub_token(words: TokenisedWords) -> dict[str, np.ndarray]:
    """Whether the two words of a pair, of all sources and then all targets, have a token in common: name -> bool [B]."""
    own = [set(words.ids[begin + start : end].tolist()) for begin, start, end in zip(words.indptr, words.starts, words.indptr[1:])]
    shared = np.array([bool(source & target) for source, target in zip(own, own[len(own) // 2 :])], bool)
    return {"share a sub-token": shared, "share none": ~shared}


def _likeness(pair: Pair) -> float:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(pair.source.casefold(), pair.target.casefold())


def _by_group(
    found: Mapping[Way, Mapping[str, Ranks]], groups: Mapping[str, np.ndarray], clusters: np.ndarray
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Each set of candidates and group of pairs that has an interval: which of the ranked pairs it holds, bool [M], and their clusters."""
    # whatever ranks them, the same pairs have candidates
    for candidates, ranks in next(iter(found.values())).items():
        for group, members in groups.items():
            inside, own = members[ranks.pairs], clusters[ranks.pairs][members[ranks.pairs]]
            if len(np.unique(own)) > 1:
                yield candidates, group, inside, own


def _records(found: Mapping[Way, Mapping[str, Ranks]], groups: Mapping[str, np.ndarray], clusters: np.ndarray, seed: int) -> Iterator[dict]:
    for candidates, group, inside, own in _by_group(found, groups, clusters):
        # all resampled alike
        values = np.concatenate([_values(ranks[candidates]) for ranks in found.values()])
        means = iter(means_with_intervals(values[:, inside], seed, own))
        for (name, stream, layer), ranks in found.items():
            ways = ranks[candidates].forward, ranks[candidates].backward
            chance = np.mean([(way.reciprocal_rank_chance, way.hits_at_chance(1)) for way in ways], axis=0)[:, inside].mean(1)
            for metric, by_chance in zip(("mrr", "p_at_1"), chance.tolist()):
                where = {"way": name, "stream": stream, "layer": layer, "candidates": candidates, "group": group, "metric": metric}
                yield {**where, **next(means), "chance": by_chance}


def _tests(found: Mapping[Way, Mapping[str, Ranks]], groups: Mapping[str, np.ndarray], clusters: np.ndarray, seed: int) -> Iterator[dict]:
    """The gain after training over ways that need none, in its layer: of plain cosine over all, of ``WITH_MAPS`` over theirs."""
    groups = {name: members for name, members in groups.items() if not name.startswith(_FIELD)}
    for trained in [way for way in found if way[0] in (PLAIN, *WITH_MAPS) and way[1] not in (BEFORE, None)]:
        name, stream, layer = trained
        others = [way for way in found if way[1] in (BEFORE, None) and way[2] in (layer, None)]
        if name != PLAIN:
            others = [way for way in others if way[0] in WITH_MAPS[name]]
        if not others:
            continue
        for candidates, group, inside, own in _by_group(found, groups, clusters):
            after, *before = (_values(found[way][candidates])[0, inside] for way in (trained, *others))
            changes = compare_paired(np.stack(before), np.stack([after] * len(others)), seed, own)
            where = {"stream": stream, "trained": name, "layer": layer, "candidates": candidates, "group": group}
            family: list[dict[str, Any]] = [{"way": way[0], **where, **change} for way, change in zip(others, changes)]
            add_holm(family, ("p_sign_flip",))
            yield from family


def _values(ranks: Ranks) -> np.ndarray:
    """float64 [2, M]: each pair's reciprocal rank and whether it is found at once, of both directions the mean."""
    return np.mean([(way.reciprocal_rank, way.hits_at(1)) for way in (ranks.forward, ranks.backward)], axis=0)
