"""Baselines that train no model: what spelling, word length, word class and closed-form maps find on the same held-out pairs.

A word's translation can be found for reasons that have nothing to do with a model's training: it is spelt alike, it is as long, it is a
noun as well, or a linear map carries one language's vectors over to the other's. Each of them is fitted on the trained pairs alone, ranks
the held-out pairs, and stands beside the adapters. Shrinkage is chosen on a part of the trained pairs.

    length         words of nearly the same number of letters
    class          words of the same class, and nothing else: an oracle, since nobody tells an aligner the class of a translation
    edit distance  Levenshtein's, over the longer word's length
    n-grams        cosine of the words' character n-grams
    n-gram map     canonical correlations (CCA) between the n-grams of both languages
    centred        the model's word states less the mean of their language
    procrustes     the rotation that carries the sources nearest to their targets (orthogonal Procrustes; VecMap, MUSE)
    ridge          the linear map with the least squared error
    cca            canonical correlations between the states of both languages
    cca, spelling  the same of states and n-grams side by side
    map            the map that is saved beside an adapter: fitted on the trained states of the trained pairs

The maps are in ``tli/model/linear_map.py``. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from tli.data.pair_store import Pair, alphanumeric, normalise_word
from tli.data.word_pairs import false_negative_pairs, split_pairs
from tli.metrics.candidates import Ranks, Scores, cosine_scores, rank
from tli.model.linear_map import Axes, LinearMap, Sides, fit_cca, fit_centred, fit_procrustes, fit_ridge
from tli.runtime.errors import TliError

# of two sides' vectors a function from a shrinkage, None where there is none, to the map
Fit = Callable[[np.ndarray, np.ndarray], Callable[..., LinearMap]]
# shares of the mean variance that are mixed into a covariance; of ridge, times the mean square
SHRINKAGES = (0.03, 0.1, 0.3, 0.6, 0.9)
# of the trained pairs, to choose among them
_DEV_SHARE = 0.2
# n-grams, and states that are wider, are reduced to so many principal components
_NGRAM_COMPONENTS = 600
_STATE_COMPONENTS = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Baseline:
    """One way to find a translation.

    name     its key in records
    label    in tables
    states   whether it looks at a model's word states; else at the words alone
    oracle   whether it is told what no aligner is
    """

    name: str
    label: str
    states: bool = False
    oracle: bool = False


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("length", "word length"),
        Baseline("class", "word class (oracle)", oracle=True),
        Baseline("edit_distance", "edit distance"),
        Baseline("ngrams", "character n-grams"),
        Baseline("ngram_map", "CCA of n-grams"),
        Baseline("centred", "states, centred", states=True),
        Baseline("procrustes", "Procrustes of states", states=True),
        Baseline("ridge", "ridge map of states", states=True),
        Baseline("cca", "CCA of states", states=True),
        Baseline("cca_spelling", "CCA of states + n-grams", states=True),
        Baseline("map", "states behind the saved map", states=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A map, and what chose it: ``procrustes``, ``ridge`` or ``cca``, shrinkage (None of a rotation), the dev part's MRR, its error."""

    way: str
    shrinkage: float | None
    mrr: float
    error: float
    linear: LinearMap

    def facts(self) -> dict[str, Any]:
        """Plain JSON values, for a report: all but the map, of which how many dimensions it has."""
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "linear"}
        return {**told, "dimensions": self.linear.source_matrix.shape[1]}


class Baselines:
    """All baselines of one split: fitted on its trained pairs, judged by its held-out ones.

    trained, held_out   pairs, two or more of each
    seed                chooses the part of the trained pairs that shrinkage is chosen by
    """

    def __init__(self, trained: Sequence[Pair], held_out: Sequence[Pair], seed: int):
        self.pairs, self.seed = [*trained, *held_out], seed
        self.fitted, self.judged = np.arange(len(trained)), np.arange(len(trained), len(self.pairs))
        self.false_negatives = false_negative_pairs(self.pairs)
        self.classes = word_classes(self.pairs)
        self.source, self.target = ([normalise_word(word) for word in side] for side in zip(*((p.source, p.target) for p in self.pairs)))
        self.fit_part, self.dev_part = self._dev_split(trained)
        self.dev_false_negatives = false_negative_pairs([self.pairs[number] for number in self.dev_part])

    @functools.cached_property
    def ngrams(self) -> Sides:
        return _ngram_components(self.source, self.fitted, self.seed), _ngram_components(self.target, self.fitted, self.seed)

    def of_words(self) -> dict[str, dict[str, Ranks]]:
        """The ranks of the held-out pairs, by baseline and set of candidates, of those that look at no model."""
        scores = {"length": self._length(), "edit_distance": self._edit_distance(), "ngrams": self._shared_ngrams()}
        if self.classes is not None:
            scores["class"] = self._class(self.classes)
        scores["ngram_map"] = _mapped(self.ngrams, self._best(fit_cca, self.ngrams).linear)
        return {name: self._rank(scores[name]) for name in BASELINES if name in scores}

    def of_states(self, source: np.ndarray, target: np.ndarray, names: Collection[str] = tuple(BASELINES)) -> dict[str, dict[str, Ranks]]:
        """The same of those in ``names`` that look at a model's word states, [N, D]: trained pairs' first, held-out ones' behind them."""
        whole = np.asarray(source, np.float64), np.asarray(target, np.float64)
        # each side has axes of its own then, between which only a map can go
        source, target = (_along(_axes(side, self.fitted, self.seed), side) for side in whole)
        states = source, target
        own = states[0][self.fitted], states[1][self.fitted]
        fits: dict[str, Callable[[], Scores]] = {
            "centred": lambda: _mapped(whole, fit_centred(whole[0][self.fitted], whole[1][self.fitted])),
            "procrustes": lambda: _mapped(states, fit_procrustes(*own)),
            "ridge": lambda: _mapped(states, self._best(fit_ridge, states, "ridge").linear),
            "cca": lambda: _mapped(states, self._best(fit_cca, states).linear),
            "cca_spelling": lambda: _mapped(joined := self._beside_ngrams(states), self._best(fit_cca, joined).linear),
        }
        return {name: self._rank(fit()) for name, fit in fits.items() if name in names}

    def plain(self, source: np.ndarray, target: np.ndarray) -> dict[str, Ranks]:
        """The ranks by the cosine of the states as they are: what an adapter is judged by."""
        return self._rank(cosine_scores(source, target))

    def behind(self, linear: LinearMap, source: np.ndarray, target: np.ndarray) -> dict[str, Ranks]:
        """The ranks by the cosine of the states behind a map that was fitted elsewhere."""
        return self._rank(_mapped((source, target), linear))

    def _rank(self, scores: Scores) -> dict[str, Ranks]:
        return rank(scores, self.judged, self.false_negatives, self.classes)

    def _dev_split(self, trained: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Trained pairs to fit with while shrinkage is chosen, and to choose it by: no family is on both sides, where that can be."""
        known = {pair: number for number, pair in enumerate(trained)}
        for by in ("families", "words"):
            try:
                parts = split_pairs(trained, _DEV_SHARE, self.seed, by)
            except TliError:
                continue
            fit, dev = (np.sort([known[pair] for pair in part]) for part in parts)
            return fit, dev
        return self.fitted, self.fitted

    def _beside_ngrams(self, states: Sides) -> Sides:
        source, target = (np.hstack([_scaled(one, self.fitted), _scaled(other, self.fitted)]) for one, other in zip(states, self.ngrams))
        return source, target

    def best_map(self, source: np.ndarray, target: np.ndarray) -> Choice:
        """The map of word states, as for ``of_states``, that finds the dev part of the trained pairs best, fitted on all of them."""
        whole = np.asarray(source, np.float64), np.asarray(target, np.float64)
        axes = [_axes(side, self.fitted, self.seed) for side in whole]
        states = _along(axes[0], whole[0]), _along(axes[1], whole[1])
        rotation = self._best(_fit_procrustes, states, "procrustes", (None,))
        best = max(rotation, self._best(fit_cca, states), key=lambda choice: choice.mrr)
        return dataclasses.replace(best, linear=best.linear.behind(*axes))

    def refit(self, choice: Choice, source: np.ndarray, target: np.ndarray) -> Choice:
        """The same way with the same shrinkage on other states of all trained pairs, such as trained ones, which can't choose any more: of
        pairs that were trained a map of their states finds most, whatever its shrinkage.
        """
        axes = [_axes(side, self.fitted, self.seed) for side in (source, target)]
        states = (_along(one, np.asarray(side, np.float64)) for one, side in zip(axes, (source, target)))
        fit: Fit = _fit_procrustes if choice.way == "procrustes" else fit_cca
        linear = fit(*(side[self.fitted] for side in states))(choice.shrinkage)
        return dataclasses.replace(choice, linear=linear.behind(*axes))

    def _best(self, fit: Fit, sides: Sides, way: str = "cca", shrinkages: Sequence[float | None] = SHRINKAGES) -> Choice:
        """The map on all trained pairs, with the shrinkage under which the dev part is found best."""
        source, target = sides
        trial, found = fit(source[self.fit_part], target[self.fit_part]), {}
        for shrinkage in shrinkages:
            scores = _mapped((source[self.dev_part], target[self.dev_part]), trial(shrinkage))
            ranks = rank(scores, np.arange(len(self.dev_part)), self.dev_false_negatives, None)["split"]
            found[shrinkage] = (ranks.forward.reciprocal_rank + ranks.backward.reciprocal_rank) / 2
        chosen = max(found, key=lambda shrinkage: found[shrinkage].mean())
        error = float(found[chosen].std() / np.sqrt(len(found[chosen])))
        linear = fit(source[self.fitted], target[self.fitted])(chosen)
        return Choice(way, chosen, float(found[chosen].mean()), error, linear)

    def _length(self) -> Scores:
        source, target = (np.array([len(alphanumeric(word)) for word in side], float) for side in (self.source, self.target))
        return _by_difference(source, target)

    def _class(self, classes: np.ndarray) -> Scores:
        def same(rows: np.ndarray) -> np.ndarray:
            return (classes[rows, None] == classes).astype(float)

        return Scores(same, same)

    def _edit_distance(self) -> Scores:
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist

        def scores(queries: list[str], candidates: list[str]) -> Callable[[np.ndarray], np.ndarray]:
            return lambda rows: cdist(
                [queries[row] for row in rows], candidates, scorer=Levenshtein.normalized_similarity, dtype=np.float64
            )

        return Scores(scores(self.source, self.target), scores(self.target, self.source))

    def _shared_ngrams(self) -> Scores:
        """Cosines of n-grams counted over both languages' words."""
        counts = _vectoriser().fit([*self.source, *self.target])
        source, target = counts.transform(self.source), counts.transform(self.target)
        # rows have unit length
        return Scores(lambda rows: (source[rows] @ target.T).toarray(), lambda rows: (target[rows] @ source.T).toarray())


def word_classes(pairs: Sequence[Pair]) -> np.ndarray | None:
    """int64 [N]: the number of each pair's word class, -1 of a pair without one; None where fewer than half have one."""
    names = [normalise_word(pair.word_class) for pair in pairs]
    known = {name: number for number, name in enumerate(sorted({*names} - {""}))}
    classes = np.array([known.get(name, -1) for name in names], np.int64)
    return classes if (classes >= 0).mean() >= 0.5 else None


def _mapped(sides: Sides, linear: LinearMap) -> Scores:
    return cosine_scores(*linear(*sides))


def _by_difference(source: np.ndarray, target: np.ndarray) -> Scores:
    return Scores(lambda rows: -np.abs(source[rows, None] - target), lambda rows: -np.abs(target[rows, None] - source))


def _vectoriser():
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, lowercase=False)


def _ngram_components(words: Sequence[str], fitted: np.ndarray, seed: int) -> np.ndarray:
    """float64 [N, K]: the words' n-grams, weighted by rarity and reduced to their principal components among the trained words."""
    from sklearn.decomposition import TruncatedSVD

    vectoriser = _vectoriser()
    trained = vectoriser.fit_transform([words[number] for number in fitted])
    components = min(_NGRAM_COMPONENTS, min(trained.shape) - 1)
    return TruncatedSVD(max(1, components), n_iter=2, random_state=seed).fit(trained).transform(vectoriser.transform(words))


def _fit_procrustes(source: np.ndarray, target: np.ndarray) -> Callable[[None], LinearMap]:
    rotation = fit_procrustes(source, target)
    return lambda shrinkage: rotation


def _axes(states: np.ndarray, fitted: np.ndarray, seed: int) -> Axes | None:
    """The principal axes of wide states among the trained words, as many as there are or as a map can be fitted for; None: keep all."""
    from sklearn.decomposition import PCA

    most = min(_STATE_COMPONENTS, len(fitted) - 1)
    if states.shape[1] <= most:
        return None
    found = PCA(most, svd_solver="randomized", random_state=seed).fit(states[fitted])
    return Axes(found.mean_, found.components_.T)


def _along(axes: Axes | None, states: np.ndarray) -> np.ndarray:
    return states if axes is None else axes(states)


def _scaled(vectors: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Vectors of which the trained ones have mean 0 and a mean square length of 1, so that two kinds weigh alike side by side."""
    centred = vectors - vectors[fitted].mean(0)
    size = np.sqrt((centred[fitted] ** 2).sum(1).mean())
    return centred / size if size > 0 else centred
