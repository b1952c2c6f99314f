"""Alignment against loops over pairs in plain Python, and what collapsed, shuffled and poisoned vectors must give."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tli.metrics import alignment
from tli.metrics.alignment import HISTOGRAM_EDGES, cosines, csls, measure
from tli.metrics.comparison import summarize
from tli.metrics.measures import MEASURES
from tli.runtime.errors import TliError

NONE_ALIKE = np.zeros((0, 2), np.int64)
RETRIEVAL = [name for name, measure in MEASURES.items() if name.startswith(("p_at_1", "mrr"))]
CLIPSCORE = ("clipscore", "clipscore_mismatched", "clipscore_gap")


def word_vectors(pairs: int, width: int, seed: int, signal: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(pairs, width, generator=generator)
    target = signal * source + torch.randn(pairs, width, generator=generator)
    return torch.nn.functional.normalize(source, dim=1), torch.nn.functional.normalize(target, dim=1)


def both_ways(edges: list[tuple[int, int]]) -> np.ndarray:
    return np.array(sorted({e for i, j in edges for e in ((i, j), (j, i))}), np.int64).reshape(-1, 2)


def cosine(x: list[float], y: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y)) / math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))


def by_loops(source: torch.Tensor, target: torch.Tensor, false_negatives: np.ndarray) -> dict[str, list[float]]:
    source, target, alike = source.tolist(), target.tolist(), {tuple(e) for e in false_negatives.tolist()}
    names = ("cosine", "mismatched", "clipscore_mismatched", "rank_forward", "rank_backward", "chance", "mexa", "strangers", "hit_5_chance")
    result = {name: [] for name in names}
    for i in range(len(source)):
        others = [j for j in range(len(source)) if j != i and (i, j) not in alike]
        own = cosine(source[i], target[i])
        forward = [cosine(source[i], target[j]) for j in others]
        backward = [cosine(source[j], target[i]) for j in others]
        result["cosine"].append(own)
        result["mismatched"].append((math.fsum(forward) / len(others) + math.fsum(backward) / len(others)) / 2)
        clipped = [math.fsum(max(c, 0) for c in way) / len(others) for way in (forward, backward)]
        result["clipscore_mismatched"].append(2.5 * math.fsum(clipped) / 2)
        result["rank_forward"].append(1 + sum(c > own for c in forward))
        result["rank_backward"].append(1 + sum(c > own for c in backward))
        result["mexa"].append(all(own > c for c in forward + backward))
        result["strangers"] += forward
        result["hit_5_chance"].append(min(5, len(others) + 1) / (len(others) + 1))
        result["chance"].append(math.fsum(1 / r for r in range(1, len(others) + 2)) / (len(others) + 1))
    return result


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 23), st.integers(2, 9), st.integers(0, 10_000), st.integers(1, 60), st.data())
def test_every_number_agrees_with_loops_over_pairs(pairs, width, seed, chunk, data):
    # pair 0 and pair 1 stay of different meaning from the last two, so that everyone has a candidate
    index = st.integers(0, pairs - 3)
    edges = data.draw(st.lists(st.tuples(index, index).filter(lambda e: e[0] != e[1]), max_size=12))
    source, target = word_vectors(pairs, width, seed)
    truth = by_loops(source, target, both_ways(edges))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "_CHUNK_NUMBERS", chunk)
        measured = measure(source, target, both_ways(edges))
    np.testing.assert_allclose(measured.cosine, truth["cosine"], atol=1e-12)
    np.testing.assert_allclose(measured.mismatched, truth["mismatched"], atol=1e-12)
    np.testing.assert_allclose(measured.gap, np.subtract(truth["cosine"], truth["mismatched"]), atol=1e-12)
    np.testing.assert_allclose(measured.per_pair("clipscore_mismatched"), truth["clipscore_mismatched"], atol=1e-12)
    for way, ranks in ((measured.forward, truth["rank_forward"]), (measured.backward, truth["rank_backward"])):
        np.testing.assert_array_equal(way.rank, ranks)
        np.testing.assert_array_equal(way.hits_at(1), np.equal(ranks, 1))
        np.testing.assert_allclose(way.reciprocal_rank, 1 / np.array(ranks), rtol=1e-10)
    np.testing.assert_array_equal(measured.per_pair("p_at_5_backward"), np.array(truth["rank_backward"]) <= 5)
    np.testing.assert_array_equal(measured.per_pair("mexa"), truth["mexa"])
    below = np.array([[(own > c) + (own == c) / 2 for c in truth["strangers"]] for own in truth["cosine"]]).mean(1)
    # cosines nearer than a step are ties: room for two of them
    np.testing.assert_allclose(measured.auc, below, atol=1.01 / len(truth["strangers"]))
    u, _ = scipy.stats.mannwhitneyu(truth["cosine"], truth["strangers"])
    assert measured.value("auc") == pytest.approx(u / (pairs * len(truth["strangers"])), abs=1.01 / len(truth["strangers"]))
    assert measured.chance("mrr") == pytest.approx(np.mean(truth["chance"]), rel=1e-12)
    assert measured.chance("p_at_5") == pytest.approx(np.mean(truth["hit_5_chance"]), rel=1e-12)
    for way, means in zip(("cosine", "mismatched"), cosines(source, target, both_ways(edges)), strict=True):
        np.testing.assert_allclose(means, truth[way], atol=1e-12)
    assert measured.mismatched_histogram.sum() == pairs * (pairs - 1) - len(both_ways(edges))


def test_the_histogram_counts_every_mismatched_cosine_in_its_bin():
    source, target = word_vectors(40, 3, 1)
    cosines = (source.double() @ target.double().T).numpy()
    expected, _ = np.histogram(cosines[~np.eye(40, dtype=bool)], HISTOGRAM_EDGES)
    # a cosine within rounding of an edge may fall on either side of it
    assert np.abs(np.cumsum(expected) - np.cumsum(measure(source, target, NONE_ALIKE).mismatched_histogram)).max() <= 1


def csls_by_loops(source: torch.Tensor, target: torch.Tensor, false_negatives: np.ndarray) -> tuple[list[int], list[int]]:
    """Ranks forward and backward, from the definition of Conneau et al. 2018."""
    source, target, alike = source.tolist(), target.tolist(), {tuple(e) for e in false_negatives.tolist()}
    pairs, k = len(source), min(10, len(source))
    near_source = [math.fsum(sorted((cosine(s, t) for t in target), reverse=True)[:k]) / k for s in source]
    near_target = [math.fsum(sorted((cosine(s, t) for s in source), reverse=True)[:k]) / k for t in target]
    score = [[2 * cosine(s, t) - r_s - r_t for t, r_t in zip(target, near_target)] for s, r_s in zip(source, near_source)]
    others = [[j for j in range(pairs) if j != i and (i, j) not in alike] for i in range(pairs)]
    forward = [1 + sum(score[i][j] > score[i][i] for j in others[i]) for i in range(pairs)]
    return forward, [1 + sum(score[j][i] > score[i][i] for j in others[i]) for i in range(pairs)]


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 26), st.integers(2, 9), st.integers(0, 10_000), st.integers(1, 60), st.data())
def test_csls_agrees_with_loops_over_pairs(pairs, width, seed, chunk, data):
    index = st.integers(0, pairs - 3)
    false_negatives = both_ways(data.draw(st.lists(st.tuples(index, index).filter(lambda e: e[0] != e[1]), max_size=8)))
    source, target = word_vectors(pairs, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "_CHUNK_NUMBERS", chunk)
        ways = csls(source, target, false_negatives)
    for way, ranks in zip(ways, csls_by_loops(source, target, false_negatives), strict=True):
        np.testing.assert_array_equal(way.rank, ranks)


def test_csls_finds_partners_that_a_hub_hides():
    source, target = word_vectors(60, 40, 23, signal=1.5)
    # all sources lean to one side, where one target is
    source += torch.eye(40)[0]
    target[0] = torch.eye(40)[0]
    plain, corrected = measure(source, target, NONE_ALIKE).forward, csls(source, target, NONE_ALIKE)[0]
    assert plain.hits_at(1)[1:].mean() < 0.5 < corrected.hits_at(1)[1:].mean()


def test_equal_cosines_count_half_for_the_auc():
    # true cosines 1, .6 and 0, and of the six mismatched ones each of these is there, too
    source = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    target = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    measured = measure(source, target, NONE_ALIKE)
    strangers = [0.6, 1.0, 1.0, 1.0, 0.0, 0.8]
    expected = [np.mean([(own > c) + (own == c) / 2 for c in strangers]) for own in (1.0, 0.6, 0.0)]
    np.testing.assert_allclose(measured.auc, expected, atol=1e-12)


def test_the_order_of_pairs_changes_nothing_but_the_order():
    source, target = word_vectors(70, 12, 29)
    edges = [(0, 1), (5, 9), (9, 30)]
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    place = order.argsort().tolist()
    moved_edges = both_ways([(place[i], place[j]) for i, j in edges])
    one, other = measure(source, target, both_ways(edges)), measure(source[order], target[order], moved_edges)
    for metric in ("cosine", "mismatched", "gap", "auc", "mexa", "p_at_5", *RETRIEVAL):
        np.testing.assert_allclose(one.per_pair(metric)[order], other.per_pair(metric), atol=1e-12)
    for way, moved in zip(csls(source, target, both_ways(edges)), csls(source[order], target[order], moved_edges), strict=True):
        np.testing.assert_array_equal(way.rank[order], moved.rank)


@pytest.mark.parametrize("pairs", [2, 3, 101])
def test_collapsed_vectors_are_exactly_at_chance(pairs):
    vectors = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)).expand(pairs, 64)
    measured = measure(vectors, vectors, NONE_ALIKE)
    assert measured.value("cosine") == pytest.approx(1)
    assert measured.value("gap") == pytest.approx(0, abs=1e-12)
    for metric in (*RETRIEVAL, "p_at_5", "auc"):
        assert measured.value(metric) == pytest.approx(measured.chance(metric), rel=1e-10)
    # nothing beats all others where all are equal
    assert measured.value("mexa") == 0
    assert np.mean([way.hits_at(1).mean() for way in csls(vectors, vectors, NONE_ALIKE)]) == pytest.approx(1 / pairs)
    assert (measured.forward.rank == (pairs + 1) / 2).all()


def test_a_shared_sink_lifts_true_and_mismatched_cosines_but_no_control():
    # the paper's pilot: orthogonal words plus one shared vector 343 times as long
    words = torch.eye(200, dtype=torch.float32)
    shuffled = torch.roll(words, 1, 0)
    sink = torch.full((1, 200), 343 / math.sqrt(200))
    measured = measure(words + sink, shuffled + sink, NONE_ALIKE)
    assert measured.value("cosine") > 0.9999
    assert measured.value("mismatched") > 0.9999
    assert abs(measured.value("gap")) < 1e-5
    assert measured.value("p_at_1") < 0.01


def test_translations_alone_are_found_and_shuffled_ones_are_at_chance():
    source, target = word_vectors(400, 64, 5, signal=3.0)
    aligned = measure(source, target, NONE_ALIKE)
    assert aligned.value("p_at_1") > 0.99
    assert aligned.value("mexa") > 0.99 < aligned.value("auc")
    strangers = measure(source, target[torch.randperm(400, generator=torch.Generator().manual_seed(0))], NONE_ALIKE)
    scatter = strangers.per_pair("mrr").std() / 20
    assert abs(strangers.value("mrr") - strangers.chance("mrr")) < 4 * scatter
    assert abs(strangers.value("auc") - 0.5) < 4 * strangers.per_pair("auc").std() / 20
    assert abs(strangers.value("mexa") - strangers.chance("mexa")) < 4 * math.sqrt(strangers.chance("mexa") / 400)


def test_words_of_the_same_meaning_neither_compete_nor_count_as_mismatched():
    source, target = word_vectors(12, 16, 7, signal=3.0)
    # pair 1 repeats pair 0
    source[1], target[1] = source[0], target[0]
    apart, joined = measure(source, target, NONE_ALIKE), measure(source, target, both_ways([(0, 1)]))
    assert apart.forward.hits_at(1)[0] == 0.5
    assert joined.forward.hits_at(1)[0] == 1
    assert joined.mismatched[0] < apart.mismatched[0]
    np.testing.assert_array_equal(joined.forward.candidates, [11, 11] + [12] * 10)


def test_swapping_the_languages_swaps_the_directions():
    source, target = word_vectors(30, 8, 9)
    one, other = measure(source, target, both_ways([(2, 5)])), measure(target, source, both_ways([(2, 5)]))
    for metric in ("p_at_1", "mrr"):
        for way, mirrored in (("", ""), ("_forward", "_backward"), ("_backward", "_forward")):
            np.testing.assert_allclose(one.per_pair(metric + way), other.per_pair(metric + mirrored), rtol=1e-12)
    np.testing.assert_allclose(one.gap, other.gap, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(0.01, 100))
def test_only_directions_count(seed, stretch, shrink):
    source, target = word_vectors(9, 5, seed)
    plain, scaled = measure(source, target, NONE_ALIKE), measure(stretch * source, shrink * target, NONE_ALIKE)
    np.testing.assert_allclose(plain.gap, scaled.gap, atol=1e-6)


def test_16_bit_vectors_are_compared_in_full_precision():
    source, target = (side.bfloat16() for side in word_vectors(50, 32, 11))
    low, full = measure(source, target, NONE_ALIKE), measure(source.double(), target.double(), NONE_ALIKE)
    np.testing.assert_array_equal(low.cosine, full.cosine)
    np.testing.assert_array_equal(low.forward.rank, full.forward.rank)


def test_a_vector_of_zeros_has_cosine_zero():
    source, target = word_vectors(6, 4, 13)
    source[2] = 0
    measured = measure(source, target, NONE_ALIKE)
    assert measured.cosine[2] == 0
    assert np.isfinite(measured.mismatched).all()
    assert measured.forward.rank[2] == 3.5


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_number_that_is_not_finite_is_an_error_that_names_the_pair(poison, side):
    vectors = dict(zip(("source", "target"), word_vectors(5, 4, 15)))
    vectors[side][3, 1] = poison
    with pytest.raises(TliError, match=f"{side} word of pair 4"):
        measure(**vectors, false_negatives=NONE_ALIKE)


@pytest.mark.parametrize(("pairs", "edges"), [(1, []), (3, [(0, 1), (0, 2)])])
def test_a_pair_without_a_stranger_cannot_be_measured(pairs, edges):
    with pytest.raises(TliError, match="pair 1 of"):
        measure(*word_vectors(pairs, 4, 17), both_ways(edges))


def test_records_carry_the_means_of_the_arrays_with_intervals_around_them():
    share = np.linspace(0.2, 0.9, 60)
    measured = measure(*word_vectors(60, 16, 19), both_ways([(0, 1)]), share)
    found, _ = summarize({("held_out", stream, "output"): measured for stream in (None, "adapter")}, seed=0)
    records = [record for record in found if record["adapter"] == "adapter"]
    assert {r["metric"] for r in records} == {"cosine", "mismatched", "gap", "sink_share", *RETRIEVAL, *CLIPSCORE}
    for record in records:
        assert (record["split"], record["when"], record["layer"], record["n"]) == ("held_out", "after", "output", 60)
        assert record["value"] == pytest.approx(measured.per_pair(record["metric"]).mean(), rel=1e-12)
        assert record["low"] < record["value"] < record["high"]
        assert (record["chance"] is None) == (record["metric"] not in RETRIEVAL)
    values = {r["metric"]: r["value"] for r in records}
    assert values["gap"] == pytest.approx(values["cosine"] - values["mismatched"], abs=1e-12)
    assert values["mrr"] == pytest.approx((values["mrr_forward"] + values["mrr_backward"]) / 2, rel=1e-12)
    assert values["sink_share"] == pytest.approx(share.mean())
    without, _ = summarize({("held_out", None, 2): measure(*word_vectors(60, 16, 19), NONE_ALIKE)}, seed=0)
    assert "sink_share" not in {record["metric"] for record in without}
