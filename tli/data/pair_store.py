"""Disk-backed word pairs: a list of a million in little memory, without a Python object per pair.

The text of the pairs is in an anonymous temporary file, memory-mapped, and is parsed to a ``Pair`` on access. Which pairs share a word is
computed from 64-bit hashes of the words in flat arrays: 32 bytes a pair, and 8 more for each further gloss. Two words are the same word if
``normalise_word`` makes one string of them.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import tempfile
import typing
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tli.runtime.errors import disk_errors

_CHUNK_PAIRS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A source word, its target, and synonyms of the target, which count as correct, too. All are cleaned; case is kept.

    ``word_class``, ``field`` (of meaning) and ``family`` (of words of one stem) are empty and ``loan`` is None where the list says nothing.
    """

    source: str
    target: str
    synonyms: tuple[str, ...] = ()
    word_class: str = ""
    loan: bool | None = None
    field: str = ""
    family: str = ""

    @property
    def accepted(self) -> tuple[str, ...]:
        """The target and its synonyms."""
        return self.target, *self.synonyms


@dataclasses.dataclass(frozen=True, slots=True)
class WordHashes:
    """Hashes of the words of B pairs: equal hashes, equal words.

    sources  uint64 [B]      hash of each source word
    indptr   int64 [B + 1]   CSR offsets of each pair's accepted glosses in ``glosses``, its target first
    glosses  uint64 [E]      hashes of the accepted glosses
    """

    sources: np.ndarray
    indptr: np.ndarray
    glosses: np.ndarray

    def take(self, numbers: np.ndarray) -> "WordHashes":
        """The hashes of the pairs at these indices, in this order."""
        counts = self.indptr[numbers + 1] - self.indptr[numbers]
        indptr = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(indptr[-1]) + np.repeat(self.indptr[numbers] - indptr[:-1], counts)
        return WordHashes(self.sources[numbers], indptr, self.glosses[places])

    def gloss_owners(self) -> np.ndarray:
        """int64 [E]: index of the pair that each gloss belongs to."""
        return np.repeat(np.arange(len(self.sources)), np.diff(self.indptr))


class DiskBackedPairs(Sequence[Pair]):
    """A sequence of pairs that are read from disk at each access. ``subset`` and slices are views."""

    def __init__(self, text: mmap.mmap | bytes, bounds: np.ndarray, keys: WordHashes, numbers: np.ndarray | None = None):
        """Record i is ``text[bounds[i]:bounds[i + 1]]``; ``numbers`` selects the records of this view, None all of them."""
        self._text, self._bounds, self._keys, self._numbers = text, bounds, keys, numbers

    def __len__(self) -> int:
        return len(self._keys.sources if self._numbers is None else self._numbers)

    def __getitem__(self, index):
        places = range(len(self))[index]
        if isinstance(places, range):
            return self.subset(np.arange(places.start, places.stop, places.step))
        (record,) = self._records(np.array([places]))
        return _decoded(record)

    def __iter__(self) -> Iterator[Pair]:
        return map(_decoded, self.records())

    def records(self) -> Iterator[bytes]:
        """Each pair serialised as a line of JSON; equal pairs have equal bytes."""
        for start in range(0, len(self), _CHUNK_PAIRS):
            yield from self._records(np.arange(start, min(start + _CHUNK_PAIRS, len(self))))

    def _records(self, numbers: np.ndarray) -> Iterator[bytes]:
        numbers = self._among_all(numbers)
        for begin, end in zip(self._bounds[numbers].tolist(), self._bounds[numbers + 1].tolist()):
            yield self._text[begin:end]

    def subset(self, numbers: np.ndarray) -> "DiskBackedPairs":
        """A view of the pairs at these indices, int64, in this order."""
        return DiskBackedPairs(self._text, self._bounds, self._keys, self._among_all(numbers))

    def keys(self, numbers: np.ndarray | None = None) -> WordHashes:
        """The hashes of the pairs at these indices, in this order; None: of all."""
        numbers = self._numbers if numbers is None else self._among_all(numbers)
        return self._keys if numbers is None else self._keys.take(numbers)

    def parts(self) -> tuple[mmap.mmap | bytes, np.ndarray, WordHashes, np.ndarray | None]:
        """What another view of the same pairs is made of."""
        return self._text, self._bounds, self._keys, self._numbers

    def _among_all(self, numbers: np.ndarray) -> np.ndarray:
        return numbers if self._numbers is None else self._numbers[numbers]


class PairWriter:
    """Append pairs to the file with ``add``, then take ``pairs``. Made by ``pair_writer``."""

    def __init__(self, file: typing.BinaryIO):
        self._file = file
        self._bounds, self._sources, self._indptr, self._glosses = array("q", [0]), array("Q"), array("q", [0]), array("Q")

    def add(self, pair: Pair) -> int:
        """Write the pair; returns its index."""
        record = json.dumps(dataclasses.astuple(pair)).encode() + b"\n"
        self._file.write(record)
        self._bounds.append(self._bounds[-1] + len(record))
        self._sources.append(word_hash(pair.source))
        self._glosses.extend(map(word_hash, pair.accepted))
        self._indptr.append(len(self._glosses))
        return len(self._sources) - 1

    def pairs(self) -> DiskBackedPairs:
        """All pairs written so far, in that order."""
        self._file.flush()
        # an empty file cannot be mapped
        text = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self._sources else b""
        return DiskBackedPairs(text, np.array(self._bounds), WordHashes(*map(np.array, (self._sources, self._indptr, self._glosses))))


@contextlib.contextmanager
def pair_writer() -> Iterator[PairWriter]:
    """A writer to a temporary file, which is deleted with the last view of its pairs."""
    with disk_errors(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
        yield PairWriter(file)


def as_disk_backed(pairs: Iterable[Pair]) -> DiskBackedPairs:
    """Write the pairs to disk; disk-backed pairs are returned as they are."""
    if isinstance(pairs, DiskBackedPairs):
        return pairs
    with pair_writer() as writer:
        for pair in pairs:
            writer.add(pair)
        return writer.pairs()


# what people type for the apostrophe and the hyphen, and marks of writing direction, which no one sees
_ONE_SPELLING = str.maketrans(
    dict.fromkeys("\u2019\u02bc\u02bb\u2018\u0060\u00b4", "'")
    | dict.fromkeys("\u2010\u2011", "-")
    | dict.fromkeys("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069", "")
)
_FINAL_PUNCTUATION = " .,;:!?\u2026\u060c\u061b\u061f\u06d4\u0964\u0965\u1362\u1363\u1364\u1365\u1366\u1367\u1368\u3001\u3002"


def normalise_word(word: str) -> str:
    """The identity of a word: equal for two strings that spell one word.

    Case, the variants of apostrophe and hyphen, compatibility forms (NFKC), marks of direction and punctuation at the end make no
    difference. Never empty for a word that is not: of punctuation alone all is kept.
    """
    if word.isascii():
        folded = word.lower().replace("`", "'")
    else:
        # NFKC would make a space and an accent of U+00B4, so the apostrophes come first; and folding may leave what NFKC composes
        folded = unicodedata.normalize("NFKC", word.translate(_ONE_SPELLING))
        folded = unicodedata.normalize("NFKC", folded.casefold()).translate(_ONE_SPELLING)
    return folded.rstrip(_FINAL_PUNCTUATION) or folded or word


def alphanumeric(word: str) -> str:
    """The letters and digits of a word, normalised."""
    return "".join(letter for letter in normalise_word(word) if letter.isalnum())


def word_hash(word: str) -> int:
    """64 bits: the same for words that are the same."""
    # 64 bits: the probability of any collision among a million words is 10^12 / 2^65, 3e-8
    return int.from_bytes(hashlib.blake2b(normalise_word(word).encode(), digest_size=8).digest(), "little")


def _decoded(record: bytes) -> Pair:
    source, target, synonyms, *rest = json.loads(record)
    return Pair(source, target, tuple(synonyms), *rest)
