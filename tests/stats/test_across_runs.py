"""Intervals over seeds, trends over ranks and arms compared, against scipy and by going through every case."""

import itertools

import numpy as np
import pytest
import scipy.stats

from tli.stats.across_runs import compare_arms, crossed_interval, rank_trend, seed_interval

RANKS = [1, 4, 16]


def test_the_interval_over_seeds_is_students():
    values = [0.1, 0.4, 0.2, 0.25]
    found = seed_interval(values)
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert (found["value"], found["low"], found["high"], found["n"]) == pytest.approx((np.mean(values), low, high, 4))
    assert seed_interval([0.5]) == {"value": 0.5, "low": None, "high": None, "n": 1}


@pytest.mark.parametrize(
    "values",
    [
        [[0.1, 0.2, 0.4], [0.3, 0.2, 0.5], [0.1, 0.4, 0.3]],
        # with equal values the orders are those of their mid-ranks
        [[0.1, 0.1, 0.4], [0.3, 0.3, 0.3], [0.1, 0.4, 0.4]],
        [[0.2, 0.1, 0.2, 0.2], [0.1, 0.3, 0.3, 0.4]],
    ],
    ids=["distinct", "ties", "ties of three"],
)
def test_pages_p_is_that_of_all_orders(values):
    values = np.array(values)
    weights, placed = np.arange(1, values.shape[1] + 1), scipy.stats.rankdata(values, axis=1)
    observed = sum(weights @ row for row in placed)
    orders = [[weights @ np.array(order) for order in itertools.permutations(row)] for row in placed]
    all_of_them = np.array([sum(chosen) for chosen in itertools.product(*orders)])
    ranks = [2**power for power in range(values.shape[1])]
    rise, fall = (all_of_them >= observed).mean(), (all_of_them <= observed).mean()
    found = rank_trend(values, ranks)
    assert found["page"] == observed
    assert found["p_page"] == pytest.approx(min(1, 2 * min(rise, fall)))
    # the other way round: as likely, and the correlation's sign turns
    turned = rank_trend(values[:, ::-1], ranks)
    assert turned["p_page"] == pytest.approx(found["p_page"])
    assert turned["rho"] == pytest.approx(-found["rho"])


@pytest.mark.parametrize("columns", [5, 8])
def test_pages_p_is_scipys_exact_one_where_nothing_is_equal(columns):
    values = np.random.default_rng(columns).normal(size=(4, columns)) + 0.3 * np.arange(columns)
    rise = scipy.stats.page_trend_test(values, method="exact")
    found = rank_trend(values, 2 ** np.arange(columns))
    assert (found["page"], found["p_page"]) == pytest.approx((rise.statistic, 2 * rise.pvalue))


def test_of_many_ranks_pages_p_is_the_normal_distributions_with_equal_values_counted():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 4, (3, 13)) + 0.1 * np.arange(13)
    placed, weights = scipy.stats.rankdata(values.round(), axis=1), np.arange(1, 14)
    drawn = np.array([sum(generator.permutation(row) @ weights for row in placed) for _ in range(20_000)])
    found = rank_trend(values.round(), weights)
    p = 2 * min((drawn >= found["page"]).mean(), (drawn <= found["page"]).mean())
    assert found["p_page"] == pytest.approx(p, abs=0.02)


def test_the_correlation_is_of_all_runs_with_the_ranks():
    values = np.random.default_rng(0).normal(size=(4, 3))
    expected = scipy.stats.spearmanr([0, 2, 4] * 4, values.ravel())
    found = rank_trend(values, RANKS)
    assert (found["rho"], found["p_rho"]) == pytest.approx((expected.statistic, expected.pvalue))


@pytest.mark.parametrize("values", [np.zeros((3, 3)), np.ones((3, 2)) * [1, 2]], ids=["equal", "two ranks"])
def test_too_little_says_nothing(values):
    assert set(rank_trend(values, RANKS[: values.shape[1]]).values()) == {None}


def test_one_seed_has_a_correlation_and_no_blocks():
    found = rank_trend(np.array([[0.1, 0.3, 0.2]]), RANKS)
    assert found["rho"] == pytest.approx(0.5)
    assert found["p_page"] is None


def test_arms_are_compared_seed_by_seed():
    early, full = [0.30, 0.42, 0.35], [0.21, 0.29, 0.27]
    expected = scipy.stats.ttest_rel(early, full)
    low, high = expected.confidence_interval(0.95)
    found = compare_arms(early, full)
    assert (found["t"], found["p"], found["low"], found["high"]) == pytest.approx((expected.statistic, expected.pvalue, low, high))
    assert found["difference"] == pytest.approx(np.mean(early) - np.mean(full))


def test_runs_without_spread_cannot_tell():
    assert compare_arms([0.5, 0.5], [0.25, 0.25])["p"] is None
    assert compare_arms([0.5, 0.5], [0.5, 0.5])["p"] == 1
    assert compare_arms([0.5], [0.25]) == {"difference": 0.25, "low": None, "high": None, "n": 1, "t": None, "p": None}


def crossed(generator, runs=5, words=300, each=60, over_runs=0.02, over_words=0.2):
    """Values with true mean .1: each run has its own part and draws its own words, each of which has one in all runs."""
    of_word, rows = generator.normal(0, over_words, words), []
    for run in range(runs):
        drawn = generator.permutation(words)[:each]
        values = 0.1 + generator.normal(0, over_runs) + of_word[drawn] + generator.normal(0, 0.1, each)
        rows += [(value, run, word) for value, word in zip(values, drawn)]
    return (np.array(column) for column in zip(*rows))


def test_the_interval_over_runs_and_words_holds_what_it_says(monkeypatch):
    monkeypatch.setattr("tli.stats.across_runs._RESAMPLES", 200)
    generator, inside = np.random.default_rng(0), []
    for _ in range(200):
        found = crossed_interval(*crossed(generator))
        inside.append(found["low"] <= 0.1 <= found["high"])
    assert np.mean(inside) >= 0.93


def test_the_interval_over_runs_and_words_is_wider_than_one_that_takes_all_values_for_independent():
    values, runs, words = crossed(np.random.default_rng(1), each=200)
    found = crossed_interval(values, runs, words)
    alone = scipy.stats.sem(values) * 1.96
    assert found["value"] == pytest.approx(values.mean())
    assert found["high"] - found["low"] > 2.5 * alone
    assert (found["n"], found["runs"], found["words"]) == (1000, 5, len(np.unique(words)))
    assert found == crossed_interval(values, runs + 7, words * 3)


def test_a_single_run_has_no_interval_over_runs():
    assert crossed_interval([0.1, 0.3], [0, 0], [0, 1]) == {"value": 0.2, "low": None, "high": None, "n": 2, "runs": 1, "words": 2}


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.3], [0.3, 0.1, 0.2, 0.4], [0.1, 0.5, 0.2, 0.4, 0.3], [0.2, 0.2, 0.4, 0.1]])
def test_of_one_seed_the_trends_p_is_from_all_orders(values):
    """Three in a row come up in one order of six, and as much against it in another: p is 1/3, where a t-distribution says 0."""
    found = rank_trend(np.array([values]), 2 ** np.arange(len(values)))
    rank = np.arange(len(values))
    all_of_them = [scipy.stats.spearmanr(rank, order).statistic for order in itertools.permutations(values)]
    rises, falls = (np.mean(np.array(all_of_them) * sign >= found["rho"] * sign - 1e-12) for sign in (1, -1))
    assert found["p_rho"] == pytest.approx(min(1.0, 2 * min(rises, falls)))
    assert found["page"] is None


def test_no_trend_has_a_p_of_nothing():
    found = rank_trend(np.array([[0.1, 0.2, 0.3], [0.15, 0.25, 0.35]]), [1, 2, 4])
    perfect = rank_trend(np.tile([0.1, 0.2, 0.3], (2, 1)), [1, 2, 4])
    # of 6!/(2!)^3 orders one fits best
    assert perfect["p_rho"] == pytest.approx(2 / 90)
    assert found["p_rho"] >= perfect["p_rho"]
