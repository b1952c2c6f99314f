"""What the numbers mean: the cosine of true pairs beside that of mismatched ones, the gap, retrieval both ways, and chance.

A mean cosine says nothing by itself. Let all words share one long vector, an attention sink for instance, and every cosine is
near 1, for translations and for strangers alike. So each pair is measured against the list it stands in: ``gap`` is how
much closer it is than mismatched pairs are, and retrieval asks whether the true partner is the *nearest* candidate. A shift of
all words moves neither; only alignment moves both. A gap that grows while the ranks stay is a change of scale.
"""

from __future__ import annotations

import dataclasses
import typing

import numpy as np

from tli.errors import TliError
from tli.significance import bootstrap_interval

if typing.TYPE_CHECKING:
    import torch

RETRIEVAL = ("p_at_1", "p_at_1_forward", "p_at_1_backward", "mrr", "mrr_forward", "mrr_backward")
# the mismatched cosines' histogram has bins of 0.005: coarser ones are made by adding neighbours
HISTOGRAM_EDGES = np.linspace(-1.0, 1.0, 401)
# cosines are computed in fp64 from fp32 vectors: equal vectors agree to 1e-15, different ones differ by far more than this
_TIE = 1e-12
_CHUNK_NUMBERS = 1 << 19


@dataclasses.dataclass(frozen=True, slots=True)
class Retrieval:
    """One direction of retrieval: where each word's true partner stands among the candidates.

    above        int64 [B]   candidates nearer than the partner
    tied         int64 [B]   candidates exactly as near; the partner itself is not counted
    candidates   int64 [B]   all of them, partner included

    Ties are broken at random, in expectation: with all vectors equal, hits and reciprocal ranks are exactly at chance.
    """

    above: np.ndarray
    tied: np.ndarray
    candidates: np.ndarray

    @property
    def rank(self) -> np.ndarray:
        """Expected rank of the partner, from 1."""
        return self.above + 1 + self.tied / 2

    @property
    def hit(self) -> np.ndarray:
        """Probability that the partner comes first."""
        return (self.above == 0) / (self.tied + 1)

    @property
    def reciprocal(self) -> np.ndarray:
        """Expected 1/rank: the mean of 1/r over the ranks that the tie leaves open."""
        harmonic = _harmonic(self.candidates.max())
        return (harmonic[self.above + self.tied + 1] - harmonic[self.above]) / (self.tied + 1)

    @property
    def hit_chance(self) -> np.ndarray:
        return 1 / self.candidates

    @property
    def reciprocal_chance(self) -> np.ndarray:
        """``H_c / c``: the mean of 1/r when each rank r = 1..c is as likely."""
        return _harmonic(self.candidates.max())[self.candidates] / self.candidates


@dataclasses.dataclass(frozen=True, slots=True)
class Alignment:
    """How B word pairs are aligned in one layer, pair by pair; every reported value is a mean of one of these arrays.

    cosine                 float64 [B]     of each true pair
    mismatched             float64 [B]     mean cosine of pair i's words with the words of other meaning, both directions averaged
    mismatched_histogram   int64 [400]     all mismatched cosines, counted in HISTOGRAM_EDGES
    forward, backward                      retrieval of targets by sources, and of sources by targets
    sink_share             float64 [B]     norm of the sink's state over the sum of all states' norms, if it was measured
    """

    cosine: np.ndarray
    mismatched: np.ndarray
    mismatched_histogram: np.ndarray
    forward: Retrieval
    backward: Retrieval
    sink_share: np.ndarray | None = None

    @property
    def gap(self) -> np.ndarray:
        return self.cosine - self.mismatched

    @property
    def metrics(self) -> tuple[str, ...]:
        """What ``per_pair`` can be asked for."""
        return ("gap", *RETRIEVAL, "cosine", "mismatched", *(() if self.sink_share is None else ("sink_share",)))

    def per_pair(self, metric: str) -> np.ndarray:
        """The array, float64 [B], whose mean is the metric. P@1 and MRR are the mean of both directions unless one is named."""
        return self._retrieval(metric, "hit", "reciprocal") if metric in RETRIEVAL else getattr(self, metric)

    def value(self, metric: str) -> float:
        return float(self.per_pair(metric).mean())

    def chance(self, metric: str) -> float | None:
        """What a retrieval metric would be if the ranks were drawn by lot, from the exact numbers of candidates; else None."""
        return float(self._retrieval(metric, "hit_chance", "reciprocal_chance").mean()) if metric in RETRIEVAL else None

    def _retrieval(self, metric: str, of_hits: str, of_ranks: str) -> np.ndarray:
        name = of_hits if metric.startswith("p_at_1") else of_ranks
        forward, backward = getattr(self.forward, name), getattr(self.backward, name)
        return forward if metric.endswith("_forward") else backward if metric.endswith("_backward") else (forward + backward) / 2


def measure(source: torch.Tensor, target: torch.Tensor, same: np.ndarray, sink_share: np.ndarray | None = None) -> Alignment:
    """Compare every source word with every target word, leaving out the pairs that mean the same.

    source, target   [B, D]         word vectors; row i of one translates row i of the other
    same             int64 [E, 2]   (i, j), i != j: source i and target j mean the same, and are neither mismatched nor candidates
    sink_share       float [B]      kept as it is

    Cosines and their sums are fp64, whatever the dtype of the vectors; a vector of zeros has cosine 0 with everything.
    Memory: B x B is walked through in chunks of rows.
    Raises TliError if a vector is not finite, or if a pair has no other pair to be compared with.
    """
    import torch

    with torch.inference_mode():
        source, target = _directions(source, "source"), _directions(target, "target")
        pairs, cosine = len(source), (source * target).sum(1)
        same = torch.as_tensor(same, dtype=torch.int64, device=source.device).reshape(-1, 2)
        # [forward, backward]: of a row the candidates lie along it, of a column along the column
        others = pairs - 1 - torch.stack([torch.bincount(side, minlength=pairs) for side in same.T])
        total = cosine.new_zeros(2, pairs)
        above, at_least = torch.zeros(2, 2, pairs, dtype=torch.int64, device=source.device)
        histogram = cosine.new_zeros(len(HISTOGRAM_EDGES) - 1)
        for rows in torch.arange(pairs, device=source.device).split(max(1, _CHUNK_NUMBERS // pairs)):
            here = same[(same[:, 0] >= rows[0]) & (same[:, 0] <= rows[-1])]
            left_out = torch.cat([rows, here[:, 0]]) - rows[0], torch.cat([rows, here[:, 1]])
            similarity = (source[rows] @ target.T).clamp_(-1, 1)
            similarity[left_out] = 0
            total[0, rows] = similarity.sum(1)
            total[1] += similarity.sum(0)
            # farther than any cosine: never counted, in no bin
            similarity[left_out] = -2
            histogram += torch.histc(similarity, len(histogram), -1, 1)
            above[0, rows], at_least[0, rows] = (
                (similarity > cosine[rows, None] + _TIE).sum(1),
                (similarity >= cosine[rows, None] - _TIE).sum(1),
            )
            above[1] += (similarity > cosine + _TIE).sum(0)
            at_least[1] += (similarity >= cosine - _TIE).sum(0)
        alone = (others == 0).any(0).nonzero().flatten()
        if len(alone):
            got = f"none for pair {int(alone[0]) + 1} of {pairs}"
            raise TliError("alignment", "every pair needs another of different meaning", got, "measure more pairs")
        mismatched = (total / others).mean(0)
        ways = [Retrieval(*(counts[way].cpu().numpy() for counts in (above, at_least - above, others + 1))) for way in (0, 1)]
    share = None if sink_share is None else np.asarray(sink_share, dtype=np.float64)
    return Alignment(cosine.cpu().numpy(), mismatched.cpu().numpy(), histogram.long().cpu().numpy(), *ways, share)


def measurements(alignment: Alignment, split: str, when: str, layer: int | str, seed: int) -> list[dict]:
    """One flat record per metric, its 95 % bootstrap interval beside the value; ``chance`` is None where there is none."""
    values = np.stack([alignment.per_pair(metric) for metric in alignment.metrics])
    lows, highs = bootstrap_interval(values, seed)
    return [
        {
            "split": split,
            "when": when,
            "layer": layer,
            "metric": metric,
            "value": float(mean),
            "low": float(low),
            "high": float(high),
            "n": values.shape[1],
            "chance": alignment.chance(metric),
        }
        for metric, mean, low, high in zip(alignment.metrics, values.mean(1), lows, highs)
    ]


def _directions(vectors: torch.Tensor, side: str) -> torch.Tensor:
    import torch

    bad = (~vectors.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        got = f"NaN or infinity in the {side} word of pair {int(bad[0]) + 1}"
        raise TliError("alignment", "word vectors must be finite", got, "use --dtype float32, or lower --lr")
    return torch.nn.functional.normalize(vectors.double(), dim=1, eps=1e-30)


def _harmonic(largest: int) -> np.ndarray:
    """``H_0 .. H_largest``, H_c = 1 + 1/2 + ... + 1/c."""
    return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, largest + 1))])
