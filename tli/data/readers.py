"""Lists of word pairs, read row by row and cleaned: TSV, CSV, JSON, JSONL or a dictd dictionary.

A reader of a format is a generator of ``(line, row)`` in ``_READERS``; a row maps normalised column names (``normalise_word``) to values.
The rest is common to all formats: clean the values, make a ``Pair``. TSV, CSV and JSONL are streamed line by line, so they may be of any
length; JSON and dictd dictionaries are read whole.
"""

import csv
import gzip
import json
import os
import pathlib
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator

from tli.data.pair_store import Pair, alphanumeric, normalise_word
from tli.runtime.errors import TliError

# characters that mark no letter: soft hyphen, zero-width space, word joiner, byte order mark
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_LOAN = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False, "": None}


def read_rows(path: pathlib.Path, source: str, target: str) -> Iterator[Pair]:
    """Parse a word list: the cleaned pair of every row, in the order of the file; rows with the same source word are not merged.

    Arguments and columns as for ``word_pairs.read_pairs``.

    Raises:
        TliError: with the file and the line of what is wrong.
    """
    if normalise_word(source) == normalise_word(target):
        raise TliError("--target", "source and target must be two columns", repr(target), "name another with --source or --target")
    suffix = path.suffix.lower()
    if suffix not in _READERS and os.path.exists(path) and not os.path.isdir(path):
        raise TliError(path, f"the format must show in the suffix, one of {' '.join(_READERS)}", repr(suffix), "rename or convert the file")
    line = None
    # a missing file of any suffix is named as missing
    for line, row in _READERS.get(suffix, _table_rows)(path, source, target):
        yield _pair(f"{path}:{line}", row, source, target)
    if line is None:
        raise TliError(f"{path}:1", "the list must hold at least one pair", "none", "add pairs or name another file")


def _lines(path: pathlib.Path, newline: str) -> Iterator[str]:
    """The lines of a text file with their ends; ``newline`` as for ``open``."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except OSError as error:
        raise _unreadable(path, error, "name a word list: .tsv .csv .json .jsonl or dictd .index") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _unreadable(path: pathlib.Path, error: OSError, remedy: str) -> TliError:
    return TliError(path, "the path must be that of a readable file", (error.strerror or str(error)).lower(), remedy)


def _not_utf8(path: pathlib.Path) -> TliError:
    """The error that names the first line that is not UTF-8; the decoder knows only an offset in its buffer."""
    with open(path, "rb") as file:
        for line, record in enumerate(file, start=1):
            try:
                record.decode("utf-8")
            except UnicodeDecodeError as error:
                return TliError(f"{path}:{line}", "the file must be UTF-8", f"byte 0x{record[error.start]:02x}", "save it as UTF-8")
    return TliError(path, "the file must stay as it is while it is read", "a change", "run again")


def _table_rows(path: pathlib.Path, source: str, target: str) -> Iterator[tuple[int, dict]]:
    delimiter, separated_by = (",", "a comma") if path.suffix.lower() == ".csv" else ("\t", "a tab")
    reader, header, line = csv.reader(_lines(path, newline=""), delimiter=delimiter, strict=True), None, 1
    try:
        for fields in reader:
            where = f"{path}:{line}"
            if fields and header is None:
                header = [normalise_word(name.strip()) for name in fields]
                missing = [name for name in (source, target) if header.count(normalise_word(name)) != 1]
                if missing:
                    must = f"the header must have the columns {source} and {target} once each, {separated_by} between them"
                    raise TliError(where, must, f"the columns {', '.join(map(repr, fields))}", "name yours with --source and --target")
            elif fields:
                # the first row with fields is the header
                assert header is not None
                row = dict(zip(header, fields))
                if len(fields) > len(header) or not {normalise_word(source), normalise_word(target)} <= row.keys():
                    must = f"the row must have the header's {len(header)} columns, {separated_by} between them"
                    raise TliError(where, must, f"{len(fields)}: {', '.join(map(repr, fields))}", "mend the row")
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise TliError(f"{path}:{line}", "the row must be well-formed", str(error), "close or double its quotation marks") from error


def _object_row(where: str, row: object, source: str, target: str) -> dict:
    if not isinstance(row, dict):
        raise TliError(where, "every row must be an object", json.dumps(row)[:80], f'write {{"{source}": ..., "{target}": ...}}')
    folded = {normalise_word(name): value for name, value in row.items()}
    if not {normalise_word(source), normalise_word(target)} <= folded.keys():
        got = f"the keys {', '.join(map(repr, row)) or '(none)'}"
        raise TliError(where, f"every row must have the keys {source} and {target}", got, "name yours with --source and --target")
    return folded


def _parsed(path: pathlib.Path, text: str, first_line: int) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        raise TliError(f"{path}:{line}", "the file must be valid JSON", str(error).lower(), "mend it there") from error


def _json_rows(path: pathlib.Path, source: str, target: str) -> Iterator[tuple[int, dict]]:
    text = "".join(_lines(path, newline=""))
    document = _parsed(path, text, 1)
    if not isinstance(document, list):
        kind = "an object" if isinstance(document, dict) else json.dumps(document)[:80]
        raise TliError(f"{path}:1", "the file must be a list of objects", kind, "put the rows in [ ]")
    # json.loads keeps no positions: walk through the text, known to be valid by now, for the line of each row
    decoder, between, line, counted, end = json.JSONDecoder(), re.compile(r"[,\s]*"), 1, 0, text.index("[") + 1
    for _ in document:
        gap = between.match(text, end)
        # it matches nothing, too
        assert gap is not None
        start = gap.end()
        line, counted = line + text.count("\n", counted, start), start
        row, end = decoder.raw_decode(text, start)
        yield line, _object_row(f"{path}:{line}", row, source, target)


def _jsonl_rows(path: pathlib.Path, source: str, target: str) -> Iterator[tuple[int, dict]]:
    # not splitlines: a JSON string may hold U+2028
    for line, record in enumerate(_lines(path, newline="\n"), start=1):
        if record.strip():
            yield line, _object_row(f"{path}:{line}", _parsed(path, record.rstrip("\n"), line), source, target)


_DIGITS = {digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
_CLASSES = {
    "n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb", "num": "numeral", "pron": "pronoun",
    "conj": "conjunction", "prep": "preposition", "interj": "interjection",
}  # fmt: skip


def _dictd_rows(path: pathlib.Path, source: str, target: str) -> Iterator[tuple[int, dict]]:
    """One row per headword that has a gloss; inflected forms that only refer to another entry have none and are skipped."""
    data = _dictd_data(path)
    for line, record in enumerate(_lines(path, newline="\n"), start=1):
        if not record.strip() or record.startswith(("00database", "00-database")):
            continue
        where, (headword, *numbers) = f"{path}:{line}", record.rstrip("\r\n").split("\t")
        if len(numbers) < 2 or not all(number and _DIGITS.keys() >= set(number) for number in numbers[:2]):
            must = "an index line must be a headword, an offset and a length in base 64, a tab between them"
            raise TliError(where, must, repr(record[:80]), "install or build the dictionary again")
        start, length = (sum(_DIGITS[digit] << 6 * place for place, digit in enumerate(reversed(number))) for number in numbers[:2])
        if start + length > len(data):
            got = f"bytes {start} to {start + length} of {len(data)}"
            raise TliError(where, "the entry must lie within the dictionary", got, "use the .index and the .dict of one edition")
        try:
            entry = data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise TliError(where, "the entry must be UTF-8", f"byte 0x{error.object[error.start]:02x}", "convert the dictionary") from error
        word, word_class, glosses = _dictd_entry(headword, entry)
        if glosses:
            yield line, {normalise_word(source): word, normalise_word(target): glosses[0], "synonyms": glosses[1:], "class": word_class}


def _dictd_data(path: pathlib.Path) -> bytes:
    plain, packed = path.with_suffix(".dict"), path.with_suffix(".dict.dz")
    file, remedy = (plain, "make it readable") if os.path.exists(plain) else (packed, f"put it, or {plain.name}, beside {path.name}")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error, remedy) from error
    try:
        return data if file == plain else gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise TliError(packed, "the dictionary must be a whole gzip file", str(error).lower(), "install or download it again") from error


def _dictd_entry(headword: str, entry: str) -> tuple[str, str, list[str]]:
    """Parse an entry in FreeDict's layout: its word, class and glosses.

    The first line is ``word /pronunciation/ <class>``, or several spellings before the first slash; the lines below hold
    glosses, or a number alone; what is indented is a note. The index has the words in lower case and without apostrophes.
    """
    head, *body = entry.strip("\n").split("\n")
    spellings = re.split(r"\s+[/<\[(]", head)[0].split(", ")
    word = next((spelling for spelling in spellings if alphanumeric(spelling) == alphanumeric(headword)), headword)
    word_class = "".join(re.findall(r"<([^,>]+)", head)[:1])
    glosses = re.split("[;,\n]", without_notes("\n".join(line for line in body if not line[:1].isspace())))
    glosses = [gloss.strip() for gloss in glosses if not re.fullmatch(r"\s*(\d+\.)?\s*", gloss)]
    return word, _CLASSES.get(word_class, word_class), [re.sub(r"^\d+\.\s*", "", gloss) for gloss in glosses]


def without_notes(text: str) -> str:
    """Remove parentheses and what is in them; they may be nested."""
    while (shorter := re.sub(r"\([^()]*\)", " ", text)) != text:
        text = shorter
    return text


_READERS = {".tsv": _table_rows, ".csv": _table_rows, ".json": _json_rows, ".jsonl": _jsonl_rows, ".index": _dictd_rows}


def _pair(where: str, row: dict, source: str, target: str) -> Pair:
    synonyms = [] if row.get("synonyms") is None else row["synonyms"]
    if isinstance(synonyms, str):
        synonyms = [part for part in synonyms.split(";") if part.strip()]
    if not isinstance(synonyms, list):
        raise TliError(where, "synonyms must be a list or a string with semicolons", json.dumps(synonyms), "write them so")
    loan = "" if row.get("loan") is None else str(row["loan"]).strip().casefold()
    if loan not in _LOAN:
        raise TliError(where, "loan must be yes or no", repr(row["loan"]), "write one of these or leave it empty")
    word_class, field, family = ("" if row.get(name) is None else _clean(where, name, row[name]) for name in ("class", "field", "family"))
    glosses = [_word(where, target, row[normalise_word(target)]), *(_word(where, "synonyms", gloss) for gloss in synonyms)]
    word = _word(where, source, row[normalise_word(source)])
    return Pair(word, glosses[0], dedupe_synonyms(glosses), word_class, _LOAN[loan], field, family)


def _word(where: str, name: str, value: object) -> str:
    word = _clean(where, name, value)
    if not word:
        raise TliError(where, f"{name} must hold a word", "an empty one", "fill it in or remove the row")
    return word


def _clean(where: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TliError(where, f"{name} must be a string", json.dumps(value), "put the word in quotes")
    word = " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", value)).split())
    if _UNPRINTABLE.search(word):
        raise TliError(where, f"{name} must be printable", ascii(word), "remove the control characters")
    return word


def dedupe_synonyms(glosses: Iterable[str]) -> tuple[str, ...]:
    """The glosses after the first, without duplicates of it or of each other; of spellings that differ in case only the first is kept."""
    distinct: dict[str, str] = {}
    for gloss in glosses:
        distinct.setdefault(normalise_word(gloss), gloss)
    return tuple(distinct.values())[1:]
