"""Rows of any format: blank, bad, with columns of other meaning, and with several glosses in a cell."""

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.support.word_lists import PAIRS, WORDS, lines, message, read, table
from tli.data.glosses import split_glosses
from tli.data.pair_store import Pair


def test_blank_rows_are_passed_over_and_bad_ones_listed(tmp_path):
    rows = [("kitabu", ""), ("", "bird"), ("mtoto", "child"), ("", ""), (" ", "\u200b "), *WORDS]
    said = message(tmp_path, "list.tsv", table(rows) + "\n\t\t\n\n")
    assert said == (
        "list.tsv:2: every row must hold a pair of words, got 3 that do not (line 2: english must hold a word, got an empty one | "
        "line 3: swahili must hold a word, got an empty one | line 6: english must hold a word, got an empty one); "
        "mend them, or leave them out with --skip-bad-rows"
    )
    pairs = read(tmp_path, "list.tsv", table(rows), skip_bad_rows=True)
    assert list(pairs) == [Pair("mtoto", "child"), *PAIRS]
    assert (pairs.reading.rows, pairs.reading.pairs) == (9, 6)
    assert pairs.reading.notes() == ["left out, bad rows: 3, such as english must hold a word, got an empty one (line 2)"]


def test_ten_bad_rows_are_told_and_all_counted(tmp_path):
    said = message(tmp_path, "list.tsv", table([*WORDS, *((f"neno{i}", "") for i in range(25))]))
    assert "got 25 that do not (line 7: " in said
    assert "line 16: english must hold a word, got an empty one | ...)" in said
    assert "line 17" not in said
    only = table([("x", "")] * 3)
    assert "got none" in message(tmp_path, "list.tsv", only, skip_bad_rows=True)
    assert message(tmp_path, "list.tsv", table([*WORDS, ("x", "")])).endswith(
        "fill it in or remove the row, or leave it out with --skip-bad-rows"
    )


@pytest.mark.parametrize("value", ["perhaps", "Arabic", "2"])
def test_a_column_loan_of_other_meaning_is_ignored_with_a_line(tmp_path, value):
    rows = [(*words, "no") for words in WORDS[:3]] + [(*words, value) for words in WORDS[3:]]
    pairs = read(tmp_path, "list.tsv", table(rows, header=("swahili", "english", "loan")))
    assert list(pairs) == PAIRS
    assert pairs.reading.notes() == [f"the column loan was ignored: it holds something else, such as {value!r} (line 5)"]


def test_columns_class_and_family_of_other_meaning_are_ignored_with_a_line(tmp_path):
    pairs = read(tmp_path, "d.jsonl", lines({"swahili": a, "english": b, "class": 8, "field": ["x"]} for a, b in WORDS))
    assert list(pairs) == PAIRS
    assert [note.split(":")[0] for note in pairs.reading.notes()] == ["the column class was ignored", "the column field was ignored"]
    rows = [(f"neno{i}", f"word{i}", "Bantu" if i % 3 else "Cushitic") for i in range(300)]
    pairs = read(tmp_path, "list.tsv", table(rows, header=("swahili", "english", "family")))
    assert {pair.family for pair in pairs} == {""}
    assert pairs.reading.notes() == ["the column family was ignored: it holds something else, such as 'Bantu' in 133 of 200 rows"]
    own = [(f"neno{i}", f"word{i}", f"stem{i // 3}") for i in range(300)]
    assert read(tmp_path, "list.tsv", table(own, header=("swahili", "english", "family")))[299].family == "stem99"


GLOSSES = [("nyumba", "house, home"), ("kitabu", "book; ledger"), ("ndege", "bird/plane"), ("benki", "bank (money)"), ("ku-la", "to eat"),
           ("-zuri", "good"), ("mwaka", "year(s)"), ("tazama", "look at sth."), ("njia", "road | way"), *WORDS]  # fmt: skip


def test_glosses_in_one_cell_are_kept_and_said_or_split(tmp_path):
    pairs = read(tmp_path, "list.tsv", table(GLOSSES))
    assert [(pair.source, *pair.accepted) for pair in pairs] == GLOSSES
    what = "cells of several glosses, notes or markup, taken as they are (--split-glosses makes synonyms of them)"
    assert pairs.reading.notes() == [f"{what}: 6, such as 'house, home' (line 2)"]
    split = read(tmp_path, "list.tsv", table(GLOSSES), split_glosses=True)
    expected = [
        ("house", "home"),
        ("book", "ledger"),
        ("bird", "plane"),
        ("bank",),
        ("to eat",),
        ("good",),
        ("year",),
        ("look at sth.",),
        ("road", "way"),
    ]
    assert [pair.accepted for pair in split] == expected + [(b,) for _, b in WORDS]
    assert split.reading.notes() == ["cells split into glosses, or freed of notes and markup: 6, such as 'house, home' (line 2)"]


def test_a_separator_at_the_end_goes_and_is_counted(tmp_path):
    pairs = read(tmp_path, "sw-en.tsv", table([("kitabu", "book,"), ("ndege", "bird ; ,"), ("koma", ","), *WORDS]))
    assert list(pairs) == [Pair("kitabu", "book"), Pair("ndege", "bird"), Pair("koma", ","), *PAIRS]
    assert pairs.reading.notes() == ["words that lost a separator at their end: 2, such as 'book,' (line 2)"]


@pytest.mark.parametrize(
    ("text", "glosses"),
    [
        ("house, home (of people; of animals)", ["house", "home"]),
        ("1,000", ["1,000"]),
        ("a; b / c | d", ["a", "b", "c", "d"]),
        ("n. book", ["book"]),
        ("v. eat, drink", ["eat", "drink"]),
        ("<b>cat</b><br>tom&nbsp;cat", ["cat", "tom cat"]),
        ("cat <n>", ["cat"]),
        ("AT&amp;T", ["AT&T"]),
        ("[sound:x.mp3] cat", ["cat"]),
        ("cat, cat", ["cat"]),
        ("(", ["("]),
        (",", [","]),
        ("<s>", ["<s>"]),
        ("etc.", ["etc."]),
        ("bank (money", ["bank (money"]),
    ],
)
def test_how_a_cell_is_split(text, glosses):
    assert split_glosses(text) == glosses


def test_a_source_cell_of_several_words_makes_a_pair_of_each(tmp_path):
    pairs = read(tmp_path, "list.tsv", table([("Desemba / Disemba", "December")]), split_glosses=True)
    assert list(pairs) == [Pair("Desemba", "December"), Pair("Disemba", "December")]


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(",;/|()[]<b>&amp; n.\u200e"), max_size=30))
def test_splitting_is_stable_and_never_empty(text):
    glosses = split_glosses(text)
    assert glosses
    if text.strip():
        assert all(glosses)
