"""Tables: TSV, CSV, MUSE, Anki, spreadsheets and CLDF; the pairs that come out, what is said of them, and the errors."""

import subprocess
import sys
import zipfile

import pytest

from tests.support.word_lists import MERGED, MUSE, MUSE_PAIRS, NO_NAMES, NOUNS, PAIRS, WORDS, message, read, table, written
from tli.data.pair_store import Pair
from tli.data.word_pairs import read_pairs
from tli.runtime.errors import TliError


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
