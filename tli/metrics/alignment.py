"""What the numbers mean: the cosine of true pairs beside that of mismatched ones, the gap, retrieval both ways, and chance.

A mean cosine says nothing by itself. Let all words share one long vector, an attention sink for instance, and every cosine is
near 1, for translations and for mismatched words alike. So each pair is measured against the list it stands in: ``gap`` is how
much closer it is than mismatched pairs are, and retrieval asks whether the true partner is the *nearest* candidate. A shift of
all words moves neither; only alignment moves both. A gap that grows while the ranks stay is a change of scale.
"""

from __future__ import annotations

import dataclasses
import typing

import numpy as np

from tli.metrics.measures import MEASURES
from tli.metrics.retrieval import Retrieval
from tli.runtime.errors import TliError
from tli.stats.bootstrap import word_clusters

if typing.TYPE_CHECKING:
    import torch

    from tli.metrics.clipscore import Scores

# neighbours that CSLS takes as a word's neighbourhood: Conneau et al. 2018
NEIGHBOURS = 10
# the mismatched cosines' histogram has bins of 0.005: coarser ones are made by adding neighbours
HISTOGRAM_EDGES = np.linspace(-1.0, 1.0, 401)
# cosines are computed in fp64 from fp32 vectors: equal vectors agree to 1e-15, different ones differ by far more than this
_TIE = 1e-12
# farther than any cosine or CSLS score: what is left out is never counted, and in no bin
_LEFT_OUT = -9.0
_CHUNK_NUMBERS = 1 << 19
# for the AUC the range of the true cosines is cut into so many steps; what falls into one step is a tie
_STEPS = 1 << 17


@dataclasses.dataclass(frozen=True, slots=True)
class Alignment:
    """How B word pairs are aligned in one layer, pair by pair; every reported value is a mean of one of these arrays.

    cosine                 float64 [B]     of each true pair
    mismatched             float64 [B]     mean cosine of pair i's words with the words of other meaning, both directions averaged
    clipped                float64 [B]     the same mean of max(cosine, 0)
    mismatched_histogram   int64 [400]     all mismatched cosines, counted in HISTOGRAM_EDGES
    auc                    float64 [B]     share of all mismatched cosines, of any two words, below pair i's; ties count half
    forward, backward                      retrieval of targets by sources, and of sources by targets
    clusters               int64 [B]       ``word_clusters``: pairs of one number share a word, and are drawn together
    sink_share             float64 [B]     norm of the sink's state over the sum of all states' norms, if it was measured
    referenced                             RefCLIPScore of the pairs that have references, if any has
    """

    cosine: np.ndarray
    mismatched: np.ndarray
    clipped: np.ndarray
    mismatched_histogram: np.ndarray
    auc: np.ndarray
    forward: Retrieval
    backward: Retrieval
    clusters: np.ndarray
    sink_share: np.ndarray | None = None
    referenced: Scores | None = None

    @property
    def gap(self) -> np.ndarray:
        return self.cosine - self.mismatched

    def per_pair(self, metric: str) -> np.ndarray:
        """The array, float64 [B], whose mean is the metric: a name in ``measures.MEASURES``; [M] of those that need references."""
        values = MEASURES[metric].per_pair(self)
        if values is None:
            raise KeyError(metric)
        return values

    def value(self, metric: str) -> float:
        return float(self.per_pair(metric).mean())

    def chance(self, metric: str) -> float | None:
        """What the metric would be if the ranks were drawn by lot; None of a mean of cosines."""
        chance = MEASURES[metric].chance
        return None if chance is None else chance(self)


def measure(
    source: torch.Tensor,
    target: torch.Tensor,
    false_negatives: np.ndarray,
    sink_share: np.ndarray | None = None,
    referenced: Scores | None = None,
) -> Alignment:
    """Compare every source word with every target word, leaving out the pairs that mean the same.

    source, target   [B, D]         word vectors; row i of one translates row i of the other
    false_negatives  int64 [E, 2]   (i, j), i != j: source i and target j mean the same, and are neither mismatched nor candidates
    sink_share       float [B]      kept as it is
    referenced                      kept as it is

    Cosines and their sums are fp64, whatever the dtype of the vectors; a vector of zeros has cosine 0 with everything.
    Memory: B x B is walked through in chunks of rows.
    Raises TliError if a vector is not finite, or if a pair has no other pair to be compared with.
    """
    import torch

    with torch.inference_mode():
        words = WordPairs(source, target, false_negatives)
        cosine, mismatched = words.cosines()
        ranks = _RankCounter(cosine)
        clipped = cosine.new_zeros(2, len(cosine))
        histogram = cosine.new_zeros(len(HISTOGRAM_EDGES) - 1)
        lowest = cosine.min()
        # a step is never below what counts as a tie
        step = torch.clamp((cosine.max() - lowest) / _STEPS, min=_TIE)
        counts = torch.zeros(_STEPS + 3, dtype=torch.int64, device=cosine.device)
        for rows, similarity in words.chunks():
            ranks.add(rows, similarity)
            # what is left out is far below 0
            clip = similarity.clamp(min=0)
            clipped[0, rows], clipped[1] = clip.sum(1), clipped[1] + clip.sum(0)
            histogram += torch.histc(similarity, len(histogram), -1, 1)
            counts += torch.bincount(_steps(similarity, lowest, step).flatten(), minlength=_STEPS + 3)
        counts[0] -= words.left_out
        own = _steps(cosine, lowest, step)
        auc = (counts.cumsum(0)[own] - counts[own] / 2) / counts.sum()
        ways, clipped = ranks.retrieval(words.others), (clipped / words.others).mean(0)
    share = None if sink_share is None else np.asarray(sink_share, dtype=np.float64)
    true, others, positive, counted, below = (x.cpu().numpy() for x in (cosine, mismatched, clipped, histogram.long(), auc))
    return Alignment(true, others, positive, counted, below, *ways, word_clusters(len(true), false_negatives), share, referenced)


def cosines(source: torch.Tensor, target: torch.Tensor, false_negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``measure``'s cosine and mismatched alone, float64 [B] each, without walking through B x B."""
    import torch

    with torch.inference_mode():
        cosine, mismatched = (values.cpu().numpy() for values in WordPairs(source, target, false_negatives).cosines())
    return cosine, mismatched


def csls(source: torch.Tensor, target: torch.Tensor, false_negatives: np.ndarray) -> tuple[Retrieval, Retrieval]:
    """Retrieval, forward and backward, by ``2·cos(s, t) - r(s) - r(t)``: nearness for words that not everything is near to.

    r(s) is the mean cosine of s with its 10 nearest targets, the partner and words that mean the same among them; r(t) likewise.
    Arguments as for ``measure``. Source: Conneau et al. 2018, "Word translation without parallel data" (arXiv 1710.04087).
    """
    import torch

    with torch.inference_mode():
        words = WordPairs(source, target, false_negatives)
        k = min(NEIGHBOURS, len(words.source))
        chunks, nearest = [], words.source.new_empty(0, len(words.source))
        for _, similarity in words.chunks(all_words=True):
            chunks.append(similarity.topk(k, dim=1).values.mean(1))
            nearest = torch.cat([nearest, similarity])
            nearest = nearest.topk(min(k, len(nearest)), dim=0).values
        of_source, of_target = torch.cat(chunks), nearest.mean(0)
        ranks = _RankCounter(2 * (words.source * words.target).sum(1) - of_source - of_target)
        for rows, similarity in words.chunks():
            ranks.add(rows, 2 * similarity - of_source[rows, None] - of_target)
        return ranks.retrieval(words.others)


class WordPairs:
    """Unit word vectors, fp64 [B, D], and which of their pairs are neither mismatched nor candidates."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor, false_negatives: np.ndarray):
        import torch

        self.source, self.target = directions(source, "source"), directions(target, "target")
        pairs = len(self.source)
        self.false_negatives = torch.as_tensor(false_negatives, dtype=torch.int64, device=self.source.device).reshape(-1, 2)
        self.left_out = pairs + len(self.false_negatives)
        # [forward, backward]: of a row the candidates lie along it, of a column along the column
        self.others = pairs - 1 - torch.stack([torch.bincount(side, minlength=pairs) for side in self.false_negatives.T])
        alone = (self.others == 0).any(0).nonzero().flatten()
        if len(alone):
            got = f"none for pair {int(alone[0]) + 1} of {pairs}"
            raise TliError("alignment", "every pair needs another of different meaning", got, "measure more pairs")

    def cosines(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each true pair, and the mean of each with words of other meaning, both directions averaged."""
        import torch

        cosine = (self.source * self.target).sum(1)
        # a row's sum over all words is one product with their sum; the few that do not count are taken off again
        total = torch.stack([self.source @ self.target.sum(0), self.target @ self.source.sum(0)]) - cosine
        i, j = self.false_negatives.T
        alike = (self.source[i] * self.target[j]).sum(1)
        total[0].index_add_(0, i, alike, alpha=-1)
        total[1].index_add_(0, j, alike, alpha=-1)
        return cosine, (total / self.others).mean(0)

    def chunks(self, rows: torch.Tensor | None = None, all_words: bool = False) -> typing.Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A few rows at a time, int64 [r], and their cosines with all targets, fp64 [r, B].

        rows        int64 [R], ascending: those to go through; None: all
        all_words   with words of the same meaning, which else are far below all others
        """
        import torch

        pairs = len(self.source)
        rows = torch.arange(pairs, device=self.source.device) if rows is None else rows
        for part in rows.split(max(1, _CHUNK_NUMBERS // pairs)):
            similarity = (self.source[part] @ self.target.T).clamp_(-1, 1)
            if not all_words:
                here = self.false_negatives[torch.isin(self.false_negatives[:, 0], part)]
                left_out = torch.searchsorted(part, torch.cat([part, here[:, 0]])), torch.cat([part, here[:, 1]])
                similarity[left_out] = _LEFT_OUT
            yield part, similarity


class _RankCounter:
    """How many candidates score above each pair's own score [B], and how many as high: by rows and by columns."""

    def __init__(self, own: torch.Tensor):
        import torch

        self.own = own
        self.above, self.at_least = torch.zeros(2, 2, len(own), dtype=torch.int64, device=own.device)

    def add(self, rows: torch.Tensor, scores: torch.Tensor) -> None:
        """Count the scores of some rows with all columns."""
        own = self.own[rows, None]
        self.above[0, rows], self.at_least[0, rows] = (scores > own + _TIE).sum(1), (scores >= own - _TIE).sum(1)
        self.above[1] += (scores > self.own + _TIE).sum(0)
        self.at_least[1] += (scores >= self.own - _TIE).sum(0)

    def retrieval(self, others: torch.Tensor) -> tuple[Retrieval, Retrieval]:
        """The ranks forward and backward; ``others``: candidates, the partner left out, int64 [2, B]."""
        forward, backward = (
            Retrieval(*(counts.cpu().numpy() for counts in way)) for way in zip(self.above, self.at_least - self.above, others + 1)
        )
        return forward, backward


def _steps(cosine: torch.Tensor, lowest: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """In which step each cosine lies: 1 at the lowest true cosine, ``_STEPS + 1`` at the highest, one less or more beyond them."""
    return ((cosine - lowest) / step).round_().clamp_(-1, _STEPS + 1).long() + 1


def directions(vectors: torch.Tensor, side: str) -> torch.Tensor:
    """Unit vectors in fp64; zeros stay zeros. Raises TliError with the pair and side of a number that is not finite."""
    import torch

    bad = (~vectors.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        got = f"NaN or infinity in the {side} word of pair {int(bad[0]) + 1}"
        raise TliError("alignment", "word vectors must be finite", got, "use --dtype float32, or lower --lr")
    return torch.nn.functional.normalize(vectors.double(), dim=1, eps=1e-30)
