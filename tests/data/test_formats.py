"""Lists as people have them, of every format: the pairs that come out, what is said of them, and the errors, each with its right value."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pathlib
import struct
import subprocess
import sys
import zipfile

import hypothesis
import hypothesis.strategies as st
import pytest

from tli.commands.lexicon import write_tsv
from tli.data.formats import FORMATS
from tli.data.formats.languages import is_column_name, same
from tli.data.glosses import split_glosses
from tli.data.pair_store import Pair, normalise_word
from tli.data.word_pairs import check_disjoint, list_facts, read_pairs, split_pairs
from tli.runtime.errors import TliError

WORDS = [("bandari", "port"), ("bandeji", "bandage"), ("bandika", "paste"), ("bangi", "cannabis"), ("bangili", "bracelet")]
PAIRS = [Pair(*words) for words in WORDS]
NOUNS = [Pair(*words, (), "noun") for words in WORDS]
MUSE = [("kitabu", "book"), ("kitabu", "ledger"), ("ndege", "bird"), ("ndege", "plane"), *WORDS]
MUSE_PAIRS = [Pair("kitabu", "book", ("ledger",)), Pair("ndege", "bird", ("plane",)), *PAIRS]
MERGED = "rows merged with an earlier one of the same word, their targets now its synonyms"
NO_NAMES = "no row of column names: column 1 is swahili, column 2 is english; the first pair is kitabu = book"
function_scoped = hypothesis.settings(
    deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def written(folder: pathlib.Path, name: str, content: str | bytes) -> pathlib.Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(rows, separator="\t", header=("swahili", "english")) -> str:
    return "".join(separator.join(row) + "\n" for row in ([header] if header else []) + list(rows))


def read(folder, name, content, source="swahili", target="english", **options):
    return read_pairs(written(folder, name, content), source, target, **options)


def message(folder, name, content, source="swahili", target="english", **options) -> str:
    with pytest.raises(TliError) as caught:
        read(folder, name, content, source, target, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


# Tables


@pytest.mark.parametrize(("name", "separator"), [("sw-en.txt", " "), ("sw-en.tsv", " "), ("sw-en.tsv", "\t"), ("sw-en.0-5000.txt", "\t")])
def test_muse_and_vecmap_lists_have_no_header_and_several_targets(tmp_path, name, separator):
    pairs = read(tmp_path, name, table(MUSE, separator, header=None))
    assert list(pairs) == MUSE_PAIRS
    notes = pairs.reading.notes()
    assert [NO_NAMES, f"{MERGED}: 2, such as kitabu = ledger (line 2)"] == notes[-2:]
    renamed = separator == " " and name.endswith(".tsv")
    assert notes[:-2] == ["read with a space between the cells, though it is called .tsv"] * renamed


@pytest.mark.parametrize(("source", "target"), [("kitabu", "book"), ("book", "kitabu")])
def test_the_first_pair_is_no_header_though_it_is_named_as_one(tmp_path, source, target):
    pairs = read(tmp_path, "sw-en.tsv", table(MUSE, header=None), source, target)
    if source == "kitabu":
        assert list(pairs) == MUSE_PAIRS
    else:
        assert list(pairs)[:2] == [Pair("book", "kitabu"), Pair("ledger", "kitabu")]
    assert "the first pair is" in pairs.reading.notes()[0]


def test_a_language_may_be_a_word_of_its_own_column(tmp_path):
    rows = [("kiswahili", "Swahili"), ("kiingereza", "English"), ("swahili", "swahili")]
    assert len(read(tmp_path, "languages.tsv", table(rows))) == 3


@pytest.mark.parametrize(
    "header", [("sw", "en"), ("Source", "Target"), ("word", "translation"), ("French", "Deutsch"), ("source word", "English gloss")]
)
def test_a_header_of_other_names_is_no_pair(tmp_path, header):
    said = message(tmp_path, "words.tsv", table(MUSE, header=header))
    assert said.startswith(
        "words.tsv:1: the header must have the columns swahili and english once each, a tab between them, got the columns "
    )
    assert repr(header[0]) in said
    assert "name yours with --source and --target" in said
    assert list(read(tmp_path, "words.tsv", table(MUSE, header=header), *header)) == MUSE_PAIRS


def test_columns_without_names_go_by_number(tmp_path):
    rows = [(str(number), *words) for number, words in enumerate(WORDS)]
    assert list(read(tmp_path, "tatoeba.tsv", table(rows, header=None), "2", "3")) == PAIRS
    assert list(read(tmp_path, "tatoeba.tsv", table(rows, header=None), "3", "2")) == [Pair(b, a) for a, b in WORDS]
    assert "as --source 1 --target 2" in message(tmp_path, "tatoeba.tsv", table(rows, header=None))


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
@pytest.mark.parametrize("name", ["list.csv", "list.txt", "list"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_separator_is_found_in_the_head_of_the_file(tmp_path, separator, name, newline):
    content = table(MUSE, separator).replace("\n", newline)
    assert list(read(tmp_path, name, content)) == MUSE_PAIRS
    assert list(read(tmp_path, name, b"\xef\xbb\xbf" + content.encode())) == MUSE_PAIRS
    assert list(read(tmp_path, name, table(MUSE, separator, header=None))) == MUSE_PAIRS


def test_excels_semicolons_and_its_own_first_line(tmp_path):
    content = "sep=;\r\n" + 'swahili;english\r\nnyumba;"house; home"\r\npaka;cat\r\n;\r\n'
    assert list(read(tmp_path, "list.csv", content)) == [Pair("nyumba", "house; home"), Pair("paka", "cat")]


def test_a_line_that_has_no_end_is_refused(tmp_path):
    assert "words.txt:1: the header must have the columns" in message(tmp_path, "words.txt", "x" * 300_000)
    assert "words.csv:1: the row must be well-formed, got field larger than field limit" in message(
        tmp_path, "words.csv", "x," + "y" * 300_000
    )
    with_tabs = "sep=\t\n" + table(WORDS)
    assert list(read(tmp_path, "words.csv", with_tabs)) == PAIRS


def test_commas_in_a_list_called_tsv_are_read_and_said(tmp_path):
    pairs = read(tmp_path, "words.tsv", table(WORDS, ","))
    assert list(pairs) == PAIRS
    assert pairs.reading.notes() == ["read with a comma between the cells, though it is called .tsv"]


def test_a_stray_quote_in_tsv_is_a_letter_and_swallows_no_rows(tmp_path):
    pairs = read(tmp_path, "tatoeba.tsv", table([('"Habari', "Hello"), *WORDS, ('nzuri"', "good"), ('say "ah"', 'a "b" c')]))
    assert [(pair.source, pair.target) for pair in pairs] == [('"Habari', "Hello"), *WORDS, ('nzuri"', "good"), ('say "ah"', 'a "b" c')]


def test_a_cell_wholly_in_quotes_loses_them(tmp_path):
    pairs = read(tmp_path, "excel.tsv", table([('"nyumba, kubwa"', '"the ""big"" house"'), ('""', "x"), ("paka", '"cat"')][::2]))
    assert [(pair.source, pair.target) for pair in pairs] == [("nyumba, kubwa", 'the "big" house'), ("paka", "cat")]


def test_an_open_quote_in_csv_makes_no_word_of_many_rows(tmp_path):
    said = message(tmp_path, "list.csv", table([('"Habari', "Hello"), *WORDS, ('nzuri"', "good")], ","))
    assert "list.csv:2: swahili must stand on one line" in said
    assert "close the quotation mark" in said


@pytest.mark.parametrize(("separator", "name"), [(" - ", "a hyphen"), (" – ", "a dash"), (" = ", "an equals sign"), (": ", "a colon")])
def test_lists_typed_as_text(tmp_path, separator, name):
    pairs = read(tmp_path, "list.txt", table([*WORDS, ("well-known", "far and wide")], separator, header=None))
    assert list(pairs) == [*PAIRS, Pair("well-known", "far and wide")]
    assert pairs.reading.format == f"table with {name} between the cells"


def test_a_table_of_markdown_and_comments_at_the_top(tmp_path):
    markdown = table([("", *row, "") for row in [("---", ":--"), *WORDS]], "|", ("", "swahili", "english", ""))
    assert list(read(tmp_path, "list.md", markdown)) == PAIRS
    comments = "# Swahili, English\n# made by hand\n"
    for header in (("swahili", "english"), ("#swahili", "english"), ("# Swahili", "english"), None):
        pairs = read(tmp_path, "list.tsv", comments + table(WORDS, header=header))
        assert list(pairs) == PAIRS
        assert pairs.reading.notes()[0] == "rows of comment at the top, passed over: 2, such as # Swahili, English"
    hashes = [(f"#{a}", b) for a, b in WORDS]
    assert [pair.source for pair in read(tmp_path, "list.tsv", table(hashes, header=None))] == [a for a, _ in hashes]


ANKI = "#separator:tab\n#html:true\n#tags column:3\n"
NOTES = [("<b>kitabu</b>", "book&nbsp;"), ("ndege", "bird<br>plane"), ("mtoto [sound:mtoto.mp3]", "<div>child</div><div>baby</div>")]
NOTE_PAIRS = [Pair("kitabu", "book"), Pair("ndege", "bird", ("plane",)), Pair("mtoto", "child", ("baby",))]


@pytest.mark.parametrize(
    "content",
    [
        ANKI + table(NOTES, header=None),
        ANKI + table([(*note, "tag") for note in NOTES], header=None),
        "#separator:semicolon\n#html:true\n" + table([(a, f'"{b}"') for a, b in NOTES], ";", header=None),
        "#separator:tab\n#html:true\n#notetype column:1\n#deck column:2\n" + table([("Basic", "d", *note) for note in NOTES], header=None),
        "#separator:tab\n#html:true\n#columns:English\tSwahili\tTags\n" + table([(b, a, "t") for a, b in NOTES], header=None),
    ],
)
def test_ankis_notes_lose_markup_and_sounds(tmp_path, content):
    assert list(read(tmp_path, "notes.txt", content)) == NOTE_PAIRS


@pytest.mark.parametrize("separator", ["", '"', "\0"])
def test_ankis_notes_without_a_separator_are_refused(tmp_path, separator):
    said = message(tmp_path, "notes.txt", f"#separator:{separator}\n" + table(NOTES, header=None))
    assert "notes.txt:1: the notes must name their separator" in said


def test_ankis_notes_without_html_keep_their_signs(tmp_path):
    content = "#separator:tab\n#html:false\n" + table([("<b>", "less than"), ("paka", "cat")], header=None)
    assert list(read(tmp_path, "notes.txt", content)) == [Pair("<b>", "less than"), Pair("paka", "cat")]


@pytest.mark.parametrize("suffix", [".xlsx", ".XLSX", ""])
def test_a_spreadsheet_is_read_from_its_first_filled_sheet(tmp_path, suffix):
    openpyxl = pytest.importorskip("openpyxl")
    pytest.importorskip("python_calamine")
    book = openpyxl.Workbook()
    book.active.title = "empty"
    sheet, other = book.create_sheet("words"), book.create_sheet("other")
    for row in [("swahili", "english", "class"), *((*words, "noun") for words in WORDS), (None, None, None), ("nane", 8, "numeral")]:
        sheet.append(row)
    other.append(("x",))
    path = tmp_path / f"words{suffix}"
    with path.open("wb") as file:
        book.save(file)
    pairs = read_pairs(path, "swahili", "english")
    assert list(pairs) == [*NOUNS, Pair("nane", "8", (), "numeral")]
    assert pairs.reading.notes() == ["took the sheet 'words', the first of 2"]


def test_readers_libraries_are_imported_when_their_format_is_met(tmp_path):
    path, libraries = written(tmp_path, "words.tsv", table(WORDS)), "{'langcodes', 'python_calamine', 'pyarrow', 'charset_normalizer'}"
    code = f"""
import sys
from tli.data.word_pairs import read_pairs
read_pairs({str(path)!r}, 'swahili', 'english')
print({libraries} & sys.modules.keys())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_without_its_library_a_format_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with zipfile.ZipFile(tmp_path / "words.xlsx", "w") as archive:
        archive.writestr("[Content_Types].xml", "")
    with pytest.raises(TliError, match=r"words.xlsx: .* got none installed; pip install 'tli\[excel\]'"):
        read_pairs(tmp_path / "words.xlsx", "swahili", "english")
    assert message(tmp_path, "words.parquet", b"PAR1" + bytes(40) + b"PAR1").endswith("none installed; pip install 'tli[parquet]'")


CLDF = ["ID", "Language_ID", "Parameter_ID", "Value", "Form", "Segments", "Comment", "Source", "Loan"]


def cldf(words, languages=("sw", "en")) -> str:
    rows = [
        (f"{i}-{tag}", tag, f"c{i}", form, form, "x", "", "src", "false" if tag == languages[0] else "")
        for i, pair in enumerate(words)
        for tag, form in zip(languages, pair, strict=True)
    ]
    return table(rows, ",", CLDF)


@pytest.mark.parametrize(("source", "target"), [("sw", "en"), ("swahili", "english"), ("swh", "eng")])
def test_cldf_forms_of_two_languages_are_joined_by_concept(tmp_path, source, target):
    content = (
        cldf(WORDS) + "x,sw,c0,forodha,forodha,x,,s,\nx,en,c0,harbour,harbour,x,,s,\nx,sw,c99,pekee,pekee,x,,s,\nx,fr,c0,port,port,x,,s,\n"
    )
    pairs = read(tmp_path, "forms.csv", content, source, target)
    assert pairs[0] == Pair("bandari", "port", ("harbour",), "", False)
    assert [pair.source for pair in pairs] == [*(a for a, _ in WORDS), "forodha"]
    assert pairs.reading.notes() == [f"left out, forms without one of the same concept in {target}: 1, 'pekee' (line 14)"]
    assert read_pairs(tmp_path, source, target)[0] == pairs[0]


def test_of_cldf_forms_languages_must_be_named_not_columns(tmp_path):
    said = message(tmp_path, "forms.csv", cldf(WORDS), "Form", "Parameter_ID")
    assert said == (
        "forms.csv:1: of CLDF forms two languages must be named, not the columns Form and Parameter_ID, got forms of the languages en, sw; "
        "name two of these, as in --source en --target sw"
    )
    said = message(tmp_path, "forms.csv", cldf(WORDS), "hausa", "english")
    assert "must hold the languages hausa and english, got the languages 'en', 'sw'; name two of these" in said


# Objects


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TRANSLATION = [{"id": str(i), "translation": {"sw": a, "en": b}} for i, (a, b) in enumerate(WORDS)]
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


# XML


def tmx(words, one="sw", two="en") -> str:
    unit = '<tu><tuv xml:lang="{}"><seg>{}</seg></tuv><tuv xml:lang="{}"><seg>{}</seg></tuv></tu>\n'
    return f'<tmx version="1.4"><header/><body>{"".join(unit.format(one, a, two, b) for a, b in words)}</body></tmx>'


@pytest.mark.parametrize(
    ("source", "target"), [("swahili", "english"), ("sw", "en"), ("SWH", "eng"), ("Kiswahili", "English"), ("swa", "EN")]
)
@pytest.mark.parametrize(("one", "two"), [("sw", "en"), ("sw-KE", "en-US"), ("swh", "EN-GB"), ("swa", "eng")])
def test_tmx_in_any_naming_of_its_languages(tmp_path, source, target, one, two):
    assert list(read(tmp_path, "a.tmx", tmx(WORDS, one, two), source, target)) == PAIRS
    assert list(read(tmp_path, "a.tmx", tmx(WORDS, two, one), source, target)) == [Pair(b, a) for a, b in WORDS]


def test_tmx_with_a_document_type_codes_and_missing_languages(tmp_path):
    head = '<?xml version="1.0" encoding="{}"?>\n<!DOCTYPE tmx SYSTEM "tmx14.dtd">\n<!-- made by hand -->\n'
    units = """<tmx version="1.4"><header/><body>
<tu><tuv xml:lang="sw"><seg><bpt i="1">&lt;b></bpt>café<ept i="1">&lt;/b></ept> kubwa</seg></tuv>
 <tuv lang="en"><seg>big <hi>café</hi></seg></tuv></tu>
<tu><tuv xml:lang="sw"><seg>peke</seg></tuv><tuv xml:lang="fr"><seg>seul</seg></tuv></tu>
</body></tmx>"""
    for encoding in ("utf-8", "iso-8859-1", "utf-16"):
        pairs = read(tmp_path, "a.xml", (head.format(encoding) + units).encode(encoding))
        assert list(pairs) == [Pair("café kubwa", "big café")]
        assert pairs.reading.notes() == ["left out, entries without both swahili and english: 1, 'peke, seul' (line 7)"]


def test_languages_that_are_not_there_are_refused_with_those_that_are(tmp_path):
    said = message(tmp_path, "a.tmx", tmx(WORDS), "hausa", "english")
    assert said == (
        "a.tmx: the list must hold the languages hausa and english, got the languages 'en', 'sw'; "
        "name two of these with --source and --target"
    )


@pytest.mark.parametrize("entry", ["martif termEntry langSet tig", "tbx conceptEntry langSec termSec"])
def test_tbx_of_both_generations(tmp_path, entry):
    root, concept, section, group = entry.split()
    concepts = "".join(
        f'<{concept} id="c{i}"><{section} xml:lang="en"><{group}><term>{b}</term></{group}><{group}><term>{b}2</term></{group}></{section}>'
        f'<{section} xml:lang="sw"><{group}><term>{a}</term></{group}></{section}></{concept}>\n'
        for i, (a, b) in enumerate(WORDS)
    )
    content = f'<?xml version="1.0"?><{root} xmlns="urn:iso:std:iso:30042:ed-2"><text><body>{concepts}</body></text></{root}>'
    assert list(read(tmp_path, "a.tbx", content)) == [Pair(a, b, (f"{b}2",)) for a, b in WORDS]


TEI = """<?xml version="1.0" encoding="UTF-8"?>
<TEI xmlns="http://www.tei-c.org/ns/1.0" version="5.0"><teiHeader/><text><body xml:lang="sw">
<entry><form><orth>ng'ombe</orth><pron>x</pron></form><gramGrp><pos>n</pos></gramGrp>
 <sense n="1"><cit type="trans" xml:lang="en"><quote>cow</quote></cit><cit type="trans" xml:lang="en"><quote>cattle, ox (male)</quote></cit>
  <cit type="example"><quote>Ng'ombe mkubwa.</quote></cit></sense></entry>
<entry><form><orth>peke</orth></form></entry>
</body></text></TEI>"""


def test_freedicts_tei(tmp_path):
    pairs = read(tmp_path, "swh-eng.tei", TEI)
    assert list(pairs) == [Pair("ng'ombe", "cow", ("cattle", "ox"), "noun")]
    assert pairs.reading.notes() == ["left out, entries without a translation: 1, 'peke' (line 6)"]
    assert list(read(tmp_path, "swh-eng.tei", TEI, "english", "swahili")) == [
        Pair(word, "ng'ombe", (), "noun") for word in ("cow", "cattle", "ox")
    ]
    assert "got the language 'en'; name it with --target en" in message(tmp_path, "swh-eng.tei", TEI, "swahili", "french")
    old = "<TEI.2><text><body><entry><form><orth>paka</orth></form><trans><tr>cat</tr></trans></entry></body></text></TEI.2>"
    assert list(read(tmp_path, "old.tei", old)) == [Pair("paka", "cat")]


def test_an_empty_tei_says_what_it_is(tmp_path):
    assert message(tmp_path, "a.tei", "<TEI/>") == (
        "a.tei:1: the list must hold at least one pair in what seems to be a TEI dictionary, got none; add pairs or name another file"
    )


def test_apertiums_bilingual_dictionaries(tmp_path):
    entries = "".join(f'<e><p><l>{a}<s n="n"/></l><r>{b}<s n="n"/></r></p></e>' for a, b in WORDS)
    assert list(read(tmp_path, "a.dix", f"<dictionary><section>{entries}</section></dictionary>")) == NOUNS
    more = """<?xml version="1.0"?>
<dictionary><alphabet/><sdefs><sdef n="n" c="Noun"/></sdefs><section id="main" type="standard">
<e r="LR"><p><l>kiti<b/>kirefu<s n="n"/></l><r>long<b/>chair<s n="n"/></r></p></e>
<e><i>redio<s n="n"/></i></e>
<e><re>[0-9]+</re></e>
</section></dictionary>"""
    pairs = read(tmp_path, "apertium-eng-swa.eng-swa.dix", more)
    assert list(pairs) == [Pair("long chair", "kiti kirefu", (), "noun"), Pair("redio", "redio", (), "noun")]
    assert list(read(tmp_path, "apertium-eng-swa.eng-swa.dix", more, "english", "swahili"))[0] == Pair(
        "kiti kirefu", "long chair", (), "noun"
    )
    alone = '<dictionary><pardefs/><section>\n<e lm="paka"><i>paka</i><par n="paka__n"/></e></section></dictionary>'
    assert "a.dix:2: the dictionary must be bilingual" in message(tmp_path, "a.dix", alone)


def test_broken_and_other_xml(tmp_path):
    assert "a.tmx:3: the file must be well-formed XML, got" in message(tmp_path, "a.tmx", "<tmx><body>\n<tu>\n</body></tmx>")
    assert "got an XLIFF translation file; convert it: xliff2tmx a.xlf words.tmx" in message(
        tmp_path, "a.xlf", "<xliff version='1.2'></xliff>"
    )
    assert "got XML with the root element 'book'; convert it" in message(tmp_path, "a.xml", "<?xml version='1.0'?><book/>")
    assert "got a web page; convert it" in message(tmp_path, "a.html", "<!DOCTYPE html><html></html>")
    laughs = (
        "<!DOCTYPE tmx [" + '<!ENTITY a "ha">' + "".join(f'<!ENTITY {b} "{f"&{a};" * 50}">' for a, b in zip("abcdefg", "bcdefgh")) + "]>"
    )
    assert "well-formed" in message(tmp_path, "a.tmx", laughs + "<tmx><body><tu><tuv lang='sw'><seg>&h;</seg></tuv></tu></body></tmx>")


# Dictionaries


def stardict(folder, entries, kinds="m", width=4, packed=True, **ifo):
    data, index = b"", b""
    for word, entry in entries:
        entry = entry if isinstance(entry, bytes) else entry.encode()
        index += word.encode() + b"\0" + struct.pack(">Q" if width == 8 else ">I", len(data)) + struct.pack(">I", len(entry))
        data += entry
    written(folder, "d.dict.dz" if packed else "d.dict", gzip.compress(data) if packed else data)
    written(folder, "d.idx", index)
    facts = {"version": "2.4.2", "bookname": "x", "wordcount": len(entries), **({"sametypesequence": kinds} if kinds else {}), **ifo}
    return written(folder, "d.ifo", "StarDict's dict ifo file\n" + "".join(f"{key}={value}\n" for key, value in facts.items()))


@pytest.mark.parametrize(
    ("kinds", "entries", "options"),
    [
        ("m", [("paka", "cat, tomcat"), ("mbwa", "n. dog"), ("x", "")], {}),
        ("m", [("paka", "paka\n1. cat; tomcat"), ("mbwa", "<n> dog")], {"width": 8, "idxoffsetbits": 64}),
        ("tm", [("paka", b"pa.ka\0cat; tomcat (male)"), ("mbwa", b"mb\0n. dog")], {"packed": False}),
        ("h", [("paka", "<b>paka</b><br>cat<br>tomcat"), ("mbwa", "<i>n.</i> dog&nbsp;")], {}),
        ("x", [("paka", "<k>paka</k>\ncat\ntomcat"), ("mbwa", "<k>mbwa</k><abr>n.</abr> dog")], {}),
        ("", [("paka", b"mcat, tomcat\0tpa\0"), ("mbwa", b"W\0\0\0\2xxmn. dog\0")], {}),
    ],
)
@pytest.mark.parametrize("named", ["d.ifo", "d.idx", "d.dict.dz"])
def test_stardict_in_its_variants(tmp_path, kinds, entries, options, named):
    path = stardict(tmp_path, entries, kinds, **options)
    if (tmp_path / named).exists():
        path = tmp_path / named
    assert list(read_pairs(path, "any", "other")) == [Pair("paka", "cat", ("tomcat",)), Pair("mbwa", "dog", (), "noun")]


def test_a_damaged_stardict_names_the_entry(tmp_path):
    path = stardict(tmp_path, [("paka", "cat"), ("mbwa", "dog")])
    whole = (tmp_path / "d.idx").read_bytes()
    (tmp_path / "d.idx").write_bytes(whole[:-3])
    with pytest.raises(TliError, match=r"d\.idx:2: the index must be whole"):
        read_pairs(path, "any", "other")
    (tmp_path / "d.idx").write_bytes(whole[:-1] + b"\xff")
    with pytest.raises(TliError, match=r"d\.idx:2: the entry must lie within the dictionary"):
        read_pairs(path, "any", "other")
    (tmp_path / "d.idx").unlink()
    with pytest.raises(TliError, match="no such file"):
        read_pairs(path, "any", "other")


def test_dictd_with_indented_text_a_fourth_column_and_latin_letters(tmp_path):
    written(tmp_path, "a.dict", "-\n   cat, tomcat\nmbwa\n   dog\n")
    assert list(read(tmp_path, "a.index", "paka\tA\tR\tPaka\nmbwa\tR\tM\n")) == [Pair("Paka", "cat", ("tomcat",)), Pair("mbwa", "dog")]
    written(tmp_path, "b.dict", "café\nmkahawa\n".encode("latin-1"))
    pairs = read(tmp_path, "b.index", "café\tA\tN\n".encode("latin-1"))
    assert list(pairs) == [Pair("café", "mkahawa")]
    assert "not UTF-8: read as cp1252, the best guess, with words such as café" in pairs.reading.notes()[0]
    assert list(read_pairs(tmp_path / "a.dict", "any", "other"))[1] == Pair("mbwa", "dog")


# Opening


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["list.tsv.gz", "list.tsv", "list"])
def test_packed_lists_are_known_by_their_first_bytes(tmp_path, pack, name):
    packed = pack(table(MUSE).encode())
    assert list(read(tmp_path, name, packed)) == MUSE_PAIRS
    assert "the list must be a whole" in message(tmp_path, name, packed[:-10])


def zipped(**files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_", "."), content)
    return buffer.getvalue()


def test_a_zip_archive_holds_one_list(tmp_path):
    assert list(read(tmp_path, "words.zip", zipped(words_csv=table(MUSE, ",")))) == MUSE_PAIRS
    assert list(read(tmp_path, "words.zip", zipped(words_jsonl=lines(TRANSLATION)), "sw", "en")) == PAIRS
    said = message(tmp_path, "words.zip", zipped(a_tsv="x", b_tsv="y"))
    assert said == "words.zip: a zip archive must hold one list, got 2: a.tsv, b.tsv; run unzip words.zip and name one of its files"
    assert "got none" in message(tmp_path, "words.zip", zipped())
    assert "whole zip file" in message(tmp_path, "words.zip", zipped(words_csv=table(MUSE))[:80])


def test_a_bomb_does_not_go_off(tmp_path):
    row = b"x" * 1000 + b"\n"
    said = message(tmp_path, "words.tsv.gz", gzip.compress(b"swahili\tenglish\n" + row * 90_000))
    assert "a compressed list must hold at most 200 times its size" in said


def test_standard_input_and_pipes(tmp_path):
    code = """
from tli.data.word_pairs import *
pairs = read_pairs('-', 'swahili', 'english')
print(len(pairs), pairs.reading.name, list_facts('-')['name'])
"""
    done = subprocess.run([sys.executable, "-c", code], input=gzip.compress(table(MUSE).encode()), capture_output=True, check=True)
    assert done.stdout.decode() == "7 standard input standard input\n"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen([sys.executable, "-c", f"open({str(pipe)!r}, 'w').write({table(MUSE)!r})"]):
        assert list(read_pairs(str(pipe), "swahili", "english")) == MUSE_PAIRS
        assert len(list_facts(str(pipe))["sha256"]) == 64


LETTERS = {
    "utf-16": [("कुत्ता", "dog"), ("paka", "cat")],
    "utf-16-le": [("ndege", "bird"), ("paka", "café")],
    "utf-16-be": [("ndege", "bird"), ("paka", "café")],
    "utf-32": [("ndege", "bird"), ("paka", "café")],
    "cp1252": [("mkahawa", "café"), ("mtoto", "niño"), ("barabara", "Straße"), ("ng’ombe", "cow")],
    "cp1251": [("книга", "kitabu"), ("дом", "nyumba"), ("кошка", "paka"), ("собака", "mbwa"), ("вода", "maji")],
    "cp1256": [("كتاب", "book"), ("قلم", "pen"), ("بيت", "house"), ("ماء", "water"), ("كلب", "dog")],
    "gb18030": [("书", "kitabu"), ("猫", "paka"), ("狗", "mbwa"), ("水", "maji"), ("房子", "nyumba")],
}


@pytest.mark.parametrize("encoding", LETTERS)
@pytest.mark.parametrize(("name", "separator"), [("list.tsv", "\t"), ("list.csv", ";")])
def test_other_encodings_are_read_and_a_guess_is_said(tmp_path, encoding, name, separator):
    pairs = read(tmp_path, name, table(LETTERS[encoding], separator).encode(encoding))
    assert [(pair.source, pair.target) for pair in pairs] == LETTERS[encoding]
    notes = pairs.reading.notes()
    assert len(notes) == (not encoding.startswith("utf"))
    assert all(f"not UTF-8: read as {encoding}, the best guess, with words such as" in note for note in notes)


def test_one_wrong_byte_makes_no_other_letters_of_a_whole_list(tmp_path):
    content = table([(f"neno{i}", f"gloss é{i}") for i in range(50)]).encode() + b"x\tcaf\xe9\n"
    assert "words.tsv:52: the file must be UTF-8, got byte 0xe9; mend the line" in message(tmp_path, "words.tsv", content)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("words.mobi", "x", "got a Kindle book; convert it: pyglossary words.mobi words.txt --write-format=Tabfile"),
        ("words.slob", "!-1SLOB\x1f", "got an Aard 2 dictionary; convert it: pyglossary"),
        ("words", b"SQLite format 3\0", "got an SQLite database; convert it: sqlite3 -header"),
        ("words.pdf", "%PDF-1.7", "got a PDF; convert it: pdftotext -layout words.pdf words.txt"),
        ("words.po", 'msgid "x"', "got a gettext catalogue; convert it: po2csv words.po words.csv"),
        ("words.bin", bytes(range(256)) * 40, "got bytes that are no text"),
        ("deck.apkg", zipped(collection_anki2="x"), "export it from Anki again"),
    ],
)
def test_what_is_not_read_is_named_with_what_converts_it(tmp_path, name, content, says):
    assert says in message(tmp_path, name, content)


# Rows


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


# Glosses


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


# Identity


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


# Languages


@pytest.mark.parametrize("found", ["sw", "swa", "swh", "Swahili", "SW", "swahili", "Kiswahili", "sw-TZ", "swh_Latn"])
@pytest.mark.parametrize("asked", ["swahili", "sw", "swh", "SWA"])
def test_one_language_by_many_names(asked, found):
    assert same(asked, found)


@pytest.mark.parametrize(
    ("asked", "found"), [("swahili", "sv"), ("en", "enm"), ("pt-BR", "pt-PT"), ("english", "zz"), ("x", "y"), ("", "en")]
)
def test_languages_that_differ(asked, found):
    assert not same(asked, found)


def test_what_names_a_column():
    assert all(map(is_column_name, ["sw", "English", "word", "source word", "Deutsch", "Translation"]))
    assert not any(map(is_column_name, ["kitabu", "book", "bei", "and", "zz"]))


# Any bytes, and back again


STARTS = [b"", b"PAR1", b"PK\x03\x04", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00", b"<tmx><body><tu>", b"<TEI><entry><form>", b"<martif>",
          b"<dictionary><e>", b"[{", b"{\"", b"[[", b"#separator:tab\n#html:true\n", b"StarDict's dict ifo file\nsametypesequence=m\n",
          b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xd0\xcf\x11\xe0", b"swahili\tenglish\n", b"swahili,english\n", b"sep=;\n",
          b"<?xml version='1.0' encoding='utf-7'?><tmx>",
          b"ID,Language_ID,Parameter_ID,Form\n", b'{"word": "a", "lang_code": "sw", "senses": [{"glosses": ']  # fmt: skip
SUFFIXES = [
    ".tsv",
    ".csv",
    ".json",
    ".jsonl",
    ".index",
    ".ifo",
    ".idx",
    ".dict",
    ".dict.dz",
    ".xlsx",
    ".parquet",
    ".tmx",
    ".tei",
    ".dix",
    ".txt",
    ".gz",
    "",
]
FRAGMENTS = st.sampled_from(
    [
        b"\t",
        b"\n",
        b",",
        b'"',
        b"swahili",
        b"english",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b"null",
        b"<seg>",
        b"</tu>",
        b"&x;",
        b"\0",
        b"\xe9",
        b"A\tA\n",
    ]
)


@hypothesis.given(
    st.sampled_from(STARTS),
    st.lists(FRAGMENTS | st.binary(max_size=12), max_size=12),
    st.sampled_from(SUFFIXES),
    st.booleans(),
    st.booleans(),
)
@hypothesis.settings(function_scoped, max_examples=600)
def test_any_bytes_are_a_list_or_one_error(tmp_path, start, parts, suffix, split, companions):
    content = start + b"".join(parts)
    if companions:
        for other in (".dict", ".idx"):
            written(tmp_path, f"any{other}", content)
    try:
        with contextlib.suppress(TliError):
            pairs = read(tmp_path, f"any{suffix}", content, split_glosses=split)
            assert all(pair.source and pair.target for pair in pairs)
    finally:
        for path in tmp_path.iterdir():
            path.unlink()


CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\"',;<&ab #\u2028\u200f"), min_size=1, max_size=8)


@hypothesis.given(
    st.lists(
        st.tuples(CELL, CELL, st.lists(CELL, max_size=2), CELL | st.just(""), st.sampled_from([True, False, None]), CELL | st.just("")),
        min_size=1,
        max_size=6,
    )
)
@hypothesis.settings(function_scoped, max_examples=300)
def test_tlis_own_tsv_reads_back_to_equal_pairs(tmp_path, rows):
    objects = [
        {
            "swahili": f"x{a}",
            "english": f"y{b}",
            "synonyms": [f"z{c}" for c in more],
            "class": kind,
            "loan": loan,
            "field": field,
            "family": field,
        }
        for a, b, more, kind, loan, field in rows
    ]
    pairs = read(tmp_path, "words.json", json.dumps(objects))
    write_tsv(pairs, tmp_path / "words.tsv", "swahili", "english")
    assert list(read_pairs(tmp_path / "words.tsv", "swahili", "english")) == list(pairs)


def test_every_format_is_documented():
    documented = (pathlib.Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert [form.name for form in FORMATS if form.name not in documented] == []
