"""Word families against the rule itself, written out over all pairs of pairs."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tli.data.pair_store import Pair
from tli.data.relatives import has_relative, relative_links
from tli.data.word_pairs import split_pairs
from tli.runtime.errors import TliError
from tli.stats.bootstrap import word_clusters

# few letters, so that words often share four in a row
WORDS = st.text("abC é-", min_size=1, max_size=8).filter(str.strip)
PAIRS = st.lists(st.builds(Pair, WORDS, WORDS, st.lists(WORDS, max_size=2).map(tuple)), max_size=14)


def letters(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum())


def are_relatives(first: Pair, second: Pair) -> bool:
    ours, theirs = letters(first.source), letters(second.source)
    shared = any(ours[start : start + 4] in theirs for start in range(len(ours) - 3))
    beginnings = [{letters(gloss)[:4] for gloss in pair.accepted if len(letters(gloss)) >= 4} for pair in (first, second)]
    return shared and bool(beginnings[0] & beginnings[1])


def families(pairs: list[Pair], related) -> list[set[int]]:
    found = [{i} for i in range(len(pairs))]
    for i, j in itertools.combinations(range(len(pairs)), 2):
        if related(pairs[i], pairs[j]):
            one, other = (next(family for family in found if k in family) for k in (i, j))
            if one is not other:
                one |= other
                found.remove(other)
    return sorted(found, key=min)


@hypothesis.given(PAIRS)
@hypothesis.settings(deadline=None, max_examples=300)
def test_links_connect_just_the_relatives(pairs):
    clusters = word_clusters(len(pairs), relative_links(pairs)) if pairs else np.zeros(0, int)
    assert [set(np.flatnonzero(clusters == number).tolist()) for number in np.unique(clusters)] == families(pairs, are_relatives)


@hypothesis.given(PAIRS, PAIRS)
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_relative_is_found_on_the_other_side(pairs, others):
    assert has_relative(pairs, others).tolist() == [any(are_relatives(pair, other) for other in others) for pair in pairs]


def test_the_familys_column_decides_where_a_list_has_one():
    entertain, entertainment = Pair("burudisha", "entertain"), Pair("burudani", "entertainment")
    assert has_relative([entertain], [entertainment]).all()
    named = [Pair("paka", "cat"), *(Pair(p.source, p.target, family=f) for p, f in ((entertain, "One"), (entertainment, "other")))]
    named += [Pair("mbwa", "dog", family="one")]
    assert relative_links(named).tolist() == [[1, 3]]
    assert has_relative(named[:2], named[2:]).tolist() == [False, True]


def test_a_split_keeps_families_together_and_says_how_not_to():
    pairs = [Pair(f"word {i}", f"gloss {i}") for i in range(10)]
    with pytest.raises(TliError, match="got 10 pairs in 1 groups; .* with --split words$"):
        split_pairs(pairs, 0.2, 0)
    assert list(map(len, split_pairs(pairs, 0.2, 0, "words"))) == [8, 2]
