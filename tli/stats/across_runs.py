"""Statistics whose unit is a run: intervals over seeds, and over seeds and words together, trends over ranks, and one arm against another.

A seed draws the split, the order, the adapters' start and the dropout, so its runs share their words: seeds are blocks, and runs
of one seed are compared with one another.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from tli.stats.tests import paired_differences, paired_t

# for so many all orders are gone through, by the sets of what is placed
_EXACT_COLUMNS = 12
_RESAMPLES = 2000


def seed_interval(values: np.ndarray | Sequence[float], level: float = 0.95) -> dict:
    """Mean over seeds with its Student interval, ``mean ± t(n - 1) · sd / sqrt(n)``; low and high are None for a single seed."""
    from scipy.special import stdtrit

    values = np.asarray(values, np.float64)
    n, mean = len(values), float(values.mean())
    if n == 1:
        return {"value": mean, "low": None, "high": None, "n": n}
    reach = float(stdtrit(n - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(n))
    return {"value": mean, "low": mean - reach, "high": mean + reach, "n": n}


def crossed_interval(values: np.ndarray, runs: np.ndarray, words: np.ndarray, seed: int = 0, level: float = 0.95) -> dict:
    """Mean of values of which each belongs to a run and to a word, with an interval for other runs and other words.

    values   float64 [n]   such as the gain of one recipe over another for one word in one run
    runs     int64 [n]     the run of each value; a run's words are drawn anew, so a word stands in some runs and not in others
    words    int64 [n]     the word, or the cluster of words, of each value

    Returns:
        value, low, high, n, runs, words; low and high are None of a single run or a single word.

    Runs share words, so neither are independent values: runs are drawn with replacement, and words, too, independently of them; a value
    counts as often as its run was drawn times its word. The interval is the mean ± t(runs - 1) of these means' standard deviations, since
    few runs say little of their own spread. Source: Owen 2007, "The pigeonhole bootstrap" (arXiv 0712.1111).
    """
    from scipy.special import stdtrit

    values = np.asarray(values, np.float64)
    _, runs = np.unique(runs, return_inverse=True)
    _, words = np.unique(words, return_inverse=True)
    run_count, word_count = int(runs.max()) + 1, int(words.max()) + 1
    mean, counts = float(values.mean()), {"n": len(values), "runs": run_count, "words": word_count}
    if run_count < 2 or word_count < 2:
        return {"value": mean, "low": None, "high": None, **counts}
    generator, means = np.random.default_rng([seed, 5]), np.empty(_RESAMPLES)
    for resample in range(_RESAMPLES):
        weights = generator.multinomial(run_count, np.full(run_count, 1 / run_count))[runs]
        weights = weights * generator.multinomial(word_count, np.full(word_count, 1 / word_count))[words]
        # so few values that none was drawn say nothing
        means[resample] = np.average(values, weights=weights) if weights.any() else mean
    reach = float(stdtrit(run_count - 1, (1 + level) / 2) * means.std(ddof=1))
    return {"value": mean, "low": mean - reach, "high": mean + reach, **counts}


def rank_trend(values: np.ndarray, ranks: Sequence[int]) -> dict:
    """Whether a value rises or falls with the rank.

    values   float64 [seeds, ranks]
    ranks    ascending LoRA ranks

    Returns:
        ``rho`` and ``p_rho``: Spearman's correlation of all runs' values with log2 R, which takes runs of one seed for independent; of a
        single seed's p is from all orders;
        ``page`` and ``p_page``: Page's L, for which seeds are blocks, and its two-sided p, twice the smaller of those against a rise
        and a fall, from all orders of each seed's own values, equal ones among them: exact up to 12 ranks, by the normal distribution of
        more. None where there are too few runs, or where all values are equal. Source: Page 1963.
    """
    import scipy.stats

    values = np.asarray(values, np.float64)
    found = dict.fromkeys(("rho", "p_rho", "page", "p_page"))
    if values.shape[1] < 3 or np.ptp(values) == 0:
        return found
    spearman = scipy.stats.spearmanr(np.tile(np.log2(ranks), len(values)), values.ravel())
    placed = scipy.stats.rankdata(values, axis=1)
    statistic = float((placed @ np.arange(1, values.shape[1] + 1)).sum())
    p_page = min(1.0, 2 * min(_page_tails(placed, statistic)))
    if len(values) == 1:
        # of one seed's runs Page's test is Spearman's by all orders; its t-distribution would give three in a row a p of 0
        return found | {"rho": float(spearman.statistic), "p_rho": p_page}
    # no p is smaller than that of the one order that fits best, and of its reverse
    orders = math.factorial(values.size) / math.factorial(len(values)) ** values.shape[1]
    return {
        "rho": float(spearman.statistic),
        "p_rho": max(float(spearman.pvalue), min(1.0, 2 / orders)),
        "page": statistic,
        "p_page": p_page,
    }


def _page_tails(placed: np.ndarray, statistic: float) -> tuple[float, float]:
    """The probabilities of an L as large and of one as small, if the values of each row stood in any order; mid-ranks [rows, columns]."""
    from scipy.special import ndtr

    rows, columns = placed.shape
    if columns > _EXACT_COLUMNS:
        weights = np.arange(columns) - (columns - 1) / 2
        spread = np.sqrt((placed.var(1) * columns).sum() * (weights**2).sum() / (columns - 1))
        z = (statistic - rows * columns * (columns + 1) ** 2 / 4) / spread
        return float(ndtr(-z)), float(ndtr(z))
    chances = np.ones(1)
    for row in placed:
        chances = np.convolve(chances, _chances_of_row(tuple(np.sort(2 * row).astype(int).tolist())))
    at = round(2 * statistic)
    return float(chances[at:].sum()), float(chances[: at + 1].sum())


@functools.lru_cache(maxsize=64)
def _chances_of_row(doubled: tuple[int, ...]) -> np.ndarray:
    """Of each total of ``position · 2·rank``, 0, 1, ..., its probability over all orders of the ranks."""
    columns = len(doubled)
    largest = sum(position * rank for position, rank in enumerate(doubled, start=1))
    # by the set of the ranks that are placed, those in the first positions
    totals = {0: np.eye(1, largest + 1)[0]}
    for position in range(1, columns + 1):
        placed: dict[int, np.ndarray] = {}
        for chosen, counts in totals.items():
            for number, rank in enumerate(doubled):
                if not chosen >> number & 1:
                    moved = np.roll(counts, position * rank)
                    more = chosen | 1 << number
                    placed[more] = placed[more] + moved if more in placed else moved
        totals = placed
    (counts,) = totals.values()
    return counts / counts.sum()


def compare_arms(first: Sequence[float], second: Sequence[float]) -> dict:
    """first - second, seed by seed: the mean with its Student interval, and the paired t test; None where one seed cannot tell.

    Seeds without spread cannot tell either: a difference that is the same for all has p None, and no difference at all p = 1.
    """
    if len(first) < 2:
        return {"difference": float(first[0] - second[0]), "low": None, "high": None, "n": 1, "t": None, "p": None}
    interval = seed_interval(paired_differences(second, first))
    t, p = paired_t(second, first)
    return {"difference": interval.pop("value"), **interval, "t": t, "p": p}
