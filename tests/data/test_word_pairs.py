"""Readers, cleaning, split and check of word lists, against brute force and against files that are wrong in one place."""

import csv
import gzip
import itertools
import json
import os
import pathlib
import string
import subprocess
import sys
import time
import unicodedata

import hypothesis
import hypothesis.strategies as st
import pytest

from tli.data import dictionary as dictionary_check
from tli.data.dictionary import FREEDICT, check
from tli.data.pair_store import Pair
from tli.data.relatives import has_relative
from tli.data.word_pairs import SHIPPED, check_disjoint, false_negative_pairs, read_pairs, split_pairs
from tli.runtime.errors import TliError

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
needs_freedict = pytest.mark.skipif(not FREEDICT.exists(), reason="dict-freedict-swh-eng is not installed")


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def base64_number(value):
    return (base64_number(value // 64) if value >= 64 else "") + DIGITS[value % 64]


def dictd(folder, entries, packed=True):
    """Write a dictionary of (headword in the index, entry) and return the path of its index."""
    data, index = b"", "00databaseutf8\tA\tA\n"
    for headword, entry in entries:
        index += f"{headword}\t{base64_number(len(data))}\t{base64_number(len(entry.encode()))}\n"
        data += entry.encode()
    written(folder, "words.dict.dz" if packed else "words.dict", gzip.compress(data) if packed else data)
    return written(folder, "words.index", index)


def plain_dictionary(folder, glosses):
    return dictd(folder, [(word, f"{word} /ipa/ <n>\n\n{gloss}\n") for word, gloss in glosses.items()])


# Reading

ANIMALS = [
    Pair("paka", "cat", (), "noun", False, "animals"),
    Pair("ng'ombe", "cow", ("cattle", "ox"), "noun", None, "animals", "cow"),
    Pair("Redio ya taifa", "radio", (), "", True),
]
TABLE = [
    ["Swahili", "CLASS", "field", "English", "loan", "synonyms", "Family"],
    ["paka", "noun", "animals", "cat", "no", "", ""],
    ["ng'ombe", "noun", "animals", "cow", "", "cattle; ox;", "cow"],
    [" Redio  ya\u00a0taifa ", "", "", "radio", "Yes", "", ""],
]
OBJECTS = [
    {"English": "cat", "SWAHILI": "paka", "class": "noun", "loan": False, "field": "animals"},
    {
        "english": "cow",
        "swahili": "ng'ombe",
        "class": "noun",
        "synonyms": ["cattle", "ox"],
        "loan": None,
        "field": "animals",
        "family": "cow",
    },
    {"english": "radio", "swahili": " Redio  ya\u00a0taifa ", "loan": "true", "synonyms": ""},
]


def table(delimiter):
    return "\n".join(delimiter.join(row) for row in TABLE) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("words.tsv", table("\t")),
        ("words.TSV", table("\t").replace("\n", "\r\n")),
        ("words.csv", b"\xef\xbb\xbf" + table(",").encode()),
        ("blank_lines.csv", "\n" + table(",").replace("\n", "\n\n").replace("cat,", '"cat",')),
        ("words.json", b"\xef\xbb\xbf" + json.dumps(OBJECTS, indent=2).encode()),
        ("words.jsonl", "\n\n".join(json.dumps(row) for row in OBJECTS)),
    ],
)
def test_every_format_gives_the_same_pairs(tmp_path, name, content):
    assert list(read_pairs(str(written(tmp_path, name, content)), "swahili", "english")) == ANIMALS


def test_columns_are_the_ones_named(tmp_path):
    path = written(tmp_path, "words.csv", "word,Deutsch,english\npaka,Katze,cat\n")
    assert list(read_pairs(path, "WORD", "deutsch")) == [Pair("paka", "Katze")]
    assert list(read_pairs(path, "english", "word")) == [Pair("cat", "paka")]


def test_quoted_field_keeps_its_comma_and_a_quoted_line_break_does_not_shift_the_lines(tmp_path):
    content = 'swahili,english,note\npaka,"cat, tame","two\nlines"\nmbwa,dog,\n'
    assert [pair.target for pair in read_pairs(written(tmp_path, "words.csv", content), "swahili", "english")] == ["cat, tame", "dog"]
    with pytest.raises(TliError, match=r"words\.csv:4: english must hold a word"):
        read_pairs(written(tmp_path, "words.csv", content.replace("dog", " ")), "swahili", "english")


def test_a_json_string_may_hold_a_line_separator(tmp_path):
    path = written(tmp_path, "words.jsonl", '{"swahili": "pa\u2028ka", "english": "cat"}\n')
    assert list(read_pairs(path, "swahili", "english")) == [Pair("pa ka", "cat")]


# Cleaning


def test_duplicates_collapse_and_further_targets_become_synonyms(tmp_path):
    rows = ["kata\tcut\tslice", "paka\tcat\t", "Kata\tladle\tCUT; scoop", "kata\tcut\t", "punguza\tcut\t"]
    path = written(tmp_path, "words.tsv", "swahili\tenglish\tsynonyms\n" + "\n".join(rows))
    expected = [Pair("kata", "cut", ("slice", "ladle", "scoop")), Pair("paka", "cat"), Pair("punguza", "cut")]
    assert list(read_pairs(path, "swahili", "english")) == expected


def test_a_duplicate_fills_in_what_the_first_row_lacks(tmp_path):
    path = written(tmp_path, "words.tsv", "swahili\tenglish\tclass\tloan\npaka\tcat\npaka\tcat\tnoun\tno\npaka\tcat\tverb\tyes\n")
    assert list(read_pairs(path, "swahili", "english")) == [Pair("paka", "cat", (), "noun", False)]


def test_one_word_in_two_unicode_forms_is_one_word(tmp_path):
    path = written(tmp_path, "words.tsv", "swahili\tenglish\ncafe\u0301\tcoffee\ncaf\u00e9\tcoffee\nca\u200bf\u00e9\ttea\n")
    assert list(read_pairs(path, "swahili", "english")) == [Pair("caf\u00e9", "coffee", ("tea",))]


LETTERS = st.characters(codec="utf-8", exclude_categories=["Cc"])
PHRASE = st.text(LETTERS | st.sampled_from(" \t\u00a0\u200b\u0301aeK"), max_size=6).map(lambda text: f"x{text}")


@hypothesis.given(st.lists(st.tuples(PHRASE, PHRASE, st.lists(PHRASE, max_size=2)), min_size=1, max_size=5))
@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_read_is_clean_and_reads_back_as_itself(tmp_path, rows):
    objects = [{"swahili": source, "english": target, "synonyms": synonyms} for source, target, synonyms in rows]
    pairs = list(read_pairs(written(tmp_path, "words.json", json.dumps(objects)), "swahili", "english"))
    for word in (word for pair in pairs for word in (pair.source, *pair.accepted)):
        assert word == unicodedata.normalize("NFC", word)
        assert word == " ".join(word.split()) != ""
    assert len({pair.source.casefold() for pair in pairs}) == len(pairs)
    again = [{"swahili": pair.source, "english": pair.target, "synonyms": list(pair.synonyms)} for pair in pairs]
    assert list(read_pairs(written(tmp_path, "again.json", json.dumps(again)), "swahili", "english")) == pairs


# Wrong files

HEADER = "swahili\tenglish\n"
ROW = '{"swahili": "paka", "english": "cat"}'


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("empty.tsv", "", 1, "at least one pair"),
        ("header_only.csv", "swahili,english\n\n", 1, "at least one pair"),
        ("one_column.tsv", "swahili\npaka\n", 1, "got the columns 'swahili'"),
        ("wrong_column.csv", "\nkiswahili,english\npaka,cat\n", 2, "got the columns 'kiswahili', 'english'"),
        ("column_twice.csv", "swahili,english,English\npaka,cat,dog\n", 1, "once each"),
        ("short_row.tsv", HEADER + "paka\tcat\nmbwa\n", 3, "got 1: 'mbwa'"),
        ("long_row.csv", "swahili,english\npaka,cat, tame\n", 2, "got 3: 'paka', 'cat', ' tame'"),
        ("empty_word.tsv", HEADER + "paka\tcat\n\n \tdog\n", 4, "swahili must hold a word"),
        ("invisible_word.tsv", HEADER + "paka\t\u200b\n", 2, "english must hold a word"),
        ("control.tsv", HEADER + "paka\tca\0t\n", 2, "english must be printable"),
        ("open_quote.csv", 'swahili,english\npaka,cat\n"mbwa,dog\nndege,bird\n', 3, "well-formed"),
        ("mixed.tsv", HEADER.encode() + "mkahawa\tcafé\nsaluni\tsalón\n".encode() + b"x\tcaf\xe9\n", 4, "utf-8, got byte 0xe9"),
        ("latin1_with_bom.jsonl", b"\xef\xbb\xbf\n" + ROW.encode() + b'\n{"\xfc', 3, "utf-8, got byte 0xfc"),
        ("empty.json", "", 1, "valid json"),
        ("empty_list.json", "[]", 1, "at least one pair"),
        ("empty.jsonl", "\n\n", 1, "at least one pair"),
        ("malformed.json", f"[\n{ROW},\n{{\n]", 4, "valid json"),
        ("malformed.jsonl", f"{ROW}\n\n{ROW[:-1]}\n", 3, "valid json"),
        ("deep.json", "[" * 100_000, 1, "valid json"),
        ("object.json", ROW, 1, "a list of objects, got an object"),
        ("string.json", '"paka"', 1, 'a list of objects, got "paka"'),
        ("row_is_list.json", f'[\n{ROW},\n\n["mbwa", "dog"]]', 4, 'an object, got ["mbwa", "dog"]'),
        ("row_is_string.jsonl", f'{ROW}\n"mbwa"', 2, 'an object, got "mbwa"'),
        ("wrong_key.json", f'[{ROW},\n{{\n"swahili": "mbwa", "eng": "dog"}}]', 2, "got the keys 'swahili', 'eng'"),
        ("wrong_key.jsonl", f"{ROW}\n{{}}", 2, "got the keys (none)"),
        ("number.json", '[\n{"swahili": "nane", "english": 8}]', 2, "english must be a string, got 8"),
        ("null.jsonl", f'{ROW}\n{{"swahili": null, "english": "nothing"}}', 2, "swahili must hold a word, got null"),
        ("empty_word.json", f'[{ROW},\n\n{{"swahili": "mbwa", "english": "\\t"}}]', 3, "english must hold a word"),
        ("half_character.json", '[{"swahili": "\\ud800", "english": "cat"}]', 1, "swahili must be printable"),
        ("synonym_number.json", '[{"swahili": "nane", "english": "eight", "synonyms": [8]}]', 1, "synonyms must be a string, got 8"),
        ("synonyms_number.json", '[{"swahili": "nane", "english": "eight", "synonyms": 8}]', 1, "synonyms must be a list"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith((".tsv", ".csv", ".json", ".jsonl")) else "",
)
def test_an_error_names_file_and_line(tmp_path, name, content, line, says):
    path = written(tmp_path, name, content)
    with pytest.raises(TliError) as caught:
        read_pairs(path, "swahili", "english")
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert says.casefold() in str(caught.value).casefold()


def test_what_is_no_list_is_refused_by_name(tmp_path):
    (tmp_path / "folder.tsv").mkdir()
    for path, says in [
        (tmp_path / "missing.tsv", "no such file"),
        (tmp_path / "missing", "no such file"),
        (tmp_path / "folder.tsv", "is a directory"),
        (tmp_path, "is a directory"),
        (written(tmp_path, "words.mdx", "?"), "got an MDict dictionary; convert it: pyglossary words.mdx words.txt --write-format=Tabfile"),
    ]:
        with pytest.raises(TliError, match=says) as caught:
            read_pairs(path, "swahili", "english")
        assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(TliError, match="--target: source and target must be two columns"):
        read_pairs(None, "Swahili", "swahili")


# dictd

KATA = "kata /kˈata/ <v>\n1.\ncut (with a knife (or scissors)), slice\n; carve\n2.\n(a) decision\n   See also: {chanja}\n\n"
ENTRIES = [
    ("kata", KATA),
    ("miti", "miti /mˈiti/ <n>\n\n Plural of {mti}: 1. tree\n\n"),
    ("ngombe", "ng'ombe /ŋˈombe/ <n> [sg=pl]\n\ncow\n"),
    ("desemba", "Desemba, Disemba /desˈemba/ <n>\n\nDecember\n"),
    ("disemba", "Desemba, Disemba /desˈemba/ <n>\n\nDecember\n"),
    ("kata", "kata <n> (pl: {makata})\n\nladle\n"),
    ("paka", "paka\ncat\n"),
]


@pytest.mark.parametrize("packed", [True, False])
def test_dictd_entries_become_pairs(tmp_path, packed):
    assert list(read_pairs(dictd(tmp_path, ENTRIES, packed), "any", "other")) == [
        Pair("kata", "cut", ("slice", "carve", "decision", "ladle"), "verb"),
        Pair("ng'ombe", "cow", (), "noun"),
        Pair("Desemba", "December", (), "noun"),
        Pair("Disemba", "December", (), "noun"),
        Pair("paka", "cat"),
    ]


@pytest.mark.parametrize(
    ("index", "line", "says"),
    [
        ("paka\tA\tJ\nmbwa\tA\tCAA\n", 2, "got bytes 0 to 8192 of 9"),
        ("paka\tJ\tB\n", 1, "got bytes 9 to 10 of 9"),
        ("\npaka\tA\n", 2, "an offset and a length"),
        ("paka\tA\t-1\n", 1, "an offset and a length"),
        ("paka\tA\t\n", 1, "an offset and a length"),
        ("\tA\tJ\n", 1, "swahili must hold a word"),
        ("00databaseinfo\tA\tJ\n", 1, "at least one pair"),
    ],
)
def test_a_wrong_dictd_index_is_named_by_line(tmp_path, index, line, says):
    written(tmp_path, "words.dict", "paka\ncat\n")
    path = written(tmp_path, "words.index", index)
    with pytest.raises(TliError) as caught:
        read_pairs(path, "swahili", "english")
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert says in str(caught.value).lower()


def test_a_dictd_entry_that_is_not_utf8_is_named_by_the_line_of_its_index(tmp_path):
    written(tmp_path, "words.dict", b"paka\ncat\nmkahawa\ncaf\xe9\n")
    path = written(tmp_path, "words.index", "paka\tA\tJ\nmkahawa\tJ\tN\n")
    with pytest.raises(TliError, match=r"words\.index:2: the entry must be UTF-8, got byte 0xe9"):
        read_pairs(path, "swahili", "english")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"x" + data, lambda data: data[:-8] + bytes(8)])
def test_a_damaged_dictd_archive_is_named(tmp_path, damage):
    path = dictd(tmp_path, ENTRIES)
    packed = tmp_path / "words.dict.dz"
    packed.write_bytes(damage(packed.read_bytes()))
    with pytest.raises(TliError, match="whole gzip file") as caught:
        read_pairs(path, "swahili", "english")
    assert str(caught.value).startswith(f"{packed}: ")


def test_a_dictd_index_without_its_dictionary(tmp_path):
    with pytest.raises(TliError, match=r"words\.dict\.dz: .*no such file.*words\.dict"):
        read_pairs(written(tmp_path, "words.index", "paka\tA\tJ\n"), "swahili", "english")


@needs_freedict
def test_the_installed_freedict_dictionary_reads():
    pairs = {pair.source: pair for pair in read_pairs(FREEDICT, "swahili", "english")}
    headwords = {line.split("\t")[0] for line in FREEDICT.read_text().splitlines() if not line.startswith("00database")}
    assert len(pairs) > 2000
    letters = {"".join(letter for letter in word.casefold() if letter.isalnum()) for word in headwords}
    assert all("".join(letter for letter in word.casefold() if letter.isalnum()) in letters for word in pairs)
    assert pairs["ng'ombe"].accepted == ("cow", "cattle")
    assert pairs["Mwarabu"].accepted == ("Arab",)
    assert not any(set("()\n;,") & set(gloss) for pair in pairs.values() for gloss in pair.accepted)


# Splitting

WORD = st.sampled_from("abcdefghijklmnopqrstuvwxyzABCXYZ")
PAIRS = st.lists(st.builds(Pair, WORD, WORD, st.lists(WORD, max_size=1).map(tuple)), max_size=14)
LOOSE = st.integers(0, 14).map(lambda count: [Pair(f"word {i}", f"gloss {i}") for i in range(count)])


def folded_words(pair):
    return {word.casefold() for word in (pair.source, pair.target, *pair.synonyms)}


def groups_by_search(pairs):
    """Sizes of the groups, found by growing each from one pair until nothing joins."""
    sizes, left = [], list(pairs)
    while left:
        known, size = folded_words(left.pop()), 1
        while joining := [i for i, pair in enumerate(left) if folded_words(pair) & known]:
            known |= folded_words(left.pop(joining[0]))
            size += 1
        sizes.append(size)
    return sizes


@hypothesis.given(PAIRS, LOOSE, st.floats(0.01, 0.99), st.integers(0, 5))
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_split_shares_no_word_and_comes_as_near_as_whole_groups_can(linked, loose, held_out, seed):
    pairs = linked + loose
    goal, sums = round(held_out * len(pairs)), {0}
    for size in groups_by_search(pairs):
        sums |= {total + size for total in sums}
    possible = [total for total in sums if 2 <= total <= len(pairs) - 2]
    nearest = min((abs(total - goal) for total in possible), default=None)
    try:
        trained, out = map(list, split_pairs(pairs, held_out, seed, "words"))
    except TliError:
        # only if a side would be too small, or the nearest sum is more than twice what was asked for
        assert nearest is None or nearest > goal and not (goal < 2 and 2 in possible)
        return
    assert abs(len(out) - goal) == nearest
    assert not set().union(*map(folded_words, trained)) & set().union(*map(folded_words, out))
    check_disjoint(trained, out)
    assert sorted(trained + out, key=repr) == sorted(pairs, key=repr)
    for side in (trained, out):
        rest = iter(pairs)
        # each pair is found after the one before it: the order is kept
        assert all(pair in rest for pair in side)
    assert tuple(map(list, split_pairs(pairs, held_out, seed, "words"))) == (trained, out)


def test_a_giant_group_is_never_held_out_for_a_small_share():
    giant = [Pair(f"word {i}", "thing") for i in range(60)]
    loose = [Pair(f"loose {i}", f"gloss {i}") for i in range(40)]
    for seed in range(20):
        assert len(split_pairs(giant + loose, 0.1, seed, "words")[1]) == 10
        assert len(split_pairs(giant + loose, 0.6, seed, "words")[1]) == 60
    with pytest.raises(TliError, match="--held-out"):
        split_pairs(giant + [Pair(f"other {i}", "stuff") for i in range(40)], 0.1, 0, "words")


def test_the_seed_chooses_the_split():
    pairs = [Pair(f"word {i}", f"gloss {i}") for i in range(200)]
    splits = {tuple(split_pairs(pairs, 0.1, seed, "words")[1]) for seed in range(10)}
    assert len(splits) == 10
    # every pair has its turn: 60 draws of 20 leave one of 200 out with probability 0.9^60 each
    drawn = {pair for seed in range(60) for pair in split_pairs(pairs, 0.1, seed, "words")[1]}
    assert len(drawn) >= 190


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_0_and_1_is_refused(held_out):
    with pytest.raises(TliError, match="--held-out: .*between 0 and 1"):
        split_pairs([Pair(f"word {i}", f"gloss {i}") for i in range(10)], held_out, 0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_pairs_are_refused(count):
    with pytest.raises(TliError, match=f"--held-out: .*got {count} pairs"):
        split_pairs([Pair(f"word {i}", f"gloss {i}") for i in range(count)], 0.5, 0)


def test_a_negative_seed_is_refused():
    with pytest.raises(TliError, match="--seed"):
        split_pairs([Pair(f"word {i}", f"gloss {i}") for i in range(10)], 0.5, -1)


def test_check_disjoint_names_the_first_word_on_both_sides():
    trained = [Pair("paka", "cat", ("pussy-cat",)), Pair("mbwa", "dog")]
    check_disjoint(trained, [Pair("ndege", "bird", ("fowl",))])
    shared = [Pair("PAKA", "tomcat"), Pair("chui", "Cat"), Pair("simba", "lion", ("Pussy-Cat",)), Pair("jibwa", "hound", ("dog",))]
    for pair, word in zip(shared, ["paka", "cat", "pussy-cat", "dog"], strict=True):
        with pytest.raises(TliError, match=f"--held-out-pairs: .*got '{word}' in .*{pair.source}"):
            check_disjoint(trained, [Pair("ndege", "bird"), pair, Pair("mbwa", "dog")])


# Same meaning


@hypothesis.given(PAIRS)
@hypothesis.settings(deadline=None)
def test_same_meaning_is_what_comparing_all_pairs_finds(pairs):
    def share(a, b):
        glosses = [{gloss.casefold() for gloss in (pair.target, *pair.synonyms)} for pair in (a, b)]
        return a.source.casefold() == b.source.casefold() or glosses[0] & glosses[1]

    edges = false_negative_pairs(pairs)
    assert edges.dtype == "int64"
    assert edges.shape[1] == 2
    assert edges.tolist() == [[i, j] for i, j in itertools.product(range(len(pairs)), repeat=2) if i != j and share(pairs[i], pairs[j])]


def test_a_word_of_one_language_is_no_gloss_of_the_other():
    assert len(false_negative_pairs([Pair("nguzo", "pole"), Pair("pole", "sorry")])) == 0


@pytest.mark.slow
def test_a_hundred_thousand_pairs_take_seconds():
    pairs = [Pair(f"word {i}", f"gloss {i // 2}", (f"gloss {i % 90_000}",)) for i in range(100_000)]
    start = time.perf_counter()
    edges = false_negative_pairs(pairs)
    split_pairs([Pair(f"word {i}", f"gloss {i // 2}") for i in range(100_000)], 0.5, 0, "words")
    assert time.perf_counter() - start < 15
    assert {(0, 1), (1, 0), (0, 90_000)} <= set(map(tuple, edges[:10].tolist()))


# The shipped list


def test_the_shipped_list_is_one_to_one_and_fully_described():
    with SHIPPED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) >= 1200
    for side in ("swahili", "english"):
        words = [row[side].casefold() for row in rows]
        assert sorted(words) == sorted(set(words)), side
        assert all(word == word.strip() and len(word.split()) == 1 for word in words), side
    assert all(row["class"] and row["loan"] in ("yes", "no") for row in rows)
    assert len({row["class"] for row in rows}) >= 3
    assert len({row["field"] for row in rows}) >= 5
    pairs = read_pairs(None, "swahili", "english")
    assert [(pair.source, pair.target) for pair in pairs] == [(row["swahili"], row["english"]) for row in rows]
    assert all(pair.word_class and pair.loan is not None for pair in pairs)


@pytest.mark.parametrize("by", ["families", "words"])
@pytest.mark.parametrize("held_out", [0.05, 0.1, 0.3])
def test_the_shipped_list_splits_at_the_share_asked_for(held_out, by):
    pairs = read_pairs(None, "swahili", "english")
    trained, out = split_pairs(pairs, held_out, 0, by)
    assert len(out) == round(held_out * len(pairs))
    check_disjoint(trained, out)
    # on the shipped list about one pair in eight has a relative on the other side if nobody sees to it
    assert has_relative(out, trained).sum() == 0 if by == "families" else has_relative(out, trained).mean() > 0.05


@needs_freedict
def test_the_shipped_list_agrees_with_freedict(capsys):
    assert check(None, "swahili", "english", FREEDICT) >= 0.95, capsys.readouterr().out


# Check


def share_of(tmp_path, ours, theirs, word_class="noun"):
    """The share of agreement of ``{word: (gloss; synonyms)}`` with a dictionary of ``{word: glosses}``."""
    rows = [f"{word}\t{gloss}\t{synonyms}\t{word_class}" for word, (gloss, _, synonyms) in ((w, g.partition(";")) for w, g in ours.items())]
    pairs = written(tmp_path, "ours.tsv", "swahili\tenglish\tsynonyms\tclass\n" + "\n".join(rows))
    return check(str(pairs), "swahili", "english", plain_dictionary(tmp_path, theirs))


@pytest.mark.parametrize(
    ("ours", "theirs", "agree"),
    [
        ("cat", "cat", True),
        ("Cat", "CAT", True),
        ("cat", "dog", False),
        ("cat", "dog, cat", True),
        ("feline;cat", "cat", True),
        ("cat", "cats", True),
        ("boxes", "box", True),
        ("dance", "dancing", True),
        ("dancing", "dance", True),
        ("walked", "walk", True),
        ("loved", "love", True),
        ("car", "care", False),
        ("run", "to run", True),
        ("torn", "be torn", True),
        ("the cat", "a cat", True),
        ("lime", "lime (fruit)", True),
        ("fruit", "lime (fruit)", False),
        ("these", "this/these", True),
        ("oil", "olive oil", True),
        ("oil", "oil of the olive", False),
        ("olive oil", "oil", False),
        ("at", "cat", False),
    ],
)
def test_what_counts_as_agreement(tmp_path, capsys, ours, theirs, agree):
    assert share_of(tmp_path, {"neno": ours}, {"neno": theirs}) == agree
    # a disagreement is shown with both sides, an agreement is not
    assert ("  neno: " in capsys.readouterr().out) != agree


@pytest.mark.parametrize(
    ("ours", "theirs", "word_class", "found"),
    [
        ("soma", "kusoma", "verb", True),
        ("kusoma", "soma", "verb", True),
        ("-soma", "soma", "verb", True),
        ("soma", "-soma", "verb", True),
        ("zuri", "-zuri", "adjective", True),
        ("Ng'ombe", "ngombe", "noun", True),
        ("kuku", "ku", "noun", False),
        ("soma", "kusoma", "noun", False),
    ],
)
def test_where_a_word_is_looked_up(tmp_path, capsys, ours, theirs, word_class, found):
    assert share_of(tmp_path, {ours: "gloss"}, {theirs: "gloss"}, word_class) == found
    assert f"{int(found)} of these words found" in capsys.readouterr().out


def test_check_prints_the_form_of_the_list(tmp_path, capsys):
    pairs = written(tmp_path, "ours.tsv", "swahili\tenglish\nPaka\tcat\npaka\tkitty\nmbwa\tCat\nbibi harusi\tbride\n")
    check(str(pairs), "swahili", "english", plain_dictionary(tmp_path, {"paka": "cat"}))
    out = capsys.readouterr().out
    assert "4 rows" in out
    assert "swahili words on several rows: 1 paka" in out
    assert "english words on several rows: 1 cat" in out
    assert "entries of several words: 1 bibi harusi" in out


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tli.lexicon", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


def test_the_exit_code_says_whether_19_of_20_agree(tmp_path):
    dictionary = plain_dictionary(tmp_path, {f"neno{i}": f"word{i}" for i in range(20)})
    for wrong, code in ((0, 0), (1, 0), (2, 1)):
        rows = [f"neno{i}\t{'wrong' if i < wrong else 'word'}{i}" for i in range(20)]
        pairs = written(tmp_path, "ours.tsv", "neno\tword\n" + "\n".join(rows))
        ended = command("check", "--pairs", pairs, "--source", "neno", "--target", "word", "--dictionary", dictionary)
        assert ended.returncode == code, ended.stderr
        assert f"20 of these words found, {20 - wrong} agree" in ended.stdout
        assert ended.stdout.count(" | ") == wrong


def test_a_command_with_a_wrong_file_ends_with_2_and_one_line(tmp_path):
    ended = command("check", "--pairs", tmp_path / "missing.tsv", "--dictionary", plain_dictionary(tmp_path, {"paka": "cat"}))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert command("split").returncode == 2


def test_without_freedict_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(dictionary_check, "FREEDICT", tmp_path / "freedict-swh-eng.index")
    with pytest.raises(TliError, match="apt install dict-freedict-swh-eng"):
        check(None, "swahili", "english", dictionary_check.FREEDICT)
