"""Which strings are one word."""

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.support.word_lists import WORDS, read, table
from tli.data.pair_store import Pair, normalise_word
from tli.data.word_pairs import check_disjoint, split_pairs
from tli.runtime.errors import TliError


@pytest.mark.parametrize("mark", ["\u2019", "\u02bc", "\u02bb", "\u2018", "\u0060", "\u00b4"])
def test_apostrophes_are_one_letter_and_stay_as_they_are_typed(tmp_path, mark):
    trained = read(tmp_path, "train.tsv", table([("ng'ombe", "cow"), (f"ng{mark}ambo", "overseas"), *WORDS]))
    assert trained[1].source == f"ng{mark}ambo"
    for word in (f"ng{mark}ombe", "ng'ambo"):
        held_out = read(tmp_path, "held.tsv", table([(word, "cattle"), ("nyota", "star")]))
        with pytest.raises(TliError, match="--held-out-pairs: no word may stand on both sides, got \"ng'"):
            check_disjoint(trained, held_out)


def test_marks_of_direction_leave_no_word_on_both_sides(tmp_path):
    trained = read(tmp_path, "train.tsv", table([("كتاب", "book"), ("قلم", "pen"), *WORDS]))
    held_out = read(tmp_path, "held.tsv", table([("كتاب\u200f", "volume"), ("\u202bقلم\u202c", "quill"), ("نجم", "star")]))
    assert [pair.source for pair in held_out] == ["كتاب", "قلم", "نجم"]
    assert held_out.reading.notes() == [
        "words that lost invisible characters (marks of direction, soft hyphens): 2, such as 'كتاب' (U+200F) (line 2)"
    ]
    with pytest.raises(TliError, match="no word may stand on both sides, got 'كتاب'"):
        check_disjoint(trained, held_out)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("well-known", "well\u2010known"),
        ("well-known", "well\u2011known"),
        ("Hello!", "hello"),
        ("habari?", "Habari"),
        ("كتاب", "ﻛﺘﺎﺏ"),
        ("fish", "ﬁsh"),
        ("ＡＢＣ", "abc"),
        ("STRASSE", "straße"),
        ("نعم؟", "نعم"),
        ("हाँ।", "हाँ"),
        ("don\u00b4t", "don't"),
    ],
)
def test_spellings_of_one_word_are_one_word(tmp_path, one, other):
    assert normalise_word(one) == normalise_word(other)
    pairs = read(tmp_path, "list.tsv", table([(one, "first"), (other, "second")]))
    assert list(pairs) == [Pair(one, "first", ("second",))]
    assert pairs.reading.notes() == [
        f"rows merged with an earlier one whose word is the same in another spelling: 1, {other} with {one} (line 3)"
    ]


@pytest.mark.parametrize(
    ("one", "other"), [("-zuri", "zuri"), ("ng'", "ng"), ("می\u200cخواهم", "میخواهم"), ("-", "..."), ("?", "!"), ("é", "e")]
)
def test_different_words_stay_different(tmp_path, one, other):
    pairs = read(tmp_path, "list.tsv", table([(one, "first"), (other, "second")]))
    assert [pair.source for pair in pairs] == [one, other]


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("'`\u2019\u00b4-\u2011.!\u200f ﬁK"), max_size=8))
@hypothesis.settings(deadline=None, max_examples=500)
def test_identity_is_stable_and_never_empty(word):
    folded = normalise_word(word)
    assert bool(folded) == bool(word)
    assert normalise_word(folded) == folded
    assert normalise_word(word.lower()) == folded or not word.isascii()


def test_variants_stay_on_one_side_of_a_split():
    pairs = [Pair(f"neno{i}", f"gloss{i}") for i in range(40)] + [Pair("ng'ombe", "cow"), Pair("bovu", "Ng\u2019ombe!"), Pair("x", "cow.")]
    for seed in range(10):
        trained, _ = split_pairs(pairs, 0.3, seed, "words")
        assert sum(pair.source in ("ng'ombe", "bovu", "x") for pair in trained) in (0, 3)
