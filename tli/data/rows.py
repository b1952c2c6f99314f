"""The rows of a word list, of whatever format, cleaned: one ``Pair`` after another; bad rows told together, changes counted."""

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

from tli.data import formats
from tli.data.formats.source import STANDARD_INPUT, Asked, BadRow, Row
from tli.data.glosses import has_glosses_or_markup, split_glosses, without_final_separator
from tli.data.pair_store import Pair, normalise_word
from tli.data.reading import Reading
from tli.runtime.errors import TliError

# characters that mark no letter: soft hyphen, zero-width space, word joiner, byte order mark, and marks of writing direction;
# zero-width joiners are not among them: in Persian and in Indic scripts they spell
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_LOAN = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False, "": None}
_LISTED_ROWS = 10
# so many rows show whether a column ``family`` names families of words, or one of languages
_FAMILY_ROWS, _LARGEST_FAMILY = 200, 0.5
T = TypeVar("T")
_SKIP = "leave it out with --skip-bad-rows"


class OtherMeaning(Exception):
    """A column that is called like one of ours and holds something else; the list is to be read again without it."""

    def __init__(self, column: str, got: str):
        super().__init__(column)
        self.column, self.got = column, got


def with_rows(
    take: Callable[[Iterator[tuple[int, Pair]], Reading], T],
    path: str | os.PathLike,
    source: str,
    target: str,
    *,
    skip_bad_rows: bool = False,
    split_glosses: bool = False,
) -> T:
    """What ``take`` makes of the rows of a word list: line and cleaned pair of each, in the order of the file, and the ``Reading``.

    Rows with the same source word are not merged. ``take`` is called anew where an optional column turns out to hold something else.
    Arguments and columns as for ``word_pairs.read_pairs``.

    Raises:
        TliError: with the file and the line of what is wrong.
    """
    if normalise_word(source) == normalise_word(target):
        raise TliError("--target", "source and target must be two columns", repr(target), "name another with --source or --target")
    ignored: dict[str, str] = {}
    while True:
        reading = Reading("standard input" if os.fspath(path) == STANDARD_INPUT else str(path))
        reading.remarks += [f"the column {name} was ignored: it holds something else, such as {got}" for name, got in ignored.items()]
        try:
            return take(_rows(path, Asked(source, target, reading), skip_bad_rows, split_glosses, ignored), reading)
        except OtherMeaning as other:
            ignored[other.column] = other.got


def _rows(path: str | os.PathLike, asked: Asked, skip_bad_rows: bool, split: bool, ignored: Iterable[str]) -> Iterator[tuple[int, Pair]]:
    source, target, reading = asked.source, asked.target, asked.reading
    cells, families = _Cells(reading, split), Counter[str]()
    bad: list[tuple[int, BadRow]] = []
    for line, row in formats.rows(path, asked):
        reading.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            for column in ignored:
                row.pop(column, None)
            for pair in cells.pairs(line, row, source, target):
                yield line, pair
        except BadRow as error:
            bad.append((line, error))
            # only the first are told, so only they are kept
            reading.drop("bad rows", line, error)
            del bad[_LISTED_ROWS:]
        else:
            if pair.family and families.total() < _FAMILY_ROWS:
                families[pair.family] += 1
                name, count = families.most_common(1)[0]
                if families.total() == _FAMILY_ROWS and count > _LARGEST_FAMILY * _FAMILY_ROWS:
                    raise OtherMeaning("family", f"{name!r} in {count} of {_FAMILY_ROWS} rows")
    where = reading.name
    if bad and not skip_bad_rows:
        _refuse(where, bad, reading.dropped["bad rows"].count, reading.rows)
    if not reading.rows or bad and reading.rows == reading.dropped["bad rows"].count:
        got = f"none; {reading.notes()[-1]}" if reading.dropped else "none"
        what = f" in what seems to be a {reading.format}" if reading.format and not reading.format.startswith(("table", "JSON")) else ""
        raise TliError(f"{where}:1", f"the list must hold at least one pair{what}", got, "add pairs or name another file")


def _refuse(where: str, bad: list[tuple[int, BadRow]], count: int, rows: int) -> NoReturn:
    line, first = bad[0]
    if count == rows > 1:
        # not the rows are wrong, but what was asked of them
        raise TliError(f"{where}:{line}", first.must, f"{first.got}, and the like in all {rows:,} rows", first.remedy)
    if count == 1:
        raise TliError(f"{where}:{line}", first.must, first.got, f"{first.remedy}, or {_SKIP}")
    listed = " | ".join(f"line {line}: {row}" for line, row in bad) + (" | ..." if count > len(bad) else "")
    remedy = "mend them, or leave them out with --skip-bad-rows"
    raise TliError(f"{where}:{line}", "every row must hold a pair of words", f"{count:,} that do not ({listed})", remedy)


class _Cells:
    """Cells to words and pairs; what is changed on the way is counted in ``reading``."""

    def __init__(self, reading: Reading, split: bool):
        self.reading, self.split = reading, split

    def pairs(self, line: int, row: Row, source: str, target: str) -> list[Pair]:
        """The pair of each source word of a row: one, but for a cell of several."""
        synonyms = [] if row.get("synonyms") is None else row["synonyms"]
        if isinstance(synonyms, str):
            synonyms = [part for part in synonyms.split(";") if part.strip()]
        if not isinstance(synonyms, list):
            raise BadRow("synonyms must be a list or a string with semicolons", json.dumps(synonyms, default=str), "write them so")
        glosses = [*self.words(line, target, row["target"]), *self.words(line, "synonyms", synonyms)]
        told = {name: self.label(line, name, row.get(name)) for name in ("class", "field", "family")}
        loan = self.loan(line, row.get("loan"))
        words = self.words(line, source, row["source"])
        further = dedupe_synonyms(glosses) if len(glosses) > 1 else ()
        return [Pair(word, glosses[0], further, told["class"], loan, told["field"], told["family"]) for word in words]

    def words(self, line: int, name: str, value: Any) -> list[str]:
        """The words of a cell; blank ones in a list of several are passed over."""
        if isinstance(value, str):
            return self.word(line, name, value)
        values = value if isinstance(value, list) else [value]
        filled = [one for one in values if not (one is None or isinstance(one, str) and not one.strip())]
        if not filled and name != "synonyms":
            raise BadRow(f"{name} must hold a word", "an empty one" if values != [None] else "null", "fill it in or remove the row")
        return [word for one in filled for word in self.word(line, name, one)]

    def word(self, line: int, name: str, value: Any) -> list[str]:
        """The words that a string holds: one, but for a cell that is split."""
        if not isinstance(value, str):
            raise BadRow(f"{name} must be a string", json.dumps(value, default=str)[:80], "put the word in quotes")
        if self.split:
            parts = split_glosses(value)
            if parts != [value.strip()]:
                self.reading.change("cells split into glosses, or freed of notes and markup", line, repr(value))
            return [self.clean(line, name, part) for part in parts]
        if value.count("\n") > 0:
            # a quotation mark that was never closed makes one word of many rows
            raise BadRow(
                f"{name} must stand on one line", repr(value[:60]), "close the quotation mark before it, or split with --split-glosses"
            )
        return [self.clean(line, name, value)]

    def clean(self, line: int, name: str, value: str) -> str:
        """A word in Unicode NFC, without invisible characters, a separator at its end and needless spaces."""
        word = _clean(value)
        if not word:
            raise BadRow(f"{name} must hold a word", "an empty one", "fill it in or remove the row")
        if _UNPRINTABLE.search(word):
            raise BadRow(f"{name} must be printable", ascii(word), "remove the control characters")
        if not value.isascii() and (found := _INVISIBLE.search(value)):
            self.reading.change(
                "words that lost invisible characters (marks of direction, soft hyphens)", line, f"{word!r} (U+{ord(found[0]):04X})"
            )
        if (shorter := without_final_separator(word)) != word:
            self.reading.change("words that lost a separator at their end", line, repr(word))
            word = shorter
        if not self.split and has_glosses_or_markup(word):
            what = "cells of several glosses, notes or markup, taken as they are (--split-glosses makes synonyms of them)"
            self.reading.change(what, line, repr(word))
        return word

    def label(self, line: int, name: str, value: Any) -> str:
        if value is None or isinstance(value, str):
            label = _clean(value or "")
            if not _UNPRINTABLE.search(label):
                return label
        raise OtherMeaning(name, f"{json.dumps(value, default=str)[:40]} (line {line})")

    def loan(self, line: int, value: Any) -> bool | None:
        loan = "" if value is None else str(value).strip().casefold()
        if loan not in _LOAN:
            raise OtherMeaning("loan", f"{value!r:.40} (line {line})")
        return _LOAN[loan]


def _clean(value: str) -> str:
    if value.isascii():
        return " ".join(value.split())
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", value)).split())


def dedupe_synonyms(glosses: Iterable[str]) -> tuple[str, ...]:
    """The glosses after the first, without duplicates of it or of each other; of spellings of one word only the first is kept."""
    distinct: dict[str, str] = {}
    for gloss in glosses:
        distinct.setdefault(normalise_word(gloss), gloss)
    return tuple(distinct.values())[1:]
