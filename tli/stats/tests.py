"""Tests and intervals for paired measurements: is the change larger than the words' own scatter would make it?

Every function takes plain arrays with one number per word pair. Words are the unit: a pair before training is compared with
the same pair after it, so the tests are paired; trained and held-out pairs are different words, so that test is Welch's.
Pairs that share a word are not independent: given their ``clusters``, the bootstrap and the sign-flip test take such pairs
together. The t tests and Wilcoxon's know of no clusters. A p-value is corrected for the number of tests by ``holm`` alone,
and none says how large an effect is: that is ``effect_size``.
Values without spread have definite answers, so that no NaN ever reaches a report: no change is p = 1, and the same change everywhere,
which has no scatter to be held against, is None. ``compare_paired`` and ``compare_groups`` gather all that is asked of a change, with
None for whatever so few values cannot tell.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tli.runtime.errors import TliError
from tli.stats.bootstrap import ROUNDING, finite, means_with_intervals, sample_std, sign_flip

# of a record of ``compare_paired``
P_VALUES = ("p_t", "p_wilcoxon", "p_sign_flip")
# up to so many pairs the signed-rank test is exact with ties, too, as SciPy's is
_MOST_FLIPPED = 13


def paired_t(before: np.ndarray | Sequence[float], after: np.ndarray | Sequence[float]) -> tuple[float | None, float | None]:
    """``t = mean(d) / (sd(d) / sqrt(n))`` of d = after - before, and its two-sided p on n - 1 degrees of freedom.

    before, after   [n], n >= 2
    """
    gains = paired_differences(before, after)
    return _t_test(float(gains.mean()), sample_std(gains) / np.sqrt(len(gains)), len(gains) - 1)


def wilcoxon(before: np.ndarray, after: np.ndarray) -> float:
    """Two-sided p of the signed-rank test: the paired test that no single outlier can decide. Pairs without a change are dropped.

    before, after   [n], n >= 2
    """
    gains = paired_differences(before, after)
    if not gains.any():
        return 1.0
    import scipy.stats

    if len(gains) > _MOST_FLIPPED:
        return float(scipy.stats.wilcoxon(gains).pvalue)
    # SciPy's value, which with ties tries every choice of signs one by one: here their sums' counts, of doubled ranks, which are whole
    gains = gains[gains != 0]
    ranks = (2 * scipy.stats.rankdata(abs(gains))).astype(int)
    counts = np.ones(1)
    for rank in ranks:
        counts = np.pad(counts, (0, rank)) + np.pad(counts, (rank, 0))
    positive = ranks[gains > 0].sum()
    return min(1.0, 2 * float(min(counts[: positive + 1].sum(), counts[positive:].sum())) / 2 ** len(ranks))


def effect_size(before: np.ndarray, after: np.ndarray) -> float | None:
    """Cohen's ``d_z = mean(d) / sd(d)`` of d = after - before: the gain in units of its own scatter. It does not grow with n.

    before, after   [n], n >= 2
    """
    gains = paired_differences(before, after)
    if sample_std(gains) == 0:
        return None if gains.any() else 0.0
    return float(gains.mean() / sample_std(gains))


def welch(first: np.ndarray, second: np.ndarray, level: float = 0.95) -> dict:
    """Mean of ``first`` minus mean of ``second`` for two groups of different words, with interval, t, degrees of freedom and p.

    first    [n], n >= 2
    second   [m], m >= 2

    The groups may differ in size and variance (Welch-Satterthwaite).
    """
    from scipy.special import stdtrit

    difference, error, freedom = _welch_parts(first, second)
    reach = float(stdtrit(freedom, (1 + level) / 2)) * error
    t, p = _t_test(difference, error, freedom)
    low, high = difference - reach, difference + reach
    return {"n": len(first) + len(second), "difference": difference, "low": low, "high": high, "t": t, "df": freedom, "p": p}


def equivalence(first: np.ndarray, second: np.ndarray, margin: float) -> dict:
    """Whether two groups' means differ by *less* than ``margin``: two one-sided Welch tests (TOST), p the larger of theirs.

    first    [n], n >= 2
    second   [m], m >= 2

    A difference that is not significant may be large; p < .05 here says that it is small, and then the 90 % interval, low to
    high, lies within the margin. Without spread in either group p is None. Source: Schuirmann 1987.
    """
    from scipy.special import stdtr, stdtrit

    if not margin > 0:
        raise TliError("--margin", "the margin of equivalence must be above 0", margin, "name the largest difference that counts as none")
    difference, error, freedom = _welch_parts(first, second)
    reach, p = float(stdtrit(freedom, 0.95)) * error, None
    if error > 0:
        p = float(max(stdtr(freedom, -(difference + margin) / error), stdtr(freedom, (difference - margin) / error)))
    low, high = difference - reach, difference + reach
    return {"n": len(first) + len(second), "difference": difference, "low": low, "high": high, "margin": margin, "p": p}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: the p-values at which one may reject so that *any* false rejection among them has at most that chance.

    A None, a test that could not be made, stays None and does not count.
    """
    made = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - rank) * p))
        corrected[i] = largest
    return corrected


def add_holm(records: Sequence[dict], names: Sequence[str]) -> None:
    """Put beside each named p-value, as ``<name>_holm``, what Holm's correction over all the records makes of it."""
    for name in names:
        for record, corrected in zip(records, holm([record[name] for record in records])):
            record[f"{name}_holm"] = corrected


def compare_paired(before: np.ndarray, after: np.ndarray, seed: int, clusters: np.ndarray | None = None) -> list[dict]:
    """All that is asked of each row's change: mean gain, interval, paired t, Wilcoxon, sign flip, d_z; None for what values cannot tell.

    before, after   [m, n], n >= 1
    clusters        int64 [n] or None, as for ``bootstrap_interval``: heeded by the interval and the sign-flip test

    Of a change that is the same everywhere t, its p and d_z are None; the sign-flip test still counts the pairs.
    """
    n = before.shape[1]
    clusters = np.arange(n) if clusters is None else clusters
    if n < 2:
        unknown = dict.fromkeys(("low", "high", "t", "p_t", "p_wilcoxon", "p_sign_flip", "d_z"))
        return [{"n": n, "clusters": n, "mean_gain": float(gain), **unknown} for gain in (after - before).mean(1)]
    gains = np.stack([paired_differences(*values) for values in zip(before, after)])
    records = []
    for row, mean, p in zip(gains, means_with_intervals(gains, seed, clusters), sign_flip(gains, seed, clusters)):
        t, p_t = paired_t(np.zeros(n), row)
        records.append(
            {
                "n": n,
                "clusters": mean["clusters"],
                "mean_gain": mean["value"],
                "low": mean["low"],
                "high": mean["high"],
                "t": t,
                "p_t": p_t,
                "p_wilcoxon": wilcoxon(np.zeros(n), row),
                "p_sign_flip": float(p),
                "d_z": effect_size(np.zeros(n), row),
            }
        )
    return records


def compare_groups(first: np.ndarray, second: np.ndarray, margin: float | None) -> dict:
    """``welch`` of two groups, and with a margin their ``equivalence``; None for what the values cannot tell.

    first    [n], n >= 1
    second   [m], m >= 1
    """
    record: dict[str, Any] = {"n": len(first) + len(second), "difference": float(first.mean() - second.mean())}
    record |= dict.fromkeys(("low", "high", "t", "df", "p"))
    if min(len(first), len(second)) >= 2:
        record = welch(first, second)
    if margin is not None:
        testable = min(len(first), len(second)) >= 2
        found = equivalence(first, second, margin) if testable else {"margin": margin, "low": None, "high": None, "p": None}
        record["equivalence"] = {key: found[key] for key in ("margin", "low", "high", "p")}
    return record


def _welch_parts(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Difference of two groups' means, its standard error, and the degrees of freedom."""
    first, second = finite(first), finite(second)
    largest = max(np.abs(first).max(), np.abs(second).max())
    difference = _without_rounding(float(first.mean() - second.mean()), largest)
    part, other = (sample_std(group) ** 2 / len(group) for group in (first, second))
    error, freedom = float(np.sqrt(part + other)), float(len(first) + len(second) - 2)
    if error > 0:
        freedom = float((part + other) ** 2 / (part**2 / (len(first) - 1) + other**2 / (len(second) - 1)))
    return difference, error, freedom


def _t_test(mean: float, error: float, freedom: float) -> tuple[float | None, float | None]:
    from scipy.special import stdtr

    if error == 0:
        return (None, None) if mean else (0.0, 1.0)
    return float(mean / error), float(2 * stdtr(freedom, -abs(mean / error)))


def paired_differences(before: np.ndarray | Sequence[float], after: np.ndarray | Sequence[float]) -> np.ndarray:
    """after - before, where a change that is the same for all pairs up to rounding is made exactly so."""
    before, after = finite(before), finite(after)
    if before.shape != after.shape:
        must = "the values before and after must belong to the same pairs"
        raise TliError("significance", must, f"{before.shape} and {after.shape}", "measure the same pairs twice")
    gains, largest = after - before, max(np.abs(before).max(), np.abs(after).max())
    if np.ptp(gains) <= ROUNDING * largest:
        return np.full_like(gains, _without_rounding(gains[0], largest))
    return gains


def _without_rounding(difference: float, largest: float) -> float:
    return difference if abs(difference) > ROUNDING * largest else 0.0
