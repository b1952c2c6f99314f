"""Retrieval among candidates that neither class nor list makes easy: the words' own class, and the whole list.

Who finds a noun among nouns and verbs may know no more than that it is one. So a word's partner is sought among three sets of candidates:

    split   all pairs of its split, as everywhere else
    class   those of its own word class among them
    list    all pairs of the list, trained and held out, which is what a user meets

Scores are handed over row by row, so that a score may be any function of two words. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tli.metrics.retrieval import Retrieval

SETS = ("split", "class", "list")
# scores are computed in fp64: equal ones agree to 1e-15, different ones differ by far more than this
_TIE = 1e-12
_CHUNK_NUMBERS = 1 << 21


@dataclasses.dataclass(frozen=True, slots=True)
class Scores:
    """How near N source words are to N target words: pair i is source i with target i.

    forward    int64 [R] -> float64 [R, N]   of these sources, the scores with all targets; higher is nearer
    backward   int64 [R] -> float64 [R, N]   of these targets, the scores with all sources
    """

    forward: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """Retrieval both ways of those pairs that have candidates beside their own partner.

    pairs               int64 [M]   their indices among the pairs that were asked for
    forward, backward   [M]         retrieval of targets by sources, and of sources by targets
    """

    pairs: np.ndarray
    forward: Retrieval
    backward: Retrieval


def cosine_scores(source: np.ndarray, target: np.ndarray) -> Scores:
    """Cosines of vectors [N, D]; a vector of zeros has cosine 0 with everything."""
    source, target = _directions(source), _directions(target)
    return Scores(lambda rows: source[rows] @ target.T, lambda rows: target[rows] @ source.T)


def rank(scores: Scores, judged: np.ndarray, false_negatives: np.ndarray, classes: np.ndarray | None) -> dict[str, Ranks]:
    """Rank each judged pair's partner, both ways, in each of ``SETS``; ``class`` is left out where no classes are known.

    scores            of N words with N words
    judged            int64 [J], ascending: the pairs of the split
    false_negatives   int64 [E, 2]: (i, j), i != j, pairs that mean the same, which are never candidates of each other
    classes           int64 [N], negative of a pair without one; None
    """
    in_split = np.zeros(len(judged) and (judged.max() + 1), bool)
    in_split[judged] = True
    counted = [_count(score, judged, in_split, false_negatives, classes) for score in (scores.forward, scores.backward)]
    found = {}
    for name in counted[0]:
        # the sets are the same both ways, and so are the pairs without candidates
        pairs = np.flatnonzero(counted[0][name][2] > 0)
        ways = [Retrieval(above[pairs], tied[pairs], others[pairs] + 1) for above, tied, others in (way[name] for way in counted)]
        found[name] = Ranks(pairs, *ways)
    return found


def _count(
    score: Callable[[np.ndarray], np.ndarray],
    judged: np.ndarray,
    in_split: np.ndarray,
    false_negatives: np.ndarray,
    classes: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Of each set int64 [3, J]: candidates above the partner, as high as it, and all but it."""
    counts: dict[str, list[np.ndarray]] = {name: [] for name in SETS if name != "class" or classes is not None}
    step, first = 1, 0
    while first < len(judged):
        rows = judged[first : first + step]
        scored = score(rows)
        apart = _apart(rows, scored.shape[1], false_negatives)
        own = scored[np.arange(len(rows)), rows][:, None]
        above, level = (scored > own + _TIE) & apart, (np.abs(scored - own) <= _TIE) & apart
        inside = np.zeros(scored.shape[1], bool)
        inside[: len(in_split)] = in_split
        for name, kept in counts.items():
            among = inside if name == "split" else np.ones(1, bool)
            if name == "class":
                assert classes is not None
                among = inside & (classes[rows, None] == classes) & (classes >= 0)
            kept.append(np.stack([(values & among).sum(1) for values in (above, level, apart)]))
        # the first row tells how many fit
        first, step = first + len(rows), max(1, _CHUNK_NUMBERS // scored.shape[1])
    return {name: np.concatenate(parts, axis=1) for name, parts in counts.items()}


def _apart(rows: np.ndarray, words: int, false_negatives: np.ndarray) -> np.ndarray:
    """bool [R, N]: which words are candidates of these rows' at all."""
    apart = np.ones((len(rows), words), bool)
    apart[np.arange(len(rows)), rows] = False
    edges = np.asarray(false_negatives, np.int64).reshape(-1, 2)
    here = edges[np.isin(edges[:, 0], rows)]
    apart[np.searchsorted(rows, here[:, 0]), here[:, 1]] = False
    return apart


def _directions(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
