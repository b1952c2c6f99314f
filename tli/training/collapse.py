"""Collapse: words that all become alike. To a mean cosine it looks like success, so a run looks for it while it trains.

Two numbers of each batch tell it, beside the loss: the mean cosine of mismatched pairs, which rises to 1, and the effective rank of
the words, which falls. In a run that learns, the loss falls below chance meanwhile.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# of the words of a large batch these are enough
_MOST_WORDS = 256
_RISES_BY, _FALLS_TO, _AT_CHANCE = 0.1, 0.5, 0.98
# steps of each mean, and those after which it is looked for
_FEWEST_STEPS = 10


def spread(embeddings: Tensor) -> Tensor:
    """How far a batch's words are apart: fp32 [2], the mean cosine of mismatched pairs, and the effective rank.

    The effective rank is the participation ratio of the words' covariance, tr(C)²/tr(C²): 1 where they lie on a line, D where they
    lie in all directions alike.

    Args:
        embeddings:  unit rows, fp32 [2B, D], sources first
    """
    source, target = embeddings.detach().chunk(2)
    pairs = len(source)
    mismatched = (source.sum(0) @ target.sum(0) - (source * target).sum()) / max(1, pairs * (pairs - 1))
    some = torch.cat([source[: _MOST_WORDS // 2], target[: _MOST_WORDS // 2]])
    some = some - some.mean(0)
    covariance = some @ some.T
    rank = covariance.trace().square() / covariance.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack([mismatched, rank])


def alarm(losses: Sequence[float], spreads: Sequence[tuple[float, float]], total: int, chance: float | None) -> str | None:
    """What to say of a run that collapses, with what to do; None of one that does not, or is too young to tell.

    Args:
        losses:   of the steps so far
        spreads:  of the same steps, as ``spread`` gives them
        total:    steps of the whole run
        chance:   the loss of words that are all alike; None where the loss has none
    """
    steps = max(_FEWEST_STEPS, total // 20)
    if len(losses) < max(2 * steps, total // 10):
        return None
    cosines, ranks = np.array(spreads).T
    first_cosine, cosine, loss = (float(np.mean(part)) for part in (cosines[:steps], cosines[-steps:], losses[-steps:]))
    means = np.convolve(ranks, np.full(steps, 1 / steps), "valid")
    highest, rank = means.max(), means[-1]
    at_chance = chance is None or loss > _AT_CHANCE * chance
    # any two of these were seen in runs that went on to learn
    if not (at_chance and cosine > first_cosine + _RISES_BY and rank < _FALLS_TO * highest):
        return None
    said = f"mismatched pairs have a mean cosine of {cosine:.2f} ({first_cosine:.2f} at first), "
    said += f"a batch's effective rank is {rank:.0f} (it was {highest:.0f})"
    if chance is not None:
        said += f", and the loss is {loss:.3f}, where chance is {chance:.3f}"
    remedy = "lower --lr, adapt all-linear --targets, or normalise token states (--token-norm)"
    return f"at step {len(losses)} the words collapse: {said}. True pairs' mean cosine rises with it, and is no success; {remedy}"
