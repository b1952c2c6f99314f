"""Word pairs in: readers, cleaning, a split that leaks no word, and a check against a dictionary.

A list is TSV, CSV, JSON, JSONL or a dictd dictionary. Whatever the format, a reader yields ``(line, row)``, a row being a
mapping from column names in lower case to values; from there on all formats go one way: clean, make a ``Pair``, merge.
Two words are the same word if they are equal after Unicode NFC and case folding.
"""

import argparse
import csv
import gzip
import io
import json
import os
import pathlib
import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tli.errors import TliError, run_command

SHIPPED = pathlib.Path(__file__).parent / "data" / "swahili-english.tsv"
FREEDICT = pathlib.Path("/usr/share/dictd/freedict-swh-eng.index")
AGREEMENT = 0.95

# characters that mark no letter: soft hyphen, zero-width space, word joiner, byte order mark
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_LOAN = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False, "": None}


@dataclass(frozen=True, slots=True)
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


def read_pairs(path: str | os.PathLike | None, source: str, target: str) -> list[Pair]:
    """The cleaned pairs of a list, one per source word, in the order of the file.

    Exact duplicates collapse; the further targets of a source word become synonyms of its first. A target may serve several
    source words: such pairs share a meaning (``same_meaning``).

    Args:
        path:   ``.tsv``, ``.csv``, ``.json``, ``.jsonl``, or the ``.index`` of a dictd dictionary; None: the shipped list.
        source: name of the source language's column or key, in any case. A dictd dictionary has no names.
        target: name of the target language's. The columns ``class``, ``loan`` (yes or no) and ``synonyms`` (separated by
                ``;``, in JSON also a list) may be there, too; others are ignored.

    Raises:
        TliError: with the file and the line of what is wrong.
    """
    return _merge(pair for _, pair in _read_rows(SHIPPED if path is None else pathlib.Path(path), source, target))


def _read_rows(path: pathlib.Path, source: str, target: str) -> list[tuple[int, Pair]]:
    """The line and the pair of every row, cleaned, not yet merged."""
    if _key(source) == _key(target):
        raise TliError("--target", "source and target must be two columns", repr(target), "name another with --source or --target")
    suffix = path.suffix.lower()
    if suffix not in _READERS and os.path.exists(path) and not os.path.isdir(path):
        raise TliError(path, f"the format must show in the suffix, one of {' '.join(_READERS)}", repr(suffix), "rename or convert the file")
    text = _decoded(path, _file_bytes(path, "name a word list: .tsv .csv .json .jsonl or dictd .index"))
    rows = _READERS[suffix](path, text, source, target)
    pairs = [(line, _pair(f"{path}:{line}", row, source, target)) for line, row in rows]
    if not pairs:
        raise TliError(f"{path}:1", "the list must hold at least one pair", "none", "add pairs or name another file")
    return pairs


def _file_bytes(path: pathlib.Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TliError(path, "the path must be that of a readable file", (error.strerror or str(error)).lower(), remedy) from error


def _decoded(path: pathlib.Path, data: bytes) -> str:
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TliError(f"{path}:{line}", "the file must be UTF-8", f"byte 0x{data[error.start]:02x}", "save it as UTF-8") from error


def _table_rows(path: pathlib.Path, text: str, source: str, target: str) -> Iterator[tuple[int, dict]]:
    delimiter, separated_by = {".tsv": ("\t", "a tab"), ".csv": (",", "a comma")}[path.suffix.lower()]
    reader, header, line = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), None, 1
    try:
        for fields in reader:
            where = f"{path}:{line}"
            if fields and header is None:
                header = [_key(name.strip()) for name in fields]
                missing = [name for name in (source, target) if header.count(_key(name)) != 1]
                if missing:
                    must = f"the header must have the columns {source} and {target} once each, {separated_by} between them"
                    raise TliError(where, must, f"the columns {', '.join(map(repr, fields))}", "name yours with --source and --target")
            elif fields:
                row = dict(zip(header, fields))
                if len(fields) > len(header) or not {_key(source), _key(target)} <= row.keys():
                    must = f"the row must have the header's {len(header)} columns, {separated_by} between them"
                    raise TliError(where, must, f"{len(fields)}: {', '.join(map(repr, fields))}", "mend the row")
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise TliError(f"{path}:{line}", "the row must be well-formed", str(error), "close or double its quotation marks") from error


def _object_row(where: str, row: object, source: str, target: str) -> dict:
    if not isinstance(row, dict):
        raise TliError(where, "every row must be an object", json.dumps(row)[:80], f'write {{"{source}": ..., "{target}": ...}}')
    folded = {_key(name): value for name, value in row.items()}
    if not {_key(source), _key(target)} <= folded.keys():
        got = f"the keys {', '.join(map(repr, row)) or '(none)'}"
        raise TliError(where, f"every row must have the keys {source} and {target}", got, "name yours with --source and --target")
    return folded


def _parsed(path: pathlib.Path, text: str, first_line: int) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        raise TliError(f"{path}:{line}", "the file must be valid JSON", str(error).lower(), "mend it there") from error


def _json_rows(path: pathlib.Path, text: str, source: str, target: str) -> Iterator[tuple[int, dict]]:
    document = _parsed(path, text, 1)
    if not isinstance(document, list):
        kind = "an object" if isinstance(document, dict) else json.dumps(document)[:80]
        raise TliError(f"{path}:1", "the file must be a list of objects", kind, "put the rows in [ ]")
    # json.loads keeps no positions: walk through the text, known to be valid by now, for the line of each row
    decoder, between, line, counted, end = json.JSONDecoder(), re.compile(r"[,\s]*"), 1, 0, text.index("[") + 1
    for _ in document:
        start = between.match(text, end).end()
        line, counted = line + text.count("\n", counted, start), start
        row, end = decoder.raw_decode(text, start)
        yield line, _object_row(f"{path}:{line}", row, source, target)


def _jsonl_rows(path: pathlib.Path, text: str, source: str, target: str) -> Iterator[tuple[int, dict]]:
    # not splitlines: a JSON string may hold U+2028
    for line, record in enumerate(text.split("\n"), start=1):
        if record.strip():
            yield line, _object_row(f"{path}:{line}", _parsed(path, record, line), source, target)


_DIGITS = {digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
_CLASSES = {
    "n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb", "num": "numeral", "pron": "pronoun",
    "conj": "conjunction", "prep": "preposition", "interj": "interjection",
}  # fmt: skip


def _dictd_rows(path: pathlib.Path, text: str, source: str, target: str) -> Iterator[tuple[int, dict]]:
    """One row per headword that has a gloss of its own; inflected forms that only point to another entry have none."""
    data = _dictd_data(path)
    for line, record in enumerate(text.split("\n"), start=1):
        if not record.strip() or record.startswith(("00database", "00-database")):
            continue
        where, (headword, *numbers) = f"{path}:{line}", record.rstrip("\r").split("\t")
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
            yield line, {_key(source): word, _key(target): glosses[0], "synonyms": glosses[1:], "class": word_class}


def _dictd_data(path: pathlib.Path) -> bytes:
    plain, packed = path.with_suffix(".dict"), path.with_suffix(".dict.dz")
    if os.path.exists(plain):
        return _file_bytes(plain, "make it readable")
    data = _file_bytes(packed, f"put it, or {plain.name}, beside {path.name}")
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise TliError(packed, "the dictionary must be a whole gzip file", str(error).lower(), "install or download it again") from error


def _dictd_entry(headword: str, entry: str) -> tuple[str, str, list[str]]:
    """Word, class and glosses of an entry in FreeDict's layout.

    The first line is ``word /pronunciation/ <class>``, or several spellings before the first slash; the lines below hold
    glosses, or a number alone; what is indented is a note. The index has the words in lower case and without apostrophes.
    """
    head, *body = entry.strip("\n").split("\n")
    spellings = re.split(r"\s+[/<\[(]", head)[0].split(", ")
    word = next((spelling for spelling in spellings if _letters(spelling) == _letters(headword)), headword)
    word_class = "".join(re.findall(r"<([^,>]+)", head)[:1])
    glosses = re.split("[;,\n]", _without_notes("\n".join(line for line in body if not line[:1].isspace())))
    glosses = [gloss.strip() for gloss in glosses if not re.fullmatch(r"\s*(\d+\.)?\s*", gloss)]
    return word, _CLASSES.get(word_class, word_class), [re.sub(r"^\d+\.\s*", "", gloss) for gloss in glosses]


def _without_notes(text: str) -> str:
    """The text without its parentheses, which may be nested."""
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
    word_class = "" if row.get("class") is None else _clean(where, "class", row["class"])
    glosses = [_word(where, target, row[_key(target)]), *(_word(where, "synonyms", gloss) for gloss in synonyms)]
    return Pair(_word(where, source, row[_key(source)]), glosses[0], _further(glosses), word_class, _LOAN[loan])


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


def _further(glosses: Iterable[str]) -> tuple[str, ...]:
    """The glosses after the first that say something new; of spellings that differ in case the first one stays."""
    distinct: dict[str, str] = {}
    for gloss in glosses:
        distinct.setdefault(_key(gloss), gloss)
    return tuple(distinct.values())[1:]


def _merge(pairs: Iterable[Pair]) -> list[Pair]:
    by_source: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_source.setdefault(_key(pair.source), []).append(pair)
    merged = []
    for first, *others in by_source.values():
        synonyms = _further(gloss for pair in (first, *others) for gloss in pair.accepted)
        word_class = next((pair.word_class for pair in (first, *others) if pair.word_class), "")
        loan = next((pair.loan for pair in (first, *others) if pair.loan is not None), None)
        merged.append(replace(first, synonyms=synonyms, word_class=word_class, loan=loan))
    return merged


def _key(word: str) -> str:
    return unicodedata.normalize("NFC", word.casefold())


def _words(pair: Pair) -> list[str]:
    return [_key(word) for word in (pair.source, *pair.accepted)]


def _letters(word: str) -> str:
    return "".join(letter for letter in _key(word) if letter.isalnum())


def split_pairs(pairs: Sequence[Pair], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Trained and held-out pairs, each in the given order, such that no word stands on both sides.

    Pairs that share a word, synonyms included, stay together. A string counts as one word in both languages, because to the
    model it is one state. The held-out count is the nearest to ``held_out * len(pairs)`` that such groups can add up to.

    Raises:
        TliError: if a side would have fewer than 2 pairs, or no group is small enough to come near the share.
    """
    if not 0 < held_out < 1:
        raise TliError("--held-out", "the share of held-out pairs must lie between 0 and 1", held_out, "give a share such as 0.1")
    if seed < 0:
        raise TliError("--seed", "the seed must be at least 0", seed, "give another seed")
    goal = round(held_out * len(pairs))
    groups = _connected(pairs)
    order = np.random.default_rng(seed).permutation(groups.max(initial=-1) + 1)
    chosen = _subset_near(np.bincount(groups)[order].tolist() if len(order) else [], goal, least=2, most=len(pairs) - 2)
    if chosen is None:
        raise TliError(
            "--held-out",
            f"the list must fall into groups that share no word, such that about {max(goal, 2)} pairs can be held out and 2 be trained",
            f"{len(pairs)} pairs in {len(order)} groups",
            "add pairs or give another share",
        )
    is_held_out = np.isin(groups, order[chosen])
    return [pair for pair, out in zip(pairs, is_held_out) if not out], [pair for pair, out in zip(pairs, is_held_out) if out]


def check_disjoint(trained: Iterable[Pair], held_out: Iterable[Pair]) -> None:
    """Raise ``TliError`` with the first held-out word, in either language, synonyms included, that is trained, too."""
    known = {word: pair for pair in trained for word in _words(pair)}
    for pair in held_out:
        for word in _words(pair):
            if word in known:
                trained_as = f"{known[word].source} = {known[word].target}"
                got = f"{word!r} in {trained_as} (trained) and in {pair.source} = {pair.target} (held out)"
                raise TliError("--held-out-pairs", "no word may stand on both sides", got, "remove it from one of the two lists")


def same_meaning(pairs: Sequence[Pair]) -> np.ndarray:
    """All (i, j), i != j, where pairs i and j share a source word or an accepted gloss.

    Returns:
        int64 [E, 2], sorted, each pair of pairs in both orders. A retrieved j is as right as i, and never a negative of i.
    """
    words = _incidence(pairs, lambda pair: [("source", _key(pair.source)), *(("target", _key(gloss)) for gloss in pair.accepted)])
    i, j = (words @ words.T).nonzero()
    edges = np.stack([i, j], axis=1).astype(np.int64)[i != j]
    return edges[np.lexsort((edges[:, 1], edges[:, 0]))]


def _incidence(pairs: Sequence[Pair], words_of: Callable[[Pair], Iterable[Hashable]]):
    """The sparse 0-1 matrix, pairs by words, of which word occurs in which pair."""
    from scipy.sparse import csr_array

    columns: dict[Hashable, int] = {}
    entries = {(i, columns.setdefault(word, len(columns))) for i, pair in enumerate(pairs) for word in words_of(pair)}
    rows_and_columns = np.array(list(entries), dtype=np.int64).reshape(-1, 2).T
    return csr_array((np.ones(len(entries), np.int32), tuple(rows_and_columns)), shape=(len(pairs), len(columns)))


def _connected(pairs: Sequence[Pair]) -> np.ndarray:
    """int64 [len(pairs)]: number of the group, from 0, of each pair; a chain of shared words joins pairs into one group."""
    from scipy.sparse import block_array
    from scipy.sparse.csgraph import connected_components

    if not pairs:
        return np.zeros(0, np.int64)
    words = _incidence(pairs, _words)
    labels = connected_components(block_array([[None, words], [words.T, None]]), directed=False)[1]
    return labels[: len(pairs)].astype(np.int64)


def _subset_near(sizes: list[int], goal: int, least: int, most: int) -> list[int] | None:
    """Indices of sizes whose sum, within [least, most], is nearest to ``goal``; None if that is more than twice the goal.

    Subset sum by dynamic programming: bit c of ``sums`` says that some of the sizes so far add up to c.
    """
    sums, last_index, in_range = 1, {}, (1 << max(most + 1, 0)) - 1
    for index, size in enumerate(sizes):
        fresh = (sums << size) & in_range & ~sums
        sums |= fresh
        while fresh:
            last_index[fresh.bit_length() - 1] = index
            fresh ^= 1 << (fresh.bit_length() - 1)
        if least <= goal <= most and goal in last_index:
            break
    total = min((total for total in last_index if total >= least), key=lambda total: (abs(total - goal), total), default=None)
    if total is None or total > max(least, 2 * goal):
        return None
    chosen = []
    while total:
        chosen.append(last_index[total])
        total -= sizes[chosen[-1]]
    return chosen


def check(pairs: str | None, source: str, target: str, dictionary: str | os.PathLike) -> float:
    """Print how far a list agrees with a dictd dictionary, and where it does not; return the share of agreement.

    The share is over those source words that the dictionary has; 0 if it has none of them.
    """
    if pathlib.Path(dictionary) == FREEDICT and not os.path.exists(FREEDICT):
        raise TliError(
            FREEDICT, "the FreeDict dictionary must be installed", "no such file", "apt install dict-freedict-swh-eng, or give --dictionary"
        )
    rows = [pair for _, pair in _read_rows(SHIPPED if pairs is None else pathlib.Path(pairs), source, target)]
    repeated = [[w for w, n in Counter(_key(getattr(pair, side)) for pair in rows).items() if n > 1] for side in ("source", "target")]
    spaced = [word for pair in rows for word in (pair.source, pair.target) if " " in word]
    print(f"{pairs or SHIPPED.name}: {len(rows):,} rows")
    for count, what in (
        (repeated[0], f"{source} words on several rows"),
        (repeated[1], f"{target} words on several rows"),
        (spaced, "entries of several words"),
    ):
        print(f"  {what}: {len(count)} {', '.join(count[:10])}".rstrip())

    entries: dict[str, set[str]] = {}
    for pair in read_pairs(dictionary, source, target):
        entries.setdefault(_letters(pair.source), set()).update(pair.accepted)
    compared = [(pair, theirs) for pair in _merge(rows) if (theirs := _looked_up(pair, entries))]
    disagreements = [(pair, theirs) for pair, theirs in compared if not _agree(pair.accepted, theirs)]
    agreed = len(compared) - len(disagreements)
    share = agreed / len(compared) if compared else 0.0
    print(f"{dictionary}: {len(compared):,} of these words found, {agreed:,} agree ({share:.1%}; at least {AGREEMENT:.0%} is wanted)")
    for pair, theirs in disagreements:
        print(f"  {pair.source}: {', '.join(pair.accepted)} | {', '.join(sorted(theirs))}")
    return share


def _looked_up(pair: Pair, entries: dict[str, set[str]]) -> set[str] | None:
    """The dictionary's glosses; a verb may stand there with or without the infinitive's ku-, or before a hyphen alone."""
    word = _letters(pair.source)
    # a noun such as kuku is no infinitive
    variants = [word, word.removeprefix("ku"), "ku" + word] if pair.word_class.casefold() in ("verb", "v", "") else [word]
    return next((entries[variant] for variant in variants if variant in entries), None)


def _agree(ours: Iterable[str], theirs: Iterable[str]) -> bool:
    """True if a gloss of ours is one of theirs up to an English ending, or one word of theirs of up to three words."""
    ours, theirs = _plain_glosses(ours), _plain_glosses(theirs)
    inflected = {form for gloss in ours for form in _inflections(gloss)} & theirs
    inflects = {form for gloss in theirs for form in _inflections(gloss)} & ours
    return bool(inflected or inflects or any(word in ours for gloss in theirs if len(gloss.split()) <= 3 for word in gloss.split()))


def _plain_glosses(glosses: Iterable[str]) -> set[str]:
    parts = (part for gloss in glosses for part in re.split(r"[,;/]|\b\d+\.", _without_notes(_key(gloss))))
    return {re.sub(r"^((to|an?|the|be) )+", "", " ".join(part.split())) for part in parts} - {""}


def _inflections(word: str) -> set[str]:
    stem = word.removesuffix("e")
    return {word, word + "s", word + "es", word + "ing", word + "ed", stem + "ing", stem + "ed"}


def main() -> None:
    """Run ``python -m tli.lexicon check``; exit code 1 if the list agrees with the dictionary too little."""
    parser = argparse.ArgumentParser(prog="python -m tli.lexicon", description="Look after lists of word pairs.")
    verbs = parser.add_subparsers(required=True, metavar="check")
    options = verbs.add_parser("check", help="compare a list with a dictd dictionary", description=check.__doc__.partition("\n")[0])
    options.add_argument("--pairs", metavar="PATH", help="the list (default: the shipped one)")
    options.add_argument("--source", default="swahili", help="name of the source language's column (default: %(default)s)")
    options.add_argument("--target", default="english", help="name of the target language's column (default: %(default)s)")
    options.add_argument("--dictionary", metavar="PATH.index", default=FREEDICT, help="a dictd dictionary (default: %(default)s)")
    sys.exit(0 if check(**vars(parser.parse_args())) >= AGREEMENT else 1)


if __name__ == "__main__":
    run_command(main)
