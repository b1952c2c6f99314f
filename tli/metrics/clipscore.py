"""RefCLIPScore of word pairs, with its value for mismatched pairs.

    CLIPScore(i, j)    = 2.5 · max(cos(source_i, target_j), 0)
    RefCLIPScore(i, j) = H( CLIPScore(i, j), max(max_r cos(target_j, reference_r), 0) ),    H(a, b) = 2ab / (a + b), H(0, 0) = 0

The source word stands for the image, the target word for the caption, a pair's further accepted glosses for the references. Of
words that all share a vector, mismatched ones score as high as translations. So each pair's score comes with the mean score of
mismatched pairs; ``gap`` is what is left. CLIPScore itself is among ``alignment``'s measures.
Source: Hessel et al. 2021 (arXiv 2104.08718); the references' cosines are not rescaled there, either.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from tli.metrics.alignment import WordPairs, directions
from tli.metrics.measures import CLIP_WEIGHT


@dataclasses.dataclass(frozen=True, slots=True)
class Scores:
    """Scores of M pairs.

    pairs        int64 [M]     which of the list's pairs they are
    score        float64 [M]   of each true pair
    mismatched   float64 [M]   mean score of other pairs' targets beside pair i's source and references
    """

    pairs: np.ndarray
    score: np.ndarray
    mismatched: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        return self.score - self.mismatched


@torch.inference_mode()
def ref_clip_scores(source: Tensor, target: Tensor, references: Tensor, owners: np.ndarray, false_negatives: np.ndarray) -> Scores:
    """RefCLIPScore of every pair that has references.

    source, target   [B, D]         word vectors of any length; row i of one translates row i of the other
    references       [R, D]         word vectors of all pairs' further accepted glosses
    owners           int64 [R]      the pair that each belongs to, ascending
    false_negatives  int64 [E, 2]   (i, j), i != j: source i and target j mean the same, and are not mismatched

    Computed in fp64, in chunks of rows. Raises TliError as ``alignment.measure`` does.
    """
    words, references = WordPairs(source, target, false_negatives), directions(references, "reference")
    pairs, counts = torch.from_numpy(owners).unique_consecutive(return_counts=True)
    cosine, first = (words.source * words.target).sum(1), 0
    score, mismatched = torch.zeros(2, len(pairs), dtype=torch.float64, device=source.device)
    for rows, similarity in words.chunks(pairs.to(source.device)):
        here = slice(first, first + len(rows))
        of_rows = references[counts[:first].sum() : counts[: here.stop].sum()]
        nearest = torch.segment_reduce(of_rows @ words.target.T, "max", lengths=counts[here].to(source.device), axis=0)
        score[here] = _ref_clip_score(cosine[rows], nearest.gather(1, rows[:, None])[:, 0])
        # what is left out is far below 0, so its score is 0
        mismatched[here] = _ref_clip_score(similarity, nearest).sum(1) / words.others[0, rows]
        first = here.stop
    return Scores(*(values.cpu().numpy() for values in (pairs, score, mismatched)))


def _ref_clip_score(cosine: Tensor, nearest: Tensor) -> Tensor:
    """The harmonic mean of CLIPScore and the cosine of a target with its nearest reference, none below 0."""
    clipped, nearest = CLIP_WEIGHT * cosine.clamp(min=0), nearest.clamp(min=0)
    total = clipped + nearest
    return torch.where(total > 0, 2 * clipped * nearest / total.clamp(min=1e-300), 0)
