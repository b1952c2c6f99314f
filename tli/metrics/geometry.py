"""Measures of whole sets of word vectors: how alike two languages lie, how evenly words fill the space, what centring changes.

A set has one value and no value per word, so each comes with what it would be by chance rather than with an interval.
Everything is computed in fp64; a measure needs no more memory than a D x D or a B x B matrix, whichever is smaller.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """What two sets of word vectors look like, language by language.

    cka             linear centred kernel alignment of the two languages: 1 if one is a rotation of the other
    cka_chance      its exact mean over all ways to pair the words
    iso_score       share of the dimensions that a language's words fill evenly, 0 to 1; mean of both languages
    random_cosine   mean cosine of two different words of the list, whatever their language
    """

    cka: float
    cka_chance: float
    iso_score: float
    random_cosine: float


def geometry(source: Tensor, target: Tensor) -> Geometry:
    """All measures of two languages' word vectors, [B, D] each; row i of one translates row i of the other.

    CKA = ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖) of the centred vectors, Frobenius norms (Kornblith et al. 2019, arXiv 1905.00414). With few
    words and many dimensions it is far above 0 for words that have nothing in common: read it beside its chance.
    IsoScore = (P - 1) / (D - 1) with the participation ratio P = (Σλ)² / Σλ² of the covariance's eigenvalues λ: the closed form of
    Rudman et al. 2022 (arXiv 2108.07344). The mean cosine of random words is the anisotropy of Ethayarajh 2019 (arXiv 1909.00512).
    """
    x, y = (centred(side) for side in (source, target))
    cross, of_x, of_y = _products(x, y)
    # a language whose words are all alike has no shape to compare
    joint, traces = of_x * of_y, x.square().sum() * y.square().sum()
    cka, chance = (torch.where(joint > 0, value / joint, 0.0) for value in (cross, traces / (len(x) - 1)))
    evenness = [_iso_score(side.square().sum(), norm, side.shape[1]) for side, norm in ((x, of_x), (y, of_y))]
    words = torch.nn.functional.normalize(torch.cat([source, target]).double(), dim=1)
    pairs = len(words) * (len(words) - 1)
    random_cosine = (words.sum(0).square().sum() - words.square().sum()) / pairs
    return Geometry(float(cka), float(chance), float(sum(evenness) / 2), float(random_cosine))


def centred(vectors: Tensor) -> Tensor:
    """Word vectors of one language less their mean: fp64 [B, D]. What all words share is gone; words all alike are 0."""
    vectors = vectors.double()
    centred = vectors - vectors.mean(0)
    # rounding alone is no difference
    return torch.where(centred.norm() > 1e-12 * vectors.norm(), centred, 0.0)


def standardised(vectors: Tensor) -> Tensor:
    """Word vectors of one language less their mean, each dimension over its standard deviation: fp64 [B, D].

    A few dimensions with large values no longer decide the cosine. One that does not vary stays 0.
    """
    vectors = centred(vectors)
    spread = vectors.square().mean(0).sqrt()
    varies = spread > 1e-7 * spread.max()
    return torch.where(varies, vectors / spread.where(varies, torch.ones_like(spread)), 0.0)


def _products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """‖YᵀX‖², ‖XᵀX‖ and ‖YᵀY‖, by the smaller of the two forms: ‖YᵀX‖² is also the sum over XXᵀ·YYᵀ."""
    if len(x) < x.shape[1]:
        of_x, of_y = x @ x.T, y @ y.T
        return (of_x * of_y).sum(), of_x.norm(), of_y.norm()
    return (y.T @ x).square().sum(), (x.T @ x).norm(), (y.T @ y).norm()


def _iso_score(trace: Tensor, norm: Tensor, width: int) -> Tensor:
    participation = torch.where(norm > 0, (trace / norm).square(), 1.0)
    return (participation - 1) / (width - 1)
