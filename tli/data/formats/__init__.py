"""The formats of word lists. A format is one generator of ``(line, row)`` and one line in ``FORMATS``.

A row maps ``source`` and ``target`` to a string or a list of strings, and ``synonyms``, ``class``, ``loan``, ``field`` and ``family`` to
what the list says of them; a generator yields ``BadRow`` in place of a row that holds no pair, and goes on. What is common to all formats
is done elsewhere: opening, decompressing and decoding in ``source.py``, cleaning and splitting in ``tli/data/rows.py``.

source.py        the bytes and the text of a list
languages.py     which of a list's languages are the two asked for
tables.py        TSV, CSV, word word, Anki, spreadsheets, CLDF
objects.py       JSON, JSONL, parquet, translation rows, Wiktionary
markup.py        TMX, TBX, TEI, Apertium
dictionaries.py  dictd, StarDict

A format is known by its content; the suffix is a hint. A reader's library is imported when its format is met.
"""

import os
import pathlib
import typing
from collections.abc import Callable, Iterator

from tli.data.formats import dictionaries, markup, objects, tables
from tli.data.formats.source import Asked, BadRow, ListFile, Row, local_file
from tli.runtime.errors import TliError

Rows = Iterator[tuple[int, Row | BadRow]]


class Format(typing.NamedTuple):
    """A format: what it is called, whether a file is of it, and its generator of rows."""

    name: str
    is_it: Callable[[ListFile], bool]
    rows: Callable[[ListFile, Asked], Rows]
    is_text: bool = True


def _root(*names: str) -> Callable[[ListFile], bool]:
    return lambda file: markup.root_of(file) in names


def _begins(*marks: bytes) -> Callable[[ListFile], bool]:
    return lambda file: file.head.startswith(marks)


# the first that a file is of; a table is what is left
FORMATS = (
    Format("parquet", _begins(b"PAR1"), objects.parquet, is_text=False),
    Format("spreadsheet", _begins(b"PK\x03\x04", b"\xd0\xcf\x11\xe0"), tables.spreadsheet, is_text=False),
    Format("StarDict dictionary", dictionaries.is_stardict, dictionaries.stardict),
    Format("dictd dictionary", dictionaries.is_dictd, dictionaries.dictd),
    Format("Anki notes", tables.is_anki, tables.anki),
    Format("TMX translation memory", _root("tmx"), markup.tmx),
    Format("TBX termbase", _root("martif", "tbx"), markup.tbx),
    Format("TEI dictionary", _root("TEI", "TEI.2"), markup.tei),
    Format("Apertium dictionary", _root("dictionary"), markup.dix),
    Format("JSON lines", objects.is_jsonl, objects.json_lines),
    Format("JSON list", objects.is_json, objects.json_document),
    Format("table", lambda file: True, tables.table),
)

_PYGLOSSARY = "pyglossary {file} words.txt --write-format=Tabfile"
# what is met but not read: how its bytes begin, or its suffix; what it is; the command that makes something of it that is read
_REFUSED: tuple[tuple[bytes, tuple[str, ...], str, str], ...] = (
    (b"SQLite format 3\0", (), "an SQLite database", "sqlite3 -header -separator '\t' {file} 'SELECT ... FROM ...' > words.tsv"),
    (b"(\xb5/\xfd", (), "zstandard data", "unzstd {file}"),
    (b"7z\xbc\xaf\x27\x1c", (), "a 7-Zip archive", "7z x {file}"),
    (b"Rar!", (), "a RAR archive", "unrar x {file}"),
    (b"%PDF", (), "a PDF", "pdftotext -layout {file} words.txt"),
    (b"", (".tar",), "a tar archive", "tar -xf {file}"),
    (b"ARROW1", (".arrow", ".feather"), "an Arrow file", "write it as parquet, with Dataset.to_parquet or pyarrow.parquet.write_table"),
    (b"\x93NUMPY", (".npy",), "a NumPy array", "export it as TSV"),
    (b"!-1SLOB", (".slob",), "an Aard 2 dictionary", _PYGLOSSARY),
    (b"", (".mdx", ".mdd"), "an MDict dictionary", _PYGLOSSARY),
    (b"", (".mobi", ".azw", ".azw3", ".prc"), "a Kindle book", _PYGLOSSARY),
    (b"", (".bgl",), "a Babylon glossary", _PYGLOSSARY),
    (b"", (".dsl",), "an ABBYY Lingvo dictionary", _PYGLOSSARY),
    (b"", (".ld2", ".lsd", ".epub", ".aar", ".zim"), "a dictionary in a binary format", _PYGLOSSARY),
    (b"", (".po", ".pot"), "a gettext catalogue", "po2csv {file} words.csv"),
    (b"", (".apkg", ".colpkg"), "an Anki package", "export it from Anki again, as Notes in Plain Text"),
)  # fmt: skip
_REFUSED_ROOTS = {
    "xliff": ("an XLIFF translation file", "xliff2tmx {file} words.tmx"),
    "xdxf": ("an XDXF dictionary", _PYGLOSSARY),
    "lift": ("a LIFT lexicon", "export it from FieldWorks as a table, or with lift2csv"),
    "html": ("a web page", "save the table that it shows as CSV"),
}


def rows(path: str | os.PathLike, asked: Asked) -> Rows:
    """The rows of a list of any format, with their lines.

    Raises:
        TliError: the list cannot be read, with the file, and the line where one is to blame.
    """
    folder = local_file(path)
    if folder.is_dir():
        if next(folder.rglob("*.parquet"), None) is not None:
            return objects.parquet_folder(folder, asked)
        forms = [found for found in (folder / "forms.csv", folder / "cldf" / "forms.csv") if found.is_file()]
        path = forms[0] if forms else path
    elif not folder.exists():
        _refuse_hub_names(os.fspath(path))
    file = ListFile(dictionaries.beside(pathlib.Path(path)))
    for mark, suffixes, what, command in _REFUSED:
        if mark and file.head.startswith(mark) or file.suffix in suffixes:
            _refuse(file, what, command)
    found = next(form for form in FORMATS if form.is_it(file))
    if found is FORMATS[-1]:
        root = markup.root_of(file).lower()
        if root in _REFUSED_ROOTS or file.head_text.startswith("<?xml"):
            _refuse(file, *_REFUSED_ROOTS.get(root, (f"XML with the root element {root!r}", "write its words as TSV")))
    asked.reading.format = found.name
    if found.is_text:
        asked.reading.encoding = file.encoding.removesuffix("-sig")
        if guess := file.guess():
            asked.reading.remarks.append(guess)
    return found.rows(file, asked)


def _refuse(file: ListFile, what: str, command: str) -> typing.NoReturn:
    remedy = f"convert it: {command.format(file=file.path.name)}"
    raise TliError(file.name, "the file must be in a format of docs/formats.md", what, remedy)


def _refuse_hub_names(path: str) -> None:
    """Raise ``TliError`` for what looks like a data set of the Hugging Face hub: it is read where it lies on the disk."""
    parts = path.split("/")
    if len(parts) == 2 and all(parts) and not any(part.startswith(".") for part in parts) and not pathlib.Path(parts[0]).exists():
        remedy = f"if it is a data set of the hub: hf download --repo-type dataset {path} --local-dir {parts[1]}, then name that folder"
        raise TliError(path, "the path must be that of a readable file", "no such file or directory", remedy)
