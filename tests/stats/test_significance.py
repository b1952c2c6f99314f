"""The tests and intervals against scipy, against loops, and against what they promise: coverage, and no NaN."""

import dataclasses
import itertools
import json
import math
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tli.runtime.errors import TliError
from tli.stats.bootstrap import _resample_weights, bootstrap_interval, sign_flip, word_clusters
from tli.stats.tests import add_holm, compare_groups, compare_paired, effect_size, equivalence, holm, paired_t, welch, wilcoxon


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


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=10))
def test_the_signed_rank_test_of_a_few_pairs_with_ties_is_scipys(gains):
    gains = np.array(gains, float)
    expected = scipy.stats.wilcoxon(gains).pvalue if gains.any() else 1.0
    assert wilcoxon(np.zeros(len(gains)), gains) == pytest.approx(expected, abs=1e-12)


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
    false_negatives = np.full(n, value)
    scattered = np.random.default_rng(0).normal(size=n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (false_negatives, scattered):
            assert compare_paired(values[None], values[None].copy(), 0) == [
                {"n": n, "clusters": n, "mean_gain": 0, "low": 0, "high": 0, "t": 0, "p_t": 1, "p_wilcoxon": 1, "p_sign_flip": 1, "d_z": 0}
            ]
        assert bootstrap_interval(false_negatives, 0) == (pytest.approx(value), pytest.approx(value))
        alike = welch(false_negatives, np.full(n + 1, value))
    assert (alike["difference"], alike["t"], alike["p"], alike["low"], alike["high"]) == (0, 0, 1, 0, 0)


def test_rounding_is_not_evidence():
    before = np.random.default_rng(0).uniform(0.2, 0.9, 500)
    after = before * (1 + np.finfo(float).eps)
    assert compare_paired(before[None], after[None], 0)[0]["p_t"] == 1
    # the same gain for all, up to the rounding of the subtraction
    shifted = compare_paired(before[None], before[None] + 0.1, 0)[0]
    assert shifted["mean_gain"] == pytest.approx(0.1)
    assert (shifted["t"], shifted["p_t"], shifted["d_z"]) == (None, None, None)
    json.dumps(shifted, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=20), st.data())
def test_hits_and_misses_never_make_a_nan(before, data):
    after = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(before), max_size=len(before)))
    compared = compare_paired(np.array([before]), np.array([after]), 0)[0]
    json.dumps([compared, welch(np.array(before), np.array(after))], allow_nan=False)
    assert compared["low"] - 1e-6 <= compared["mean_gain"] <= compared["high"] + 1e-6
    assert 0 <= compared["p_wilcoxon"] <= 1


def test_wrong_values_are_refused():
    with pytest.raises(TliError, match="two values"):
        bootstrap_interval(np.array([1.0]), 0)
    with pytest.raises(TliError, match="finite"):
        paired_t(np.array([1.0, np.nan]), np.zeros(2))
    with pytest.raises(TliError, match="same pairs"):
        compare_paired(np.zeros((1, 3)), np.zeros((1, 4)), 0)


def clustered(seed: int, clusters: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Values that agree within their cluster, and the clusters' numbers, in a random order."""
    generator = np.random.default_rng(seed)
    number = np.repeat(np.arange(clusters), generator.integers(1, largest + 1, clusters))
    values = generator.exponential(1, clusters)[number] + 0.3 * generator.normal(size=len(number))
    order = generator.permutation(len(number))
    return values[order], number[order]


@pytest.mark.parametrize("clusters", [5, 40, 300])
def test_the_clustered_interval_is_scipys_bca_of_a_ratio_on_the_same_resamples(clusters):
    values, number = clustered(clusters, clusters, 5)
    # sums of such values are exact: scipy counts a resample that equals the list as a tie only then
    values = np.round(values * 64) / 64
    sums, sizes = (np.array([f(values[number == c]) for c in range(clusters)]) for f in (np.sum, len))
    # the order in which clusters are drawn is by size and by what they sum to, centred
    order = np.lexsort((sums - sizes * values.mean(), sizes))
    sums, sizes = sums[order], sizes[order].astype(float)
    counts = np.rint(_resample_weights(clusters, 1).astype(float) * clusters)
    ours = bootstrap_interval(values, 1, clusters=number)

    def ratio(total, size, axis=-1):
        return total.sum(axis) / size.sum(axis)

    start = scipy.stats.bootstrap((sums, sizes), ratio, paired=True, n_resamples=9, method="percentile")
    drawn_alike = dataclasses.replace(start, bootstrap_distribution=(counts @ sums) / (counts @ sizes))
    shared = scipy.stats.bootstrap((sums, sizes), ratio, paired=True, n_resamples=0, method="BCa", bootstrap_result=drawn_alike)
    np.testing.assert_allclose(ours, shared.confidence_interval, rtol=1e-5)


def test_clusters_of_one_are_no_clusters_but_for_the_order_of_the_draws():
    values = np.random.default_rng(0).exponential(1, 400)
    plain, alone = bootstrap_interval(values, 0), bootstrap_interval(values, 0, clusters=np.arange(400))
    error = values.std() / 20
    np.testing.assert_allclose(alone, plain, atol=0.3 * error)
    np.testing.assert_allclose(bootstrap_interval(np.sort(values), 0), alone, rtol=1e-4)


def test_the_clustered_interval_covers_where_the_plain_one_does_not():
    generator = np.random.default_rng(5)
    number = np.repeat(np.arange(40), generator.integers(1, 9, 40))
    # of 40 clusters, each at its own level: the mean of all is that of their levels, weighted by size
    samples = generator.normal(size=(500, 40))[:, number] + 0.2 * generator.normal(size=(500, len(number)))
    coverage = [
        ((low <= 0) & (high >= 0)).mean() for low, high in (bootstrap_interval(samples, 3, clusters=number), bootstrap_interval(samples, 3))
    ]
    assert 0.88 < coverage[0] < 0.97
    assert coverage[1] < 0.8


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 60), st.integers(1, 6))
def test_neither_order_nor_names_of_clusters_matter(seed, clusters, largest):
    values, number = clustered(seed, clusters, largest)
    order = np.random.default_rng(seed).permutation(len(values))
    names = np.random.default_rng(seed + 1).permutation(clusters + 7)[number]
    if len(values) > 1:
        np.testing.assert_allclose(
            bootstrap_interval(values[order], 1, clusters=names[order]), bootstrap_interval(values, 1, clusters=number), rtol=1e-5
        )
    assert sign_flip(values[order], 1, names[order]) == sign_flip(values, 1, number)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.5, -0.1, 0.0, 0.1, 0.2, 0.5]), min_size=1, max_size=9), st.data())
def test_sign_flips_are_counted_as_a_loop_over_all_of_them_counts(gains, data):
    number = np.array(data.draw(st.lists(st.integers(0, 5), min_size=len(gains), max_size=len(gains))))
    names, observed = np.unique(number), abs(math.fsum(gains))
    hits = [
        abs(math.fsum(gain * signs[list(names).index(own)] for gain, own in zip(gains, number))) >= observed - 1e-9
        for signs in itertools.product((-1, 1), repeat=len(names))
    ]
    assert sign_flip(np.array(gains), 0, number) == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("n", [3, 9, 12])
def test_sign_flips_agree_with_scipy(n):
    before, after = drawn(n, n)
    truth = scipy.stats.permutation_test(
        (after, before), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", vectorized=True, n_resamples=np.inf
    )
    assert sign_flip(after - before, 0) == pytest.approx(truth.pvalue)


def test_drawn_flips_are_near_the_t_test_and_never_at_zero():
    for seed in range(4):
        before, after = drawn(seed, 200, gain=0.03)
        p = float(sign_flip(after - before, seed))
        # 20,000 flips place p to within 4 standard errors; the t test is its limit for normal gains
        truth = paired_t(before, after)[1]
        assert abs(p - truth) < 4 * math.sqrt(truth * (1 - truth) / 20_000) + 0.01
    assert sign_flip(np.ones(400), 0) == 1 / 20_000


def test_flips_that_are_all_gone_through_and_flips_that_are_drawn_agree(monkeypatch):
    from tli.stats import bootstrap

    gains = np.random.default_rng(1).normal(0.3, 1, (3, 15))
    exact = sign_flip(gains, 0)
    monkeypatch.setattr(bootstrap, "_EXACT_CLUSTERS", 4)
    drawn_p = sign_flip(gains, 0)
    assert (drawn_p != exact).any()
    np.testing.assert_allclose(drawn_p, exact, atol=4 * math.sqrt(0.25 / 20_000))


def test_sign_flips_of_clustered_noise_keep_their_level():
    generator = np.random.default_rng(2)
    number = np.repeat(np.arange(30), generator.integers(1, 9, 30))
    gains = generator.normal(size=(400, 30))[:, number] + 0.2 * generator.normal(size=(400, len(number)))
    assert 0.02 < (sign_flip(gains, 0, number) < 0.05).mean() < 0.09
    assert (sign_flip(gains, 0) < 0.05).mean() > 0.2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferronis(p_values):
    # the closure principle: an adjusted p is the largest Bonferroni p of all families that the hypothesis belongs to
    everyone = range(len(p_values))
    families = [family for size in range(1, len(p_values) + 1) for family in itertools.combinations(everyone, size)]
    closed = [max(min(1.0, len(family) * min(p_values[j] for j in family)) for family in families if i in family) for i in everyone]
    assert holm(p_values) == pytest.approx(closed)


def test_tests_that_were_not_made_do_not_count():
    assert holm([None, 0.01, None, 0.04]) == [None, 0.02, None, 0.04]
    assert holm([]) == []
    records = [{"p": 0.03}, {"p": None}, {"p": 0.01}]
    add_holm(records, ("p",))
    assert [record["p_holm"] for record in records] == [0.03, None, 0.02]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 200), st.integers(2, 200), st.floats(0.01, 1))
def test_equivalence_is_two_one_sided_welch_tests(seed, n, m, margin):
    generator = np.random.default_rng(seed)
    first, second = generator.normal(0.2, 0.5, n), generator.normal(0.1, 0.1, m)
    ours = equivalence(first, second, margin)
    sides = [scipy.stats.ttest_ind(first + shift, second, equal_var=False, alternative=way) for shift, way in
             ((margin, "greater"), (-margin, "less"))]  # fmt: skip
    assert ours["p"] == pytest.approx(max(side.pvalue for side in sides), rel=1e-7)
    interval = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.9)
    assert (ours["low"], ours["high"]) == (pytest.approx(interval.low, rel=1e-7), pytest.approx(interval.high, rel=1e-7))
    # the two ways to say it
    assert (ours["p"] < 0.05) == (-margin < ours["low"] and ours["high"] < margin)


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
def test_a_margin_that_is_none_is_refused(margin):
    with pytest.raises(TliError, match="margin"):
        equivalence(np.zeros(3), np.ones(3), margin)


def test_pairs_that_share_a_word_are_one_cluster_also_by_way_of_others():
    false_negatives = np.array([[0, 3], [3, 0], [3, 5], [5, 3], [1, 2], [2, 1]])
    number = word_clusters(7, false_negatives)
    groups = {frozenset(np.flatnonzero(number == c)) for c in number}
    assert groups == {frozenset({0, 3, 5}), frozenset({1, 2}), frozenset({4}), frozenset({6})}
    assert len(set(word_clusters(3, np.zeros((0, 2), np.int64)))) == 3


def test_rows_are_compared_as_each_alone_and_say_what_clusters_change():
    before, after = (np.stack(part) for part in zip(drawn(1, 80), drawn(2, 80, gain=0.0)))
    number = np.arange(80) // 2
    rows = compare_paired(before, after, 0, number)
    for row, b, a in zip(rows, before, after):
        assert (row["t"], row["p_t"]) == pytest.approx(paired_t(b, a))
        assert (row["p_wilcoxon"], row["d_z"]) == pytest.approx((wilcoxon(b, a), effect_size(b, a)))
        assert (row["n"], row["mean_gain"]) == (80, pytest.approx((a - b).mean()))
        assert row["clusters"] == 40
        assert row["p_sign_flip"] == pytest.approx(float(sign_flip(a - b, 0, number)))
        assert (row["low"], row["high"]) == pytest.approx(tuple(map(float, bootstrap_interval(a - b, 0, clusters=number))), rel=1e-4)


def test_what_values_cannot_tell_is_none_and_never_a_wrong_p():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = compare_paired(np.array([[0.1]]), np.array([[0.4]]), 0)[0]
        assert (one["n"], one["mean_gain"]) == (1, pytest.approx(0.3))
        assert {one[key] for key in ("low", "high", "t", "p_t", "p_wilcoxon", "p_sign_flip", "d_z")} == {None}
        # a gain that is the same everywhere: as many signs as there are pairs, and nothing more, speak for it
        alike = compare_paired(np.zeros((1, 5)), np.full((1, 5), 0.1), 0)[0]
        assert (alike["t"], alike["p_t"], alike["d_z"], alike["p_sign_flip"]) == (None, None, None, 2 / 2**5)
        nothing = compare_paired(np.ones((1, 5)), np.ones((1, 5)), 0)[0]
        assert (nothing["t"], nothing["p_t"], nothing["d_z"], nothing["p_sign_flip"]) == (0, 1, 0, 1)
        # all pairs share one word
        together = compare_paired(*(x[None] for x in drawn(0, 6)), 0, np.zeros(6, int))[0]
        assert (together["clusters"], together["low"], together["p_sign_flip"]) == (1, None, 1)
        apart = compare_groups(np.ones(4), np.zeros(4), 0.1)
        assert (apart["difference"], apart["t"], apart["p"], apart["equivalence"]["p"]) == (1, None, None, None)
        lone = compare_groups(np.ones(1), drawn(0, 9)[0], 0.1)
        assert {lone["p"], lone["t"], lone["low"], lone["equivalence"]["p"]} == {None}
        usual = compare_groups(*drawn(0, 9), None)
    assert "equivalence" not in usual
    json.dumps([one, alike, nothing, together, apart, lone, usual], allow_nan=False)


def test_wrong_values_are_refused_by_row_and_by_cluster():
    with pytest.raises(TliError, match="finite"):
        sign_flip(np.array([1.0, math.nan]), 0)
    with pytest.raises(TliError, match="finite"):
        compare_paired(np.zeros((1, 3)), np.array([[0, math.inf, 0]]), 0)
    with pytest.raises(TliError, match="two clusters"):
        bootstrap_interval(np.arange(4.0), 0, clusters=np.zeros(4, int))
