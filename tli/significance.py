"""Tests and intervals for paired measurements: is the change larger than the words' own scatter would make it?

Every function takes plain arrays with one number per word pair. Words are the unit: a pair before training is compared with
the same pair after it, so the tests are paired; trained and held-out pairs are different words, so that test is Welch's.
No p-value here is corrected for the number of tests, and none says how large an effect is: that is ``effect_size``.
Values without spread have definite answers (no change: p = 1; the same change everywhere: p = 0, and t and d_z, which would be
infinite, are None), so that no NaN ever reaches a report.
"""

import functools

import numpy as np

from tli.errors import TliError

_RESAMPLES = 2000
# a standard deviation below this share of the values' size is their rounding, not their spread
_ROUNDING = 1e-13


def paired_t(before: np.ndarray, after: np.ndarray) -> tuple[float | None, float]:
    """``t = mean(d) / (sd(d) / sqrt(n))`` of d = after - before, and its two-sided p on n - 1 degrees of freedom.

    before, after   [n], n >= 2
    """
    gains = _gains(before, after)
    return _t_test(float(gains.mean()), _spread(gains) / np.sqrt(len(gains)), len(gains) - 1)


def wilcoxon(before: np.ndarray, after: np.ndarray) -> float:
    """Two-sided p of the signed-rank test: the paired test that no single outlier can decide. Pairs without a change are dropped.

    before, after   [n], n >= 2
    """
    gains = _gains(before, after)
    if not gains.any():
        return 1.0
    import scipy.stats

    return float(scipy.stats.wilcoxon(gains).pvalue)


def effect_size(before: np.ndarray, after: np.ndarray) -> float | None:
    """Cohen's ``d_z = mean(d) / sd(d)`` of d = after - before: the gain in units of its own scatter. It does not grow with n.

    before, after   [n], n >= 2
    """
    gains = _gains(before, after)
    if _spread(gains) == 0:
        return None if gains.any() else 0.0
    return float(gains.mean() / _spread(gains))


def bootstrap_interval(values: np.ndarray, seed: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Where the mean would lie if other words had been drawn: the bias-corrected and accelerated (BCa) bootstrap interval.

    values      [..., n], n >= 2
    low, high   [...]

    The 2,000 resamples depend on n and seed alone: all metrics of one list are resampled alike, in one matrix product.
    Without spread the interval is the mean itself. That is what resampling can say, not that the mean is certain: a list
    without one hit does not prove that hits are impossible. Source: Efron 1987, "Better bootstrap confidence intervals".
    """
    from scipy.special import ndtr, ndtri

    values = _finite(values)
    mean, n = values.mean(-1, keepdims=True), values.shape[-1]
    spread = _spread(values)[..., None] * np.sqrt((n - 1) / n)
    standard = np.divide(values - mean, spread, out=np.zeros_like(values), where=spread > 0)
    # standardised values lose nothing in fp32; resampled means within 1e-6 of the mean are equal to it up to rounding
    means = np.asarray(standard.astype(np.float32) @ _resample_weights(n, seed).T, np.float64)
    below = ((means < -1e-6).mean(-1) + (means <= 1e-6).mean(-1)) / 2
    bias = ndtri(np.clip(below, 1 / _RESAMPLES, 1 - 1 / _RESAMPLES))
    # the jackknife's acceleration has a closed form for a mean: sum(z^3) / (6 sum(z^2)^1.5)
    acceleration = (standard**3).sum(-1) / (6 * n**1.5)
    ends = []
    for z in ndtri([(1 - level) / 2, (1 + level) / 2]):
        share = ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
        quantile = [np.quantile(row, q) for row, q in zip(means.reshape(-1, _RESAMPLES), share.reshape(-1))]
        ends.append(mean[..., 0] + spread[..., 0] * np.reshape(quantile, share.shape))
    return ends[0], ends[1]


def welch(first: np.ndarray, second: np.ndarray, level: float = 0.95) -> dict:
    """Mean of ``first`` minus mean of ``second`` for two groups of different words, with interval, t, degrees of freedom and p.

    first    [n], n >= 2
    second   [m], m >= 2

    The groups may differ in size and variance (Welch-Satterthwaite).
    """
    from scipy.special import stdtrit

    first, second = _finite(first), _finite(second)
    largest = max(np.abs(first).max(), np.abs(second).max())
    difference = _without_rounding(float(first.mean() - second.mean()), largest)
    part, other = (_spread(group) ** 2 / len(group) for group in (first, second))
    error, freedom = float(np.sqrt(part + other)), float(len(first) + len(second) - 2)
    if error > 0:
        freedom = float((part + other) ** 2 / (part**2 / (len(first) - 1) + other**2 / (len(second) - 1)))
    reach = float(stdtrit(freedom, (1 + level) / 2)) * error
    t, p = _t_test(difference, error, freedom)
    low, high = difference - reach, difference + reach
    return {"n": len(first) + len(second), "difference": difference, "low": low, "high": high, "t": t, "df": freedom, "p": p}


def compare_paired(before: np.ndarray, after: np.ndarray, seed: int) -> dict:
    """All that is asked of one change: mean gain with its bootstrap interval, paired t, Wilcoxon and effect size.

    before, after   [n], n >= 2
    """
    gains = _gains(before, after)
    low, high = bootstrap_interval(gains, seed)
    t, p_t = paired_t(before, after)
    return {
        "n": len(gains),
        "mean_gain": float(gains.mean()),
        "low": float(low),
        "high": float(high),
        "t": t,
        "p_t": p_t,
        "p_wilcoxon": wilcoxon(before, after),
        "d_z": effect_size(before, after),
    }


def _t_test(mean: float, error: float, freedom: float) -> tuple[float | None, float]:
    from scipy.special import stdtr

    if error == 0:
        return (None, 0.0) if mean else (0.0, 1.0)
    return float(mean / error), float(2 * stdtr(freedom, -abs(mean / error)))


@functools.lru_cache(maxsize=2)
def _resample_weights(n: int, seed: int) -> np.ndarray:
    """How often each of n values is drawn in each resample, over n: fp32 [resamples, n]. Two are kept: trained and held out."""
    generator = np.random.default_rng([seed, n])
    weights = np.empty((_RESAMPLES, n), np.float32)
    for row in weights:
        row[:] = np.bincount(generator.integers(0, n, n), minlength=n)
    return weights / n


def _gains(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """after - before, where a change that is the same for all pairs up to rounding is made exactly so."""
    before, after = _finite(before), _finite(after)
    if before.shape != after.shape:
        must = "the values before and after must belong to the same pairs"
        raise TliError("significance", must, f"{before.shape} and {after.shape}", "measure the same pairs twice")
    gains, largest = after - before, max(np.abs(before).max(), np.abs(after).max())
    if np.ptp(gains) <= _ROUNDING * largest:
        return np.full_like(gains, _without_rounding(gains[0], largest))
    return gains


def _spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation (n - 1) along the last axis; exactly zero where the values differ by no more than their rounding."""
    differ = np.ptp(values, axis=-1) > _ROUNDING * np.abs(values).max(-1)
    return np.where(differ, values.std(-1, ddof=1), 0.0)


def _without_rounding(difference: float, largest: float) -> float:
    return difference if abs(difference) > _ROUNDING * largest else 0.0


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.shape[-1] < 2:
        raise TliError("significance", "a test needs at least two values", values.shape[-1], "measure more pairs")
    if not np.isfinite(values).all():
        raise TliError("significance", "the values must be finite", "NaN or infinity", "look for the step that made them")
    return values
