"""Lists in rows and columns: TSV, CSV, MUSE's ``word word``, Anki's notes, spreadsheets, and CLDF's forms.

A tab ends a cell and a line break a row, whatever quotation marks stand there; only a cell that is wholly in quotes, as spreadsheets write
it, loses them. With commas, semicolons or bars the rows are CSV's: a quoted cell may hold its separator and line breaks.
"""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from tli.data.formats.languages import TwoLanguages, is_column_name
from tli.data.formats.source import Asked, BadRow, ListFile, Row
from tli.data.glosses import html_lines
from tli.data.pair_store import normalise_word
from tli.runtime.errors import TliError

OPTIONAL = ("synonyms", "class", "loan", "field", "family")
_SEPARATORS = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a bar", " ": "a space"}
# between the words of lists that people type as text
_TYPED = {" - ": "a hyphen", " \u2013 ": "a dash", " = ": "an equals sign", ": ": "a colon"}
_HEAD_ROWS, _HEAD_LETTERS = 200, 4096
_CLDF = {"language_id", "parameter_id", "form"}
_ANKI_SEPARATORS = {"tab": "\t", "comma": ",", "semicolon": ";", "space": " ", "pipe": "|", "colon": ":"}

Cells = tuple[int, list[str]]


def table(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows of TSV, CSV and ``word word``, whichever the head of the file looks like."""
    separator = _separator(file)
    separated_by = (_SEPARATORS | _TYPED)[separator]
    asked.reading.format = f"table with {separated_by} between the cells"
    if separator not in {".tsv": "\t", ".tab": "\t", ".csv": ",;|"}.get(file.suffix, separator):
        asked.reading.remarks.append(f"read with {separated_by} between the cells, though it is called {file.suffix}")
    return _named(file.name, _cells(file, separator), asked, separated_by)


def is_anki(file: ListFile) -> bool:
    """Whether the file is what Anki exports as notes in plain text: its first lines are ``#key:value``."""
    return file.head_text.startswith(("#separator:", "#html:"))


def anki(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    """The first two fields of each note, or those that ``#columns`` names; HTML as it is seen, a line break between glosses."""
    told: dict[str, str] = {}
    for record in file.lines():
        key, colon, value = record.rstrip("\r\n").partition(":")
        if not (record.startswith("#") and colon):
            break
        told[key[1:].strip().lower()] = value
    named = told.get("separator", "tab").strip().lower()
    separator = _ANKI_SEPARATORS.get(named, named[:1])
    if not separator.strip('"') or not separator.isprintable() and separator != "\t":
        raise TliError(f"{file.name}:1", "the notes must name their separator", repr(told["separator"]), "export them from Anki again")
    special = {int(value) for key, value in told.items() if key.endswith(" column") and value.strip().isdecimal()}
    rows: Iterator[Cells] = ((line, fields) for line, fields in _csv_cells(file, separator) if line > len(told))
    if "columns" in told:
        rows = itertools.chain([(len(told), told["columns"].split(separator))], rows)
    else:
        rows = ((line, [field for i, field in enumerate(fields, 1) if i not in special][:2]) for line, fields in rows)
    is_html = told.get("html", "false").strip().lower() == "true"
    if is_html:
        rows = ((line, ["\n".join(html_lines(field)) for field in fields]) for line, fields in rows)
    asked.reading.format = f"Anki notes{' with HTML' if is_html else ''}"
    for line, row in _named(file.name, rows, asked, "the separator"):
        if isinstance(row, dict):
            row = {side: row[side].split("\n") for side in ("source", "target")}
        yield line, row


def spreadsheet(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows of a workbook's first sheet that holds any: .xlsx, .xls, .ods."""
    try:
        from python_calamine import CalamineError, CalamineWorkbook
    except ImportError as error:
        remedy = "pip install 'tli[excel]', or save the sheet as CSV UTF-8"
        raise TliError(file.name, "a spreadsheet needs python-calamine", "none installed", remedy) from error
    try:
        workbook = CalamineWorkbook.from_path(str(file.path))
        sheets = {name: workbook.get_sheet_by_name(name).to_python(skip_empty_area=False) for name in workbook.sheet_names}
    except CalamineError as error:
        raise TliError(file.name, "the spreadsheet must be whole", str(error), "open it and save it again, or as CSV UTF-8") from error
    filled = {name: rows for name, rows in sheets.items() if rows}
    name, rows = next(iter(filled.items()), ("", []))
    asked.reading.format = "spreadsheet"
    if len(filled) > 1:
        asked.reading.remarks.append(f"took the sheet {name!r}, the first of {len(filled)}")
    return _named(file.name, ((line, list(map(_shown, cells))) for line, cells in enumerate(rows, 1)), asked, "cells")


def _shown(cell: object) -> str:
    """A spreadsheet's cell as text; whole numbers as people see them."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _separator(file: ListFile) -> str:
    """What stands between the cells: the suffix's own separator where the first row has it, else that which divides the rows alike."""
    lines = [line[:_HEAD_LETTERS] for line in file.first_lines(_HEAD_ROWS)]
    head = [line for line in lines if not line.startswith("#")] or lines
    first = head[0] if head else ""
    if re.fullmatch(r"sep=.", first):
        return first[-1] if first[-1] in _SEPARATORS else ","
    if "\t" in first or file.suffix in (".tsv", ".tab") and any("\t" in line for line in head):
        return "\t"
    if file.suffix == ".csv" and first.count(",") >= 1 > first.count(";"):
        return ","
    counts = {separator: [len(row) for row in csv.reader(head, delimiter=separator) if row] for separator in ",;|"}
    alike = {separator: sum(n == found[0] for n in found) / len(found) for separator, found in counts.items() if found and found[0] > 1}
    best = max(alike, key=lambda separator: (alike[separator], counts[separator][0]), default="")
    if best and alike[best] > 0.8:
        return best
    typed = [separator for separator in _TYPED if head and all(line.count(separator) == 1 for line in head)]
    if typed:
        return typed[0]
    if head and all(len(line.split()) == 2 for line in head):
        return " "
    return best or ("," if file.suffix == ".csv" else "\t")


def _cells(file: ListFile, separator: str) -> Iterator[Cells]:
    """The line and the cells of every row."""
    if separator == "\t":
        for line, record in enumerate(file.lines(), 1):
            cells = record.rstrip("\n").split("\t")
            if '"' in record:
                cells = list(map(_unquoted, cells))
            yield line, cells
    elif separator == " ":
        yield from ((line, record.split()) for line, record in enumerate(file.lines(), 1))
    elif separator in _TYPED:
        yield from ((line, record.strip().split(separator)) for line, record in enumerate(file.lines(), 1))
    elif separator == "|":
        # the rule below the names of a table in Markdown is no row
        yield from ((line, cells) for line, cells in _csv_cells(file, separator) if "".join(cells).strip("-:+ ") or not any(cells))
    else:
        yield from _csv_cells(file, separator)


def _unquoted(cell: str) -> str:
    """A cell that is wholly in quotes, those inside doubled, without them; any other as it is."""
    inner = cell.strip()[1:-1]
    is_quoted = len(cell.strip()) > 1 and cell.strip()[0] == cell.strip()[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else cell


def _csv_cells(file: ListFile, separator: str) -> Iterator[Cells]:
    reader, line = csv.reader(file.lines(newline=""), delimiter=separator, strict=True), 1
    try:
        for cells in reader:
            yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise TliError(f"{file.name}:{line}", "the row must be well-formed", str(error), "close or double its quotation marks") from error


def _named(name: str, rows: Iterable[Cells], asked: Asked, separated_by: str) -> Iterator[tuple[int, Row | BadRow]]:
    """Rows by the names of their columns, which the first row has, unless it is a pair itself."""
    # Excel's own first line, sep=; says nothing more by now
    filled = ((line, cells) for line, cells in rows if any(map(str.strip, cells)) and cells != ["sep=", ""])
    head = list(itertools.islice(filled, _HEAD_ROWS))
    if not head:
        return
    first_row = next((i for i, (_, cells) in enumerate(head) if not _is_comment(cells, asked)), 0)
    if first_row:
        asked.reading.remarks.append(f"rows of comment at the top, passed over: {first_row}, such as {' '.join(head[0][1]):.60}")
        del head[:first_row]
    first = [normalise_word(cell.strip("\ufeff# \t")) for cell in head[0][1]]
    rest = itertools.chain(head, filled)
    if set(first) >= _CLDF:
        asked.reading.format = "CLDF forms"
        yield from _cldf(name, first, itertools.islice(rest, 1, None), asked)
        return
    places, is_header = _places(f"{name}:{head[0][0]}", first, head, asked, separated_by)
    width = len(first)
    if is_header:
        asked.reading.columns = tuple(head[0][1][place].strip() for place in places.values())
        next(rest)
    else:
        asked.reading.columns = tuple(str(place + 1) for place in places.values())
        named = {side: side if wanted.isdecimal() else wanted for side, wanted in (("source", asked.source), ("target", asked.target))}
        columns = (f"column {places[side] + 1} is {wanted}" for side, wanted in named.items())
        pair = " = ".join(head[0][1][places[side]].strip() for side in ("source", "target"))
        asked.reading.remarks.append(f"no row of column names: {', '.join(columns)}; the first pair is {pair}")
    needed = 1 + max(places["source"], places["target"])
    wanted = list(places.items())
    for line, cells in rest:
        if needed <= len(cells) <= width or len(cells) > width and not any(map(str.strip, cells[width:])):
            yield line, {column: cells[place] for column, place in wanted if place < len(cells)}
        else:
            must = f"the row must have the header's {width} columns, {separated_by} between them"
            yield line, BadRow(must, f"{len(cells)}: {', '.join(map(repr, cells))}", "mend the row")


def _is_comment(cells: list[str], asked: Asked) -> bool:
    """Whether a row at the top of a table is a comment: ``# made by hand``, but not ``#swahili``, a column's name."""
    return cells[0].startswith("#") and normalise_word(cells[0].strip("# ")) not in map(normalise_word, (asked.source, asked.target))


def _places(where: str, first: list[str], head: Sequence[Cells], asked: Asked, separated_by: str) -> tuple[dict[str, int], bool]:
    """Where the columns are, and whether the first row names them or is a pair itself.

    Raises:
        TliError: it names others than those asked for.
    """
    names = {"source": normalise_word(asked.source), "target": normalise_word(asked.target)}
    found = {side: first.index(name) for side, name in names.items() if first.count(name) == 1}
    if len(found) == 2:
        # --source kitabu --target book: words of the first pair where they come again, not the names of columns
        again = any(
            normalise_word("".join(cells[at : at + 1]).strip()) == names[side] for _, cells in head[1:] for side, at in found.items()
        )
        if again and not any(map(is_column_name, names.values())):
            return found, False
        return found | {name: first.index(name) for name in OPTIONAL if name in first and name not in names.values()}, True
    if not any(name in first for name in names.values()):
        if all(name.isdecimal() and 1 <= int(name) <= len(first) for name in names.values()):
            return {side: int(name) - 1 for side, name in names.items()}, False
        if len(first) == 2 and not all(map(is_column_name, first)):
            return {"source": 0, "target": 1}, False
    must = f"the header must have the columns {asked.source} and {asked.target} once each, {separated_by} between them"
    got = f"the columns {', '.join(map(repr, head[0][1]))}"
    remedy = "put a tab between the words of each row, and a header above them"
    if len(first) > 1:
        remedy = "name yours with --source and --target"
        remedy += ", or give the numbers of two columns if the first row is no header, as --source 1 --target 2"
    raise TliError(where, must, got, remedy)


def _cldf(name: str, header: list[str], rows: Iterable[Cells], asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    """Forms of two languages, joined where they name one concept."""
    at = {column: header.index(column) for column in (*_CLDF, *({"loan"} & set(header)))}
    languages = TwoLanguages(asked)
    forms: dict[str, list[tuple[int, str, Row]]] = {"source": [], "target": [], "": []}
    for line, cells in rows:
        if len(cells) != len(header):
            yield line, BadRow(f"the row must have the header's {len(header)} columns", len(cells), "mend the row")
            continue
        row = {column: cells[place].strip() for column, place in at.items()}
        if side := languages.side(row["language_id"]):
            forms[side].append((line, row["parameter_id"], row))
    columns = {normalise_word(asked.source), normalise_word(asked.target)}
    if columns & set(header):
        must = f"of CLDF forms two languages must be named, not the columns {asked.source} and {asked.target}"
        there = sorted(languages.found)
        example = " ".join(f"--{side} {tag}" for side, tag in zip(("source", "target"), there, strict=False))
        raise TliError(f"{name}:1", must, f"forms of the languages {', '.join(there[:20])}", f"name two of these, as in {example}")
    languages.require(name)
    targets: dict[str, list[str]] = {}
    for _, concept, row in forms["target"]:
        targets.setdefault(concept, []).append(row["form"])
    for line, concept, row in forms["source"]:
        if concept in targets:
            yield line, {"source": row["form"], "target": targets[concept], "loan": row.get("loan", "")}
        else:
            asked.reading.drop(f"forms without one of the same concept in {asked.target}", line, repr(row["form"]))
