"""RefCLIPScore of word pairs, with its value for mismatched pairs.

    CLIPScore(i, j)    = 2.5 · max(cos(source_i, target_j), 0)
    RefCLIPScore(i, j) = H( CLIPScore(i, j), max(max_r cos(target_j, reference_r), 0) ),    H(a, b) = 2ab / (a + b), H(0, 0) = 0

The source word stands for the image, the target word for the caption, a pair's further accepted glosses for the references. Of
words that all share a vector, strangers score as high as translations. So each pair's score comes with the mean score of
mismatched pairs; ``gap`` is what is left. CLIPScore itself is among ``alignment``'s measures.
Source: Hessel et al. 2021 (arXiv 2104.08718); the references' cosines are not rescaled there, either.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tli.metrics.alignment import CLIP_WEIGHT, CLIPSCORE

_CHUNK_NUMBERS = 1 << 19

REF_CLIPSCORE = tuple(f"ref_{name}" for name in CLIPSCORE)


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
def ref_clip_scores(source: Tensor, target: Tensor, references: Tensor, owners: np.ndarray, same: np.ndarray) -> Scores:
    """RefCLIPScore of every pair that has references.

    source, target   [B, D]         word vectors of any length; row i of one translates row i of the other
    references       [R, D]         word vectors of all pairs' further accepted glosses
    owners           int64 [R]      the pair that each belongs to, ascending
    same             int64 [E, 2]   (i, j), i != j: source i and target j mean the same, and are not mismatched

    Computed in fp64, in chunks of rows. Every pair must have one to be compared with: ``alignment.measure`` refuses other lists.
    """
    source, target, references = _directions(source), _directions(target), _directions(references)
    pairs, first = np.unique(owners, return_index=True)
    bounds = np.append(first, len(owners))
    score, mismatched = np.zeros(len(pairs)), np.zeros(len(pairs))
    for rows, left_out in _chunks(pairs, len(source), same, source.device):
        places = np.searchsorted(pairs, rows)
        own = slice(bounds[places[0]], bounds[places[-1] + 1])
        lengths = torch.from_numpy(np.diff(bounds)[places]).to(source.device)
        nearest = torch.segment_reduce(references[own] @ target.T, "max", lengths=lengths, axis=0).clamp_(min=0)
        scores = _harmonic_mean(CLIP_WEIGHT * (source[rows] @ target.T).clamp_(min=0), nearest)
        score[places] = scores[torch.arange(len(rows)), torch.from_numpy(rows)].cpu().numpy()
        scores.masked_fill_(left_out, 0)
        mismatched[places] = (scores.sum(1) / (~left_out).sum(1)).cpu().numpy()
    return Scores(pairs, score, mismatched)


def _chunks(chosen: np.ndarray, pairs: int, same: np.ndarray, device: torch.device):
    """Rows of ``chosen`` a few at a time, each with the mask [rows, pairs] of what is no mismatched pair of theirs."""
    partners: dict[int, list[int]] = {}
    for i, j in np.reshape(same, (-1, 2)).tolist():
        partners.setdefault(i, []).append(j)
    for rows in np.array_split(chosen, max(1, -(-len(chosen) * pairs // _CHUNK_NUMBERS))):
        left_out = torch.zeros(len(rows), pairs, dtype=torch.bool)
        for place, row in enumerate(rows.tolist()):
            left_out[place, [row, *partners.get(row, ())]] = True
        yield rows, left_out.to(device)


def _harmonic_mean(a: Tensor, b: Tensor) -> Tensor:
    total = a + b
    return torch.where(total > 0, 2 * a * b / total.clamp(min=1e-300), 0)


def _directions(vectors: Tensor) -> Tensor:
    return normalize(vectors.double(), dim=1, eps=1e-30)
