"""Word pairs on disk: a list of a million in little memory, and no Python object per pair.

The text of a pair lies in a temporary file without a name, mapped, and becomes a ``Pair`` when it is asked for. What concerns all
pairs at once - who shares a word with whom - goes by the words' keys: 64-bit hashes in flat arrays, 32 bytes a pair and 8 more for each
further gloss. Two words are the same word if they are equal after Unicode NFC and case folding.
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
    """A word, its translation, and the further translations that count as right. All are cleaned; their case is kept."""

    source: str
    target: str
    synonyms: tuple[str, ...] = ()
    word_class: str = ""
    loan: bool | None = None

    @property
    def accepted(self) -> tuple[str, ...]:
        """The target and its synonyms."""
        return self.target, *self.synonyms


@dataclasses.dataclass(frozen=True, slots=True)
class WordHashes:
    """The words of B pairs as numbers: equal keys, equal words.

    sources  uint64 [B]      key of each source word
    indptr   int64 [B + 1]   where each pair's accepted glosses begin in ``glosses``, its target first
    glosses  uint64 [E]      keys of the accepted glosses
    """

    sources: np.ndarray
    indptr: np.ndarray
    glosses: np.ndarray

    def take(self, numbers: np.ndarray) -> "WordHashes":
        """The keys of the pairs with these numbers, in this order."""
        counts = self.indptr[numbers + 1] - self.indptr[numbers]
        indptr = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(indptr[-1]) + np.repeat(self.indptr[numbers] - indptr[:-1], counts)
        return WordHashes(self.sources[numbers], indptr, self.glosses[places])

    def gloss_owners(self) -> np.ndarray:
        """int64 [E]: number of the pair that each gloss is of."""
        return np.repeat(np.arange(len(self.sources)), np.diff(self.indptr))


class Pairs(Sequence[Pair]):
    """Pairs that are read from disk one by one, as often as they are asked for. ``subset`` is a view, and so is a slice."""

    def __init__(self, text: mmap.mmap | bytes, bounds: np.ndarray, keys: WordHashes, numbers: np.ndarray | None = None):
        """Record i is ``text`` from ``bounds[i]`` on; ``bounds`` and ``keys`` are of all records, ``numbers`` of those that count."""
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
        """The bytes of each pair, a line of JSON: the same for equal pairs."""
        for start in range(0, len(self), _CHUNK_PAIRS):
            yield from self._records(np.arange(start, min(start + _CHUNK_PAIRS, len(self))))

    def _records(self, numbers: np.ndarray) -> Iterator[bytes]:
        numbers = self._among_all(numbers)
        for begin, end in zip(self._bounds[numbers].tolist(), self._bounds[numbers + 1].tolist()):
            yield self._text[begin:end]

    def subset(self, numbers: np.ndarray) -> "Pairs":
        """The pairs with these numbers, int64, in this order."""
        return Pairs(self._text, self._bounds, self._keys, self._among_all(numbers))

    def keys(self, numbers: np.ndarray | None = None) -> WordHashes:
        """The keys of the pairs with these numbers, in this order; None: of all."""
        numbers = self._numbers if numbers is None else self._among_all(numbers)
        return self._keys if numbers is None else self._keys.take(numbers)

    def _among_all(self, numbers: np.ndarray) -> np.ndarray:
        return numbers if self._numbers is None else self._numbers[numbers]


class PairWriter:
    """Pairs on their way to disk: ``add`` them, then take ``pairs``. Use ``pair_writer``."""

    def __init__(self, file: typing.BinaryIO):
        self._file = file
        self._bounds, self._sources, self._indptr, self._glosses = array("q", [0]), array("Q"), array("q", [0]), array("Q")

    def add(self, pair: Pair) -> int:
        """Write the pair; returns its number."""
        record = json.dumps((pair.source, pair.target, pair.synonyms, pair.word_class, pair.loan)).encode() + b"\n"
        self._file.write(record)
        self._bounds.append(self._bounds[-1] + len(record))
        self._sources.append(_hash(pair.source))
        self._glosses.extend(map(_hash, pair.accepted))
        self._indptr.append(len(self._glosses))
        return len(self._sources) - 1

    def pairs(self) -> Pairs:
        """All pairs so far, in the order in which they came."""
        self._file.flush()
        # a file without a byte cannot be mapped
        text = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self._sources else b""
        return Pairs(text, np.array(self._bounds), WordHashes(*map(np.array, (self._sources, self._indptr, self._glosses))))


@contextlib.contextmanager
def pair_writer() -> Iterator[PairWriter]:
    """A writer to a temporary file, which is gone when the last pairs that were taken from it are."""
    with disk_errors(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
        yield PairWriter(file)


def stored(pairs: Iterable[Pair]) -> Pairs:
    """The pairs on disk; what is there already is given back as it is."""
    if isinstance(pairs, Pairs):
        return pairs
    with pair_writer() as writer:
        for pair in pairs:
            writer.add(pair)
        return writer.pairs()


def normalise_word(word: str) -> str:
    """The form that all spellings of a word have in common: folded case, in NFC."""
    return unicodedata.normalize("NFC", word.casefold())


def _hash(word: str) -> int:
    # 64 bits: among a million words two different ones have the same key with probability 10^12 / 2^65, 3e-8
    return int.from_bytes(hashlib.blake2b(normalise_word(word).encode(), digest_size=8).digest(), "little")


def _decoded(record: bytes) -> Pair:
    source, target, synonyms, word_class, loan = json.loads(record)
    return Pair(source, target, tuple(synonyms), word_class, loan)
