"""A word list's bytes and text, wherever they lie: compressed, zipped, on standard input, in any encoding; and what is asked of it."""

import bz2
import contextlib
import dataclasses
import functools
import gzip
import io
import itertools
import lzma
import os
import pathlib
import re
import shutil
import sys
import tempfile
import typing
import zipfile
import zlib
from collections.abc import Iterator

from tli.data.reading import Reading
from tli.runtime.errors import TliError

# what a reader gives of a row: source and target, each a string or a list of them, and the optional columns
Row = dict[str, typing.Any]
STANDARD_INPUT = "-"
HEAD_BYTES = 1 << 16
# no honest list shrinks so far; a small file must not fill the memory
_MOST_RATIO, _ALWAYS_ALLOWED = 200, 64 << 20
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_PACKED: dict[bytes, tuple[str, typing.Any]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\x00": ("xz", lzma.open),
}
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# what lists that are not UTF-8 are in, the most widespread first
_ENCODINGS = ("cp1252", "cp1251", "cp1250", "cp1256", "cp932", "gb18030", "big5", "cp949", "cp1254", "cp1253", "cp1255", "koi8_r", "cp1257",
              "cp1258", "cp874", "euc_jp", "mac_roman", "cp850")  # fmt: skip
_ALIKE = 0.02
# no text has many of these
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))
# what the decompressors raise for damaged bytes; of a zip also for one that is locked (RuntimeError) or packed in an unknown way
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, NotImplementedError)


class BadRow(Exception):
    """A row that holds no pair; it is listed with the others of its kind, or left out with ``--skip-bad-rows``."""

    def __init__(self, must: str, got: object, remedy: str):
        super().__init__(f"{must}, got {got}")
        self.must, self.got, self.remedy = must, got, remedy


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a reader is asked for: the names of the two columns, keys or languages, and where it notes what it understood."""

    source: str
    target: str
    reading: Reading


class ListFile:
    """A word list's bytes and text.

    name    what it is called in errors
    path    the file on disk
    suffix  of the list itself, without that of its compression, in lower case: a hint
    head    its first bytes, decompressed
    """

    def __init__(self, path: str | os.PathLike):
        self.name = "standard input" if os.fspath(path) == STANDARD_INPUT else str(path)
        self.path = local_file(path)
        self.packed = ""
        with _damage(self.path, self.name, ""), open(self.path, "rb") as file:
            magic = file.read(8)
        for mark, (kind, _) in _PACKED.items():
            if magic.startswith(mark):
                self.packed = kind
        shown = pathlib.PurePath(self.name)
        if magic.startswith(_ZIP) and (member := self._member()) is not None:
            self.packed, shown = "zip", pathlib.PurePath(member)
        elif self.packed and shown.suffix.lower() in (".gz", ".bz2", ".xz", ".dz"):
            shown = shown.with_suffix("")
        self.suffix = shown.suffix.lower()
        with self.bytes() as file, self.damage():
            self.head = file.read(HEAD_BYTES)

    def damage(self):
        """Turn what a damaged or refused file raises below this block into a ``TliError``."""
        return _damage(self.path, self.name, self.packed)

    def bytes(self) -> typing.BinaryIO:
        """The decompressed bytes, as a stream."""
        with self.damage():
            if self.packed == "zip":
                archive = zipfile.ZipFile(self.path)
                stream = archive.open(typing.cast(str, self._member()))
            elif self.packed:
                stream = next(opened for kind, opened in _PACKED.values() if kind == self.packed)(self.path, "rb")
            else:
                return open(self.path, "rb")
            return typing.cast(typing.BinaryIO, io.BufferedReader(_Bounded(stream, self.name, os.path.getsize(self.path))))

    def lines(self, newline: str | None = None) -> Iterator[str]:
        """The lines of the text with their ends; ``newline`` as for ``open``."""
        encoding = self.encoding
        with self.damage(), self.bytes() as file, io.TextIOWrapper(file, encoding, newline=newline) as text:
            try:
                yield from text
            except UnicodeError as error:
                raise TliError(self.name, f"the text must be {encoding}", str(error), "convert it to UTF-8 with iconv") from error

    def first_lines(self, count: int) -> list[str]:
        """The first lines that are not blank, without their ends."""
        return [line.rstrip("\r\n") for line in itertools.islice(filter(str.strip, self.lines()), count)]

    @functools.cached_property
    def head_text(self) -> str:
        """The text that the list begins with, without a byte order mark and blanks."""
        return self.head.decode(self.encoding, "replace").lstrip("\ufeff \t\r\n")

    @functools.cached_property
    def encoding(self) -> str:
        """The encoding of the text: what a mark or XML says, else UTF-8, else the best guess, which ``guess`` says."""
        marks = [name for mark, name in _BYTE_ORDER_MARKS.items() if self.head.startswith(mark)]
        if marks and marks[0] != "utf-8-sig":
            return marks[0]
        declared = re.match(rb"\s*<\?xml[^>]*\bencoding\s*=\s*[\"']([A-Za-z0-9._-]+)", self.head)
        if declared and declared[1].lower() not in (b"utf-8", b"utf8"):
            with contextlib.suppress(LookupError, ValueError):
                "".encode(name := declared[1].decode("ascii"))
                return name
        zeros = [self.head[start::2].count(0) / max(1, len(self.head[start::2])) for start in (0, 1)]
        if not marks and max(zeros) > 0.3 and min(zeros) < 0.05:
            return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
        controls = len(self.head) - len(self.head.translate(None, _CONTROLS))
        if controls > 1 and controls > len(self.head) / 50:
            must = "the file must be text, or of a binary format of docs/formats.md"
            raise TliError(self.name, must, "bytes that are no text", "export it as TSV")
        with self.damage(), self.bytes() as file:
            wrong = _first_line_that_is_not_utf8(file)
        if wrong is None:
            return marks[0] if marks else "utf-8"
        return self._guess(wrong, bool(marks))

    def _guess(self, wrong: tuple[int, int], is_marked: bool) -> str:
        """Guess the encoding of a text that is not UTF-8 from its line ``wrong[0]`` on; ``TliError`` where it is UTF-8 but for a few."""
        is_utf8, others, sample = 0, 0, bytearray()
        with self.damage(), self.bytes() as file:
            for record in itertools.islice(file, 1_000_000):
                if not record.isascii():
                    well_formed = _decodes(record)
                    is_utf8, others = is_utf8 + well_formed, others + (not well_formed)
                    if not well_formed and len(sample) < HEAD_BYTES:
                        sample += record
        line, byte = wrong
        if is_marked or is_utf8 >= others:
            remedy = "mend the line: the others are UTF-8; or convert the file with iconv -f WINDOWS-1252 -t UTF-8 if all of it is so"
            raise TliError(f"{self.name}:{line}", "the file must be UTF-8", f"byte 0x{byte:02x}", remedy)
        from charset_normalizer import from_bytes

        found = from_bytes(b" ".join(word for word in re.split(rb"[\s,;]+", sample) if not word.isascii()), cp_isolation=list(_ENCODINGS))
        best = found.best()
        if best is None:
            remedy = "convert it with iconv -f ENCODING -t UTF-8"
            raise TliError(f"{self.name}:{line}", "the file must be text in a known encoding", f"byte 0x{byte:02x}", remedy)
        # few letters look alike in many encodings: of those that are about as likely, the most widespread
        alike = [match for match in found if match.chaos <= best.chaos + _ALIKE and match.coherence >= best.coherence - _ALIKE]
        return min((name for match in alike for name in match.could_be_from_charset), key=_ENCODINGS.index)

    def guess(self) -> str:
        """What a user should know where nothing but its letters says how the text is encoded; else empty."""
        if self.encoding.lower().startswith("utf") or b"<?xml" in self.head[:100]:
            return ""
        example = next((word for line in self.lines() if not line.isascii() for word in line.split() if not word.isascii()), "")
        return (
            f"not UTF-8: read as {self.encoding}, the best guess, with words such as {example}; if letters are wrong, convert it with iconv"
        )

    def _member(self) -> str | None:
        """The one list in a zip archive; None for what only looks like an archive, such as a spreadsheet.

        Raises:
            TliError: there is none, or more than one.
        """
        with _damage(self.path, self.name, "zip"), zipfile.ZipFile(self.path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
        if {"[Content_Types].xml", "content.xml", "collection.anki2"} & set(names):
            return None
        names = [name for name in names if not name.startswith("__MACOSX/") and not pathlib.PurePath(name).name.startswith(".")]
        if len(names) != 1:
            got = f"{len(names)}: {', '.join(names[:10])}" if names else "none"
            raise TliError(self.name, "a zip archive must hold one list", got, f"run unzip {self.path.name} and name one of its files")
        return names[0]


@functools.cache
def _spooled(path: str) -> pathlib.Path:
    """A copy of standard input or of a pipe, which can be read once only, for as long as the process lives."""
    if path == STANDARD_INPUT and sys.stdin.isatty():
        raise TliError("standard input", "a list must come in", "a terminal", "pipe a list into the command, or name a file")
    file = tempfile.NamedTemporaryFile(prefix="tli-list-")  # noqa: SIM115
    if path == STANDARD_INPUT:
        shutil.copyfileobj(sys.stdin.buffer, file)
    else:
        with open(path, "rb") as pipe:
            shutil.copyfileobj(pipe, file)
    file.flush()
    # the copy goes with the last reference to it
    _SPOOLED.append(file)
    return pathlib.Path(file.name)


_SPOOLED: list = []


def local_file(path: str | os.PathLike) -> pathlib.Path:
    """The file that holds a list's bytes and can be read again: for ``-`` and for a pipe, a copy."""
    path = os.fspath(path)
    if path == STANDARD_INPUT or pathlib.Path(path).is_fifo():
        return _spooled(path)
    return pathlib.Path(path)


class _Bounded(io.RawIOBase):
    """A decompressed stream that ends in ``TliError`` where it grows beyond all reason."""

    def __init__(self, stream: typing.Any, name: str, packed_bytes: int):
        self._stream, self._name, self._packed_bytes = stream, name, packed_bytes
        self._left = max(_ALWAYS_ALLOWED, _MOST_RATIO * packed_bytes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        got = self._stream.read(len(buffer))
        buffer[: len(got)] = got
        self._left -= len(got)
        if self._left < 0:
            must = f"a compressed list must hold at most {_MOST_RATIO} times its size"
            raise TliError(self._name, must, f"more of {self._packed_bytes:,} bytes", "decompress it yourself if you trust it")
        return len(got)

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextlib.contextmanager
def _damage(path: pathlib.Path, name: str, packed: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        got = ((error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__).lower()
        if packed and not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise TliError(name, f"the list must be a whole {packed} file", got, "download or pack it again") from error
        raise TliError(
            name, "the path must be that of a readable file", got, "name a word list; docs/formats.md has the formats"
        ) from error


def _decodes(record: bytes) -> bool:
    try:
        record.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _first_line_that_is_not_utf8(file: typing.BinaryIO) -> tuple[int, int] | None:
    """The line and the byte, or None."""
    lines = 0
    while block := file.read(1 << 20):
        # a block ends at the end of a line, so no character is cut in two
        block += file.readline()
        try:
            block.decode("utf-8")
        except UnicodeDecodeError as error:
            return lines + block.count(b"\n", 0, error.start) + 1, block[error.start]
        lines += block.count(b"\n")
    return None
