"""The tests and intervals against scipy, against loops, and against what they promise: coverage, and no NaN."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tli.errors import TliError
from tli.significance import _resample_weights, bootstrap_interval, compare_paired, effect_size, paired_t, welch, wilcoxon


def drawn(seed: int, n: int, gain: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    before = generator.normal(0.3, 0.2, n)
    return before, before + generator.normal(gain, 0.3, n)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 300), st.floats(-1, 1))
def test_paired_tests_agree_with_scipy(seed, n, gain):
    before, after = drawn(seed, n, gain)
    t, p = paired_t(before, after)
    truth = scipy.stats.ttest_rel(after, before)
    assert t == pytest.approx(truth.statistic, rel=1e-8)
    assert p == pytest.approx(truth.pvalue, rel=1e-8)
    assert wilcoxon(before, after) == pytest.approx(scipy.stats.wilcoxon(after, before).pvalue, rel=1e-8)
    assert effect_size(before, after) == pytest.approx(truth.statistic / math.sqrt(n), rel=1e-8)


def test_the_published_gain_gives_the_published_t():
    # 623 pairs, mean gain .0902: the paper's p < 1.33e-240 follows from a scatter of .0410
    shape = np.random.default_rng(0).normal(size=623)
    gains = 0.0902 + 0.0410 * (shape - shape.mean()) / shape.std(ddof=1)
    t, p = paired_t(np.zeros(623), gains)
    assert t == pytest.approx(0.0902 / (0.0410 / math.sqrt(623)))
    assert round(t, 1) == 54.9
    assert 1e-241 < p < 1.33e-240


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 200), st.integers(2, 200))
def test_welch_agrees_with_scipy(seed, n, m):
    generator = np.random.default_rng(seed)
    first, second = generator.normal(0.2, 0.5, n), generator.normal(0.1, 0.1, m)
    ours, truth = welch(first, second), scipy.stats.ttest_ind(first, second, equal_var=False)
    interval = truth.confidence_interval(0.95)
    assert ours["p"] == pytest.approx(truth.pvalue, rel=1e-8)
    for name, expected in (("t", truth.statistic), ("df", truth.df), ("low", interval.low), ("high", interval.high)):
        assert ours[name] == pytest.approx(expected, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("n", [20, 117, 1060])
@pytest.mark.parametrize("shape", ["normal", "skewed", "hits"])
def test_the_interval_is_scipys_bca_on_the_same_resamples_and_near_it_on_others(n, shape):
    generator = np.random.default_rng(n)
    values = {"normal": generator.normal(0.5, 1, n), "skewed": generator.exponential(1, n) ** 2, "hits": generator.random(n) < 0.2}[shape]
    values = values.astype(float)
    low, high = bootstrap_interval(values, seed=1)
    fresh = scipy.stats.bootstrap((values,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(2))
    ours = np.rint(_resample_weights(n, 1).astype(float) * n) @ values / n
    drawn_alike = dataclasses.replace(fresh, bootstrap_distribution=ours)
    shared = scipy.stats.bootstrap((values,), np.mean, n_resamples=0, method="BCa", bootstrap_result=drawn_alike).confidence_interval
    assert (low, high) == (pytest.approx(shared.low, rel=1e-5), pytest.approx(shared.high, rel=1e-5))
    # 2,000 resamples place a 2.5 % quantile to about a tenth of a standard error; hits of 20 lie on a grid of half of one
    assert abs(low - fresh.confidence_interval.low) < 0.6 * fresh.standard_error
    assert abs(high - fresh.confidence_interval.high) < 0.6 * fresh.standard_error


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(7)
    for draw, mean in ((generator.normal, 0.0), (generator.exponential, 1.0)):
        samples = draw(size=(600, 80))
        low, high = bootstrap_interval(samples, seed=3)
        coverage = ((low <= mean) & (mean <= high)).mean()
        # 600 trials at .95 have a standard error of .009; skewed samples of 80 are known to cover a little less
        assert 0.92 < coverage < 0.98
        low, high = bootstrap_interval(samples, seed=3, level=0.5)
        assert 0.43 < ((low <= mean) & (mean <= high)).mean() < 0.57


def test_skewed_values_get_a_skewed_interval():
    values = np.random.default_rng(0).exponential(1, 60) ** 2
    low, high = bootstrap_interval(values, seed=0)
    assert high - values.mean() > 1.1 * (values.mean() - low)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_the_interval_moves_and_stretches_with_the_values(seed, scale, shift):
    values = np.random.default_rng(seed).exponential(1, 40)
    plain, moved = np.array(bootstrap_interval(values, 0)), np.array(bootstrap_interval(values * scale + shift, 0))
    np.testing.assert_allclose(moved, plain * scale + shift, rtol=1e-4, atol=1e-4 * scale)


def test_one_seed_gives_one_interval_and_rows_are_as_alone():
    rows = np.random.default_rng(4).normal(size=(3, 50))
    low, high = bootstrap_interval(rows, seed=9)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(bootstrap_interval(row, seed=9), (low[i], high[i]), rtol=1e-5)
    assert bootstrap_interval(rows[0], seed=9)[0] != bootstrap_interval(rows[0], seed=10)[0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1e-9])
@pytest.mark.parametrize("n", [2, 7, 623])
def test_no_change_is_no_change_without_a_warning(value, n):
    same = np.full(n, value)
    scattered = np.random.default_rng(0).normal(size=n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (same, scattered):
            assert compare_paired(values, values.copy(), 0) == {
                "n": n, "mean_gain": 0, "low": 0, "high": 0, "t": 0, "p_t": 1, "p_wilcoxon": 1, "d_z": 0,
            }  # fmt: skip
        assert bootstrap_interval(same, 0) == (pytest.approx(value), pytest.approx(value))
        alike = welch(same, np.full(n + 1, value))
    assert (alike["difference"], alike["t"], alike["p"], alike["low"], alike["high"]) == (0, 0, 1, 0, 0)


def test_rounding_is_not_evidence():
    before = np.random.default_rng(0).uniform(0.2, 0.9, 500)
    after = before * (1 + np.finfo(float).eps)
    assert compare_paired(before, after, 0)["p_t"] == 1
    # the same gain for all, up to the rounding of the subtraction
    shifted = compare_paired(before, before + 0.1, 0)
    assert shifted["mean_gain"] == pytest.approx(0.1)
    assert (shifted["t"], shifted["p_t"], shifted["d_z"]) == (None, 0, None)
    json.dumps(shifted, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=20), st.data())
def test_hits_and_misses_never_make_a_nan(before, data):
    after = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(before), max_size=len(before)))
    compared = compare_paired(np.array(before), np.array(after), 0)
    json.dumps([compared, welch(np.array(before), np.array(after))], allow_nan=False)
    assert compared["low"] - 1e-6 <= compared["mean_gain"] <= compared["high"] + 1e-6
    assert 0 <= compared["p_wilcoxon"] <= 1


def test_wrong_values_are_refused():
    with pytest.raises(TliError, match="two values"):
        bootstrap_interval(np.array([1.0]), 0)
    with pytest.raises(TliError, match="finite"):
        paired_t(np.array([1.0, np.nan]), np.zeros(2))
    with pytest.raises(TliError, match="same pairs"):
        compare_paired(np.zeros(3), np.zeros(4), 0)
