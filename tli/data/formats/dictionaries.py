"""Dictionaries of an index and a file of entries: dictd's and StarDict's. Both files are read whole."""

import os
import pathlib
import re
import struct
from collections.abc import Iterator

from tli.data.formats.markup import CLASSES
from tli.data.formats.source import Asked, BadRow, ListFile, Row
from tli.data.glosses import glosses_of_lines, html_lines
from tli.data.pair_store import alphanumeric
from tli.runtime.errors import TliError

_DIGITS = {digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
_STARDICT = "StarDict's dict ifo file"
# the fields of an entry that hold text, by StarDict's letters; of h and x it is marked up
_TEXT, _MARKED_UP = "mlghxw", "ghxw"


def beside(path: pathlib.Path) -> pathlib.Path:
    """The file to begin with, where one of its companions was named: the .index or the .ifo beside a .dict, .dict.dz or .idx."""
    stem = path.name
    for suffix in (".dict.dz", ".dict", ".idx.gz", ".idx"):
        if stem.lower().endswith(suffix):
            others = [path.with_name(stem[: -len(suffix)] + other) for other in (".index", ".ifo")]
            return next((other for other in others if os.path.exists(other)), path)
    return path


def is_dictd(file: ListFile) -> bool:
    """Whether the file is the index of a dictd dictionary."""
    return file.suffix == ".index"


def dictd(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    """One row per headword that has a gloss; inflected forms that only refer to another entry have none and are skipped.

    In FreeDict's layout what is indented is a note; in a dictionary where all of every entry's text is indented, it is the text.
    """
    data = _entries(file, "dictionary")
    entries = list(_dictd_entries(file, data))
    is_indented = not any(line.strip() and not line[0].isspace() for _, _, entry in entries for line in entry.strip("\n").split("\n")[1:])
    for line, headword, entry in entries:
        word, word_class, glosses = _dictd_entry(headword, entry, is_indented)
        if glosses:
            yield line, {"source": word, "target": glosses, "class": word_class}
        else:
            asked.reading.drop("entries without a gloss of their own", line, repr(headword))


def _dictd_entries(file: ListFile, data: bytes) -> Iterator[tuple[int, str, str]]:
    """(line of the index, headword, text) of each entry."""
    for line, record in enumerate(file.lines(newline="\n"), start=1):
        if not record.strip() or record.startswith(("00database", "00-database")):
            continue
        where, (headword, *numbers) = f"{file.name}:{line}", record.rstrip("\r\n").split("\t")
        if len(numbers) < 2 or not all(number and _DIGITS.keys() >= set(number) for number in numbers[:2]):
            must = "an index line must be a headword, an offset and a length in base 64, a tab between them"
            raise TliError(where, must, repr(record[:80]), "install or build the dictionary again")
        start, length = (sum(_DIGITS[digit] << 6 * place for place, digit in enumerate(reversed(number))) for number in numbers[:2])
        if start + length > len(data):
            got = f"bytes {start} to {start + length} of {len(data)}"
            raise TliError(where, "the entry must lie within the dictionary", got, "use the .index and the .dict of one edition")
        # the fourth column, where there is one, has the headword as it is spelt
        entry = _decoded(where, data[start : start + length], file.encoding)
        yield line, numbers[2] if len(numbers) > 2 and numbers[2] else headword, entry


def _decoded(where: str, entry: bytes, encoding: str = "utf-8") -> str:
    try:
        return entry.decode(encoding)
    except UnicodeDecodeError as error:
        must, got = f"the entry must be {encoding.upper()}", f"byte 0x{error.object[error.start]:02x}"
        raise TliError(where, must, got, "convert the dictionary") from error


def _entries(file: ListFile, kind: str) -> bytes:
    """The bytes of the .dict or .dict.dz beside an index."""
    plain, packed = file.path.with_suffix(".dict"), file.path.with_suffix(".dict.dz")
    path, remedy = (plain, "make it readable") if os.path.exists(plain) else (packed, f"put it, or {plain.name}, beside {file.path.name}")
    try:
        path.open("rb").close()
    except OSError as error:
        must, got = "the path must be that of a readable file", (error.strerror or str(error)).lower()
        raise TliError(path, must, got, remedy) from error
    entries = ListFile(path)
    if path == packed and not entries.packed:
        must = f"the {kind} must be a whole gzip file"
        raise TliError(packed, must, f"the bytes {entries.head[:4].hex(' ')}", "install or download it again")
    with entries.damage(), entries.bytes() as stream:
        return stream.read()


def _dictd_entry(headword: str, entry: str, is_indented: bool) -> tuple[str, str, list[str]]:
    """Parse an entry in FreeDict's layout: its word, class and glosses.

    The first line is ``word /pronunciation/ <class>``, or several spellings before the first slash; the lines below hold
    glosses, or a number alone; what is indented is a note. The index has the words in lower case and without apostrophes.
    """
    head, *body = entry.strip("\n").split("\n")
    spellings = re.split(r"\s+[/<\[(]", head)[0].split(", ")
    word = next((spelling for spelling in spellings if alphanumeric(spelling) == alphanumeric(headword)), headword)
    word_class = "".join(re.findall(r"<([^,>]+)", head)[:1])
    glosses = glosses_of_lines([line for line in body if is_indented or not line[:1].isspace()])
    return word, CLASSES.get(word_class, word_class), glosses


def is_stardict(file: ListFile) -> bool:
    """Whether the file is the .ifo of a StarDict dictionary."""
    return file.head_text.startswith(_STARDICT)


def stardict(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    """One row per word of the index; its line is the word's number there. Entries are split into glosses, marked up or not."""
    facts = dict(line.rstrip("\r\n").partition("=")[::2] for line in file.lines())
    kinds, width = facts.get("sametypesequence", ""), 8 if facts.get("idxoffsetbits") == "64" else 4
    data, index = _entries(file, "dictionary"), _index(file)
    number, start = 0, 0
    while start < len(index):
        number, end = number + 1, index.find(b"\0", start)
        where, after = f"{file.path.with_suffix('.idx')}:{number}", end + 1 + width + 4
        if end < 0 or after > len(index):
            raise TliError(where, "the index must be whole", f"{len(index) - start} bytes at its end", "download it again")
        offset, length = struct.unpack(f">{'Q' if width == 8 else 'I'}I", index[end + 1 : after])
        if offset + length > len(data):
            got = f"bytes {offset} to {offset + length} of {len(data)}"
            raise TliError(where, "the entry must lie within the dictionary", got, "use the .idx and the .dict of one edition")
        word = _decoded(where, index[start:end])
        lines = [line for line in _stardict_lines(where, data[offset : offset + length], kinds) if line != word]
        word_class, glosses = _class_of(lines), glosses_of_lines(lines)
        if glosses:
            yield number, {"source": word, "target": glosses, "class": word_class}
        else:
            asked.reading.drop("entries without a gloss", number, repr(word))
        start = after


def _index(file: ListFile) -> bytes:
    plain = file.path.with_suffix(".idx")
    path = plain if os.path.exists(plain) else file.path.with_suffix(".idx.gz")
    index = ListFile(path)
    with index.damage(), index.bytes() as stream:
        return stream.read()


def _stardict_lines(where: str, entry: bytes, kinds: str) -> list[str]:
    """The lines of an entry's text. Its fields end with a zero byte, the last one of known kinds with the entry."""
    lines, rest, known = [], entry, list(kinds)
    while rest:
        if known:
            kind, is_last = known.pop(0), not known
        elif kinds:
            break
        else:
            kind, rest, is_last = chr(rest[0]), rest[1:], False
        if kind.isupper():
            size = len(rest) if is_last else 4 + int.from_bytes(rest[:4], "big")
            rest = rest[size:]
            continue
        field, _, rest = (rest, b"", b"") if is_last else rest.partition(b"\0")
        if kind in _TEXT:
            text = _decoded(where, field.rstrip(b"\0"))
            # xdxf repeats the word as <k>
            lines += html_lines(re.sub(r"<k>.*?</k>", "", text, flags=re.DOTALL)) if kind in _MARKED_UP else text.split("\n")
    return [line.strip() for line in lines]


def _class_of(lines: list[str]) -> str:
    """Take the abbreviation of a word class from the first line: ``n. port, harbour``."""
    found = re.match(r"<?([a-z]{1,6})[.>]\s*", lines[0]) if lines else None
    if not found or found[1] not in CLASSES:
        return ""
    lines[0] = lines[0][found.end() :]
    return CLASSES[found[1]]
