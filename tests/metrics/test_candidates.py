"""Ranks in each set of candidates against a count over all of them, word by word."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tli.metrics import candidates
from tli.metrics.alignment import measure
from tli.metrics.candidates import Scores, cosine_scores, rank


def drawn(seed: int, words: int, levels: int = 6):
    generator = np.random.default_rng(seed)
    # few levels, so that many scores are equal
    scores = generator.integers(0, levels, (words, words)) / levels
    edges = {(int(i), int(j)) for i, j in generator.integers(0, words, (words // 4, 2)) if i != j}
    edges = np.array(sorted(edges | {(j, i) for i, j in edges}), np.int64).reshape(-1, 2)
    judged = np.sort(generator.choice(words, generator.integers(1, words + 1), replace=False))
    return scores, edges, judged, generator.integers(-1, 4, words)


@hypothesis.given(st.integers(0, 10_000), st.integers(2, 25))
@hypothesis.settings(deadline=None, max_examples=100)
def test_ranks_are_counted_among_the_right_candidates(seed, words):
    scores, edges, judged, classes = drawn(seed, words)
    apart = {tuple(edge) for edge in edges.tolist()}
    found = rank(Scores(lambda rows: scores[rows], lambda rows: scores.T[rows]), judged, edges, classes)
    sets = {
        "split": lambda i, j: j in judged,
        "class": lambda i, j: j in judged and classes[i] == classes[j] >= 0,
        "list": lambda i, j: True,
    }
    for name, holds in sets.items():
        others = {i: [j for j in range(words) if j != i and (i, j) not in apart and holds(i, j)] for i in judged.tolist()}
        assert found[name].pairs.tolist() == [place for place, i in enumerate(judged.tolist()) if others[i]]
        for way, table in ((found[name].forward, scores), (found[name].backward, scores.T)):
            told = list(zip(way.above.tolist(), way.tied.tolist(), way.candidates.tolist()))
            counted = [
                (sum(table[i, j] > table[i, i] for j in others[i]), sum(table[i, j] == table[i, i] for j in others[i])) for i in others
            ]
            assert told == [(*counts, len(others[i]) + 1) for counts, i in zip(counted, others) if others[i]]


def test_chunks_change_nothing(monkeypatch):
    scores, edges, judged, classes = drawn(3, 40)
    ways = Scores(lambda rows: scores[rows], lambda rows: scores.T[rows])
    whole = rank(ways, judged, edges, classes)
    monkeypatch.setattr(candidates, "_CHUNK_NUMBERS", 80)
    for name, ranks in rank(ways, judged, edges, classes).items():
        np.testing.assert_array_equal(ranks.forward.rank, whole[name].forward.rank)
        np.testing.assert_array_equal(ranks.backward.rank, whole[name].backward.rank)


def test_cosines_rank_as_the_alignment_does():
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    source, target = generator.normal(size=(2, 30, 5)).astype(np.float32)
    source[4], edges = 0, np.array([[0, 1], [1, 0]])
    measured = measure(torch.from_numpy(source), torch.from_numpy(target), edges)
    found = rank(cosine_scores(source, target), np.arange(30), edges, None)
    assert "class" not in found
    for name in ("split", "list"):
        np.testing.assert_array_equal(found[name].forward.rank, measured.forward.rank)
        np.testing.assert_array_equal(found[name].backward.rank, measured.backward.rank)
