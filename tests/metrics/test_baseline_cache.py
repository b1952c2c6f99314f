"""Ranks out of the cache are those that were computed; whatever is wrong with a file, they are computed again."""

import numpy as np
import pytest

from tli.metrics import baseline_cache
from tli.metrics.baseline_cache import cached
from tli.metrics.candidates import cosine_scores, rank

PAIRS = 600


def computed():
    generator = np.random.default_rng(0)
    scores = cosine_scores(*generator.normal(size=(2, 30, 4)))
    return {
        "cca": rank(scores, np.arange(10, 30), np.zeros((0, 2)), generator.integers(0, 3, 30)),
        "b": rank(scores, np.arange(4), np.zeros((0, 2)), None),
    }


def never():
    raise AssertionError("computed again")


def same(found, other) -> bool:
    assert {way: list(sets) for way, sets in found.items()} == {way: list(sets) for way, sets in other.items()}
    for way, sets in found.items():
        for name, ranks in sets.items():
            for values in ("above", "tied", "candidates"):
                for direction in ("forward", "backward"):
                    one, two = (getattr(getattr(of[way][name], direction), values) for of in (found, other))
                    np.testing.assert_array_equal(one, two)
            np.testing.assert_array_equal(ranks.pairs, other[way][name].pairs)
    return True


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baselines"


def test_what_was_computed_once_is_read(folder):
    first = cached(PAIRS, [b"words", b"states"], computed)
    assert same(first, computed())
    assert same(cached(PAIRS, [b"words", b"states"], never), first)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("parts", [[b"words", b"other"], [b"wordsstates"], [b"states", b"words"]])
def test_other_words_or_states_are_others_entries(parts):
    cached(PAIRS, [b"words", b"states"], computed)
    with pytest.raises(AssertionError, match="computed again"):
        cached(PAIRS, parts, never)


def test_other_code_or_libraries_are_others_entries(monkeypatch):
    cached(PAIRS, [b"words"], computed)
    monkeypatch.setattr(baseline_cache.importlib.metadata, "version", lambda name: "1")
    with pytest.raises(AssertionError, match="computed again"):
        cached(PAIRS, [b"words"], never)


@pytest.mark.parametrize("content", [b"", b"half a file", b"PK\x03\x04 cut"])
def test_a_broken_file_is_computed_and_written_again(folder, content):
    cached(PAIRS, [b"words"], computed)
    (file,) = folder.iterdir()
    file.write_bytes(content)
    assert same(cached(PAIRS, [b"words"], computed), computed())
    assert same(cached(PAIRS, [b"words"], never), computed())


def test_without_a_folder_to_write_to_it_is_computed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "file"))
    assert same(cached(PAIRS, [b"words"], computed), computed())


def test_short_lists_leave_no_file(folder):
    cached(60, [b"words"], computed)
    assert not folder.exists()
