"""CLIPScore, which ``alignment`` measures, and RefCLIPScore against loops over their definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tli.metrics import alignment
from tli.metrics.alignment import measure
from tli.metrics.clipscore import ref_clip_scores


def drawn(seed: int, pairs: int, width: int = 6, references: int = 0):
    generator = np.random.default_rng(seed)
    source, target, further = (torch.from_numpy(generator.normal(size=(n, width)).astype(np.float32)) for n in (pairs, pairs, references))
    owners = np.sort(generator.integers(0, pairs, references))
    i, j = generator.integers(0, pairs, (2, pairs // 3))
    false_negatives = np.array(sorted({(a, b) for x, y in zip(i, j) for a, b in ((x, y), (y, x)) if a != b}), np.int64).reshape(-1, 2)
    return source, target, further, owners, false_negatives


def cosine(a, b) -> float:
    a, b = a.double().numpy(), b.double().numpy()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def clip(source, target) -> float:
    return 2.5 * max(cosine(source, target), 0)


def ref_clip(source, target, references) -> float:
    first, second = clip(source, target), max(0, *(cosine(target, reference) for reference in references))
    return 0 if first + second == 0 else 2 * first * second / (first + second)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 14), st.integers(1, 20))
def test_scores_are_their_definition_for_true_and_for_mismatched_pairs(seed, pairs, references):
    source, target, further, owners, false_negatives = drawn(seed, pairs, references=references)
    alike = {tuple(edge) for edge in false_negatives.tolist()}
    apart = [[j for j in range(pairs) if j != i and (i, j) not in alike] for i in range(pairs)]
    if not all(apart):
        return
    found = measure(source, target, false_negatives)
    for i in range(pairs):
        assert found.per_pair("clipscore")[i] == pytest.approx(clip(source[i], target[i]))
        forward = np.mean([clip(source[i], target[j]) for j in apart[i]])
        backward = np.mean([clip(source[j], target[i]) for j in apart[i]])
        assert found.per_pair("clipscore_mismatched")[i] == pytest.approx((forward + backward) / 2)
    np.testing.assert_allclose(found.per_pair("clipscore_gap"), found.per_pair("clipscore") - found.per_pair("clipscore_mismatched"))
    referenced = ref_clip_scores(source, target, further, owners, false_negatives)
    assert referenced.pairs.tolist() == sorted(set(owners.tolist()))
    for i, score, mismatched in zip(referenced.pairs, referenced.score, referenced.mismatched):
        own = [further[r] for r in np.flatnonzero(owners == i)]
        assert score == pytest.approx(ref_clip(source[i], target[i], own))
        assert mismatched == pytest.approx(np.mean([ref_clip(source[i], target[j], own) for j in apart[i]]))


def test_no_number_depends_on_how_many_rows_are_held_at_once(monkeypatch):
    arguments = drawn(1, 40, references=60)
    usual = ref_clip_scores(*arguments)
    monkeypatch.setattr(alignment, "_CHUNK_NUMBERS", 100)
    chunked = ref_clip_scores(*arguments)
    np.testing.assert_allclose(chunked.score, usual.score, rtol=1e-12)
    np.testing.assert_allclose(chunked.mismatched, usual.mismatched, rtol=1e-12)


def test_where_no_cosine_is_below_zero_clipscore_is_the_cosine_rescaled():
    source, target, *_, false_negatives = drawn(2, 30)
    source, target = source.abs(), target.abs()
    found = measure(source, target, false_negatives)
    for clipped, plain in (("clipscore", "cosine"), ("clipscore_mismatched", "mismatched"), ("clipscore_gap", "gap")):
        np.testing.assert_allclose(found.per_pair(clipped), 2.5 * found.per_pair(plain))


def test_words_that_share_a_vector_score_high_and_have_no_gap():
    source, target, *_, false_negatives = drawn(3, 60)
    shared = 300 * torch.ones(6)
    found = measure(source + shared, target + shared, false_negatives)
    assert found.value("clipscore") > 2.49
    assert abs(found.value("clipscore_gap")) < 1e-3


def test_vectors_of_zeros_and_opposite_vectors_score_nothing():
    source, target, further, owners, false_negatives = drawn(4, 12, references=12)
    source[0], source[1] = 0, -target[1]
    assert measure(source, target, false_negatives).per_pair("clipscore")[:2].tolist() == [0, 0]
    found = ref_clip_scores(source, target, further, np.arange(12), false_negatives)
    assert found.score[:2].tolist() == [0, 0]
    assert np.isfinite(found.mismatched).all()
