"""JSON, parquet, translation rows and Wiktionary: the pairs that come out, what is said of them, and the errors."""

import json

import pytest

from tests.support.word_lists import NOUNS, PAIRS, TRANSLATION, WORDS, lines, message, read
from tli.data.pair_store import Pair
from tli.data.word_pairs import list_facts, read_pairs
from tli.runtime.errors import TliError

KAIKKI = [{"pos": "noun", "word": a, "lang": "Swahili", "lang_code": "sw", "senses": [{"glosses": [b], "id": "x"}]} for a, b in WORDS]
INTO = [
    {"pos": "noun", "word": b, "lang": "English", "lang_code": "en", "translations": [{"lang": "Swahili", "code": "sw", "word": a}]}
    for a, b in WORDS
]


@pytest.mark.parametrize(("source", "target"), [("sw", "en"), ("translation.sw", "translation.en"), ("swahili", "english"), ("SW", "Eng")])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data", "data.ndjson"])
def test_translation_rows_of_data_sets(tmp_path, source, target, name):
    assert list(read(tmp_path, name, lines(TRANSLATION), source, target)) == PAIRS
    if name != "data.jsonl":
        assert list(read(tmp_path, "data.json", json.dumps(TRANSLATION, indent=1), source, target)) == PAIRS


def test_a_language_that_is_not_among_the_translations_is_refused_with_those_that_are(tmp_path):
    said = message(tmp_path, "data.jsonl", lines(TRANSLATION[:1]), "hausa", "en")
    assert said.startswith(
        "data.jsonl:1: every row must have the keys hausa and en, got the keys 'id', 'translation', 'translation.sw', 'translation.en'"
    )


@pytest.mark.parametrize(
    ("entries", "source", "target", "expected"),
    [
        (KAIKKI, "word", "senses", NOUNS),
        (KAIKKI, "word", "senses.glosses", NOUNS),
        (KAIKKI, "swahili", "english", NOUNS),
        (KAIKKI, "senses", "word", [Pair(b, a, (), "noun") for a, b in WORDS]),
        (INTO, "word", "translations", [Pair(b, a, (), "noun") for a, b in WORDS]),
        (INTO, "english", "swahili", [Pair(b, a, (), "noun") for a, b in WORDS]),
        (INTO, "swahili", "english", NOUNS),
    ],
)
def test_wiktionarys_entries(tmp_path, entries, source, target, expected):
    assert list(read(tmp_path, "kaikki.jsonl", lines(entries), source, target)) == expected


def test_wiktionarys_senses_forms_and_other_languages(tmp_path):
    entries = [
        {
            "pos": "noun",
            "word": "jua",
            "lang": "Swahili",
            "lang_code": "sw",
            "senses": [{"glosses": ["body", "sun"]}, {"glosses": ["sunshine"]}],
        },
        {
            "pos": "noun",
            "word": "vitabu",
            "lang": "Swahili",
            "lang_code": "sw",
            "senses": [{"glosses": ["plural of kitabu"], "form_of": [{}]}],
        },
        {"pos": "noun", "word": "jua", "lang": "Zulu", "lang_code": "zu", "senses": [{"glosses": ["x"]}]},
    ]
    pairs = read(tmp_path, "kaikki.jsonl", lines(entries))
    assert list(pairs) == [Pair("jua", "sun", ("sunshine",), "noun")]
    assert pairs.reading.notes() == [
        "left out, entries without a gloss or translation in the language asked for: 2, such as 'vitabu' (line 2)"
    ]
    two = [INTO[0], {**INTO[1], "translations": [{"code": "fr", "word": "bandage"}]}]
    assert "name the two languages" in message(tmp_path, "kaikki.jsonl", lines(two), "word", "translations")
    assert "must hold the languages hausa and english, got the languages 'en'" in message(
        tmp_path, "k.jsonl", lines(INTO), "hausa", "english"
    )


def test_english_definitions_are_no_translations(tmp_path):
    entry = {"word": "port", "lang": "English", "lang_code": "en", "senses": [{"glosses": ["A place on the coast"]}]}
    assert len(read(tmp_path, "en.jsonl", lines([*INTO, entry]), "english", "swahili")) == len(WORDS)
    assert "left out" in read_pairs(tmp_path / "en.jsonl", "english", "swahili").reading.notes()[0]


def test_an_object_may_map_words_to_glosses_or_hold_the_list(tmp_path):
    mapping = {"kitabu": "book", "ndege": ["bird", "plane"], "x:y": "a, b", "peke": ""}
    pairs = read(tmp_path, "d.json", json.dumps(mapping, indent=1), skip_bad_rows=True)
    assert [(pair.source, *pair.accepted) for pair in pairs] == [("kitabu", "book"), ("ndege", "bird", "plane"), ("x:y", "a, b")]
    assert pairs.reading.notes()[0] == "took the keys as swahili and their values as english"
    assert message(tmp_path, "d.json", json.dumps(mapping, indent=1)).startswith("d.json:8: english must hold a word")
    held = {"n": 1, "words": [{"swahili": "a", "english": "b"}]}
    assert message(tmp_path, "d.json", json.dumps(held)).endswith("""got an object; run jq -c '.["words"][]' d.json > words.jsonl""")


def test_names_that_no_row_has_are_told_once(tmp_path):
    said = message(tmp_path, "d.jsonl", lines({"a": a, "b": b} for a, b in WORDS))
    assert said == (
        "d.jsonl:1: every row must have the keys swahili and english, got the keys 'a', 'b', and the like in all 5 rows; "
        "name yours with --source and --target"
    )


def test_deeper_keys_and_lists_of_glosses(tmp_path):
    rows = [{"lemma": {"form": a}, "meanings": [{"en": b}, {"en": "x"}]} for a, b in WORDS]
    assert read(tmp_path, "d.jsonl", lines(rows), "lemma.form", "meanings.en")[0] == Pair("bandari", "port", ("x",))
    smol = [{"sl": "en", "tl": "sw", "src": b, "trgs": [a, "x"]} for a, b in WORDS]
    assert read(tmp_path, "gatitos.jsonl", lines(smol), "src", "trgs")[0] == Pair("port", "bandari", ("x",))
    assert list(read(tmp_path, "gatitos.jsonl", lines(smol)))[0] == Pair("bandari", "port")
    assert read(tmp_path, "gatitos.jsonl", lines(smol), "english", "swahili")[0] == Pair("port", "bandari", ("x",))
    assert "got the languages 'en', 'sw'; name two of these" in message(tmp_path, "gatitos.jsonl", lines(smol), "hausa", "english")
    turned = read(tmp_path, "gatitos.jsonl", lines(smol), "trgs", "src")
    assert list(turned)[:2] == [Pair("bandari", "port"), Pair("x", "port", tuple(b for _, b in WORDS[1:]))]


def test_null_cells_are_blank_cells(tmp_path):
    rows = [{"swahili": a, "english": None if i % 2 == 0 else b} for i, (a, b) in enumerate(WORDS)]
    said = message(tmp_path, "d.jsonl", lines(rows))
    assert said == (
        "d.jsonl:1: every row must hold a pair of words, got 3 that do not (line 1: english must hold a word, got null | "
        "line 3: english must hold a word, got null | line 5: english must hold a word, got null); "
        "mend them, or leave them out with --skip-bad-rows"
    )
    pairs = read(tmp_path, "d.jsonl", lines(rows), skip_bad_rows=True)
    assert list(pairs) == PAIRS[1::2]
    assert pairs.reading.notes() == ["left out, bad rows: 3, such as english must hold a word, got null (line 1)"]


def test_parquet_files_and_folders_of_them(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    plain = pyarrow.table({"sw": [a for a, _ in WORDS], "en": [b for _, b in WORDS]})
    parquet.write_table(plain, tmp_path / "plain.parquet")
    assert list(read_pairs(tmp_path / "plain.parquet", "sw", "en")) == PAIRS
    nested = pyarrow.Table.from_pylist(TRANSLATION)
    for part, rows in enumerate((nested[:2], nested[2:])):
        parquet.write_table(rows, tmp_path / "data" / f"train-{part}.parquet")
    pairs = read_pairs(tmp_path / "data", "swahili", "english")
    assert list(pairs) == PAIRS
    assert pairs.reading.notes() == ["took the rows of 2 files: train-0.parquet, train-1.parquet"]
    facts = list_facts(tmp_path / "data")
    assert facts["name"] == "data"
    assert len(facts["sha256"]) == 64


def test_a_damaged_parquet_file_and_a_name_of_the_hub(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    assert "data.parquet: the parquet file must be whole, got " in message(
        tmp_path, "data.parquet", b"PAR1" + bytes(40) + b"PAR1", "sw", "en"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TliError, match="hf download --repo-type dataset google/smol --local-dir smol"):
        read_pairs("google/smol", "sw", "en")
