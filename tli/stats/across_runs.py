"""Statistics whose unit is a run: intervals over seeds, trends over ranks, and one arm against another.

A seed draws the split, the order, the adapters' start and the dropout, so its runs share their words: seeds are blocks, and runs
of one seed are compared with one another.
"""

from collections.abc import Sequence

import numpy as np

from tli.stats.tests import paired_differences, paired_t


def seed_interval(values: np.ndarray | Sequence[float], level: float = 0.95) -> dict:
    """Mean over seeds with its Student interval, ``mean ± t(n - 1) · sd / sqrt(n)``; low and high are None for a single seed."""
    from scipy.special import stdtrit

    values = np.asarray(values, np.float64)
    n, mean = len(values), float(values.mean())
    if n == 1:
        return {"value": mean, "low": None, "high": None, "n": n}
    reach = float(stdtrit(n - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(n))
    return {"value": mean, "low": mean - reach, "high": mean + reach, "n": n}


def rank_trend(values: np.ndarray, ranks: Sequence[int]) -> dict:
    """Whether a value rises or falls with the rank.

    values   float64 [seeds, ranks]
    ranks    ascending LoRA ranks

    Returns:
        ``rho`` and ``p_rho``: Spearman's correlation of all runs' values with log2 R, which takes runs of one seed for independent;
        ``page`` and ``p_page``: Page's L, for which seeds are blocks, and its two-sided p, twice the smaller of those against a rise
        and a fall. None where there are too few runs, or where all values are equal. Source: Page 1963.
    """
    import scipy.stats

    values = np.asarray(values, np.float64)
    found = dict.fromkeys(("rho", "p_rho", "page", "p_page"))
    if values.shape[1] < 3 or np.ptp(values) == 0:
        return found
    spearman = scipy.stats.spearmanr(np.tile(np.log2(ranks), len(values)), values.ravel())
    found |= {"rho": float(spearman.statistic), "p_rho": float(spearman.pvalue)}
    if len(values) > 1:
        rise, fall = (scipy.stats.page_trend_test(ordered) for ordered in (values, values[:, ::-1]))
        found |= {"page": float(rise.statistic), "p_page": float(min(1.0, 2 * min(rise.pvalue, fall.pvalue)))}
    return found


def compare_arms(first: Sequence[float], second: Sequence[float]) -> dict:
    """first - second, seed by seed: the mean with its Student interval, and the paired t test; None where one seed cannot tell.

    Seeds without spread cannot tell either: a difference that is the same for all has p None, and no difference at all p = 1.
    """
    if len(first) < 2:
        return {"difference": float(first[0] - second[0]), "low": None, "high": None, "n": 1, "t": None, "p": None}
    interval = seed_interval(paired_differences(second, first))
    t, p = paired_t(second, first)
    return {"difference": interval.pop("value"), **interval, "t": t, "p": p}
