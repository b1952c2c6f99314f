"""Word pairs: one per source word, a train/held-out split without leakage, and false negatives.

The formats of lists are in ``tli/data/formats/``, the cleaning of their rows in ``tli/data/rows.py``; how a long list is held, in
``tli/data/pair_store.py``. ``python -m tli.lexicon check`` compares a list with a dictionary (``tli/data/dictionary.py``).
"""

import contextlib
import hashlib
import os
import pathlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tli.config import ListConfig
from tli.data.formats.source import STANDARD_INPUT, local_file
from tli.data.pair_store import DiskBackedPairs, Pair, WordHashes, as_disk_backed, normalise_word, pair_writer
from tli.data.reading import Reading
from tli.data.relatives import relative_links
from tli.data.rows import dedupe_synonyms, with_rows
from tli.runtime.errors import TliError
from tli.runtime.files import sha256
from tli.stats.bootstrap import word_clusters

if TYPE_CHECKING:
    from rich.console import Console

SHIPPED = pathlib.Path(__file__).parent / "swahili-english.tsv"
# a report measures a sample of this size from a longer list: retrieval is quadratic, and intervals of so many pairs are narrow enough
MEASURED_PAIRS = 5_000


class WordPairs(DiskBackedPairs):
    """The pairs of a word list, with how it was read: ``pairs.reading`` (``tli.data.reading.Reading``)."""

    def __init__(self, reading: Reading, *parts: Any):
        super().__init__(*parts)
        self.reading = reading


def read_pairs(
    path: str | os.PathLike | None, source: str, target: str, *, skip_bad_rows: bool = False, split_glosses: bool = False
) -> WordPairs:
    """Read a word list: cleaned pairs, one per source word, in the order of the file.

    Exact duplicates collapse; the further targets of a source word become synonyms of its first. A target may serve several
    source words: such pairs are false negatives of each other (``false_negative_pairs``).

    Args:
        path:   a file of a format of docs/formats.md, ``-`` for standard input, or None for the shipped list. What the file is, is seen
                by its content: TSV, CSV, JSON, TMX, TEI, dictd and more, compressed or not, in any encoding.
        source: name of the source language's column, key or language, in any case; a number is a column of a table without a header.
                A dictd or StarDict dictionary has no names.
        target: name of the target language's. The columns ``class``, ``loan`` (yes or no), ``field`` (of meaning), ``family`` (of words
                of one stem) and ``synonyms`` (separated by ``;``, in JSON a list is allowed) are optional; others are ignored.
        skip_bad_rows: leave out rows that hold no pair, in place of an error that lists them.
        split_glosses: split cells such as ``house, home (of people)`` into glosses, without notes and markup.

    Returns:
        A sequence of ``Pair`` (source, target, synonyms, word_class, loan, field, family) that is kept in a temporary file, not in memory;
        its ``reading`` says what was understood, merged, changed and left out.

    Raises:
        TliError: with the file and the line of what is wrong.

    Example:
        >>> from tli import read_pairs
        >>> pairs = read_pairs(None, "swahili", "english")
        >>> len(pairs), pairs[0].source, pairs[0].target
        (2243, 'abiria', 'passenger')
    """
    path = SHIPPED if path is None else path
    before = None
    # reading says what is wrong with it
    with contextlib.suppress(OSError, TliError):
        before = list_facts(path)
    pairs = with_rows(_merged, path, source, target, skip_bad_rows=skip_bad_rows, split_glosses=split_glosses)
    pairs.reading.file = list_facts(path)
    if pairs.reading.file != before:
        must = "the list must stay as it is while it is read"
        raise TliError(pairs.reading.name, must, "one that was changed meanwhile", "run again when it is whole")
    return pairs


def read_list(config: ListConfig, console: "Console", path: str | None = None) -> WordPairs:
    """The pairs of a command's list, or of a second one of the same form; what a user should know of it is said on the console, once."""
    from rich.text import Text

    path = config.pairs if path is None else path
    pairs = read_pairs(path, config.source, config.target, skip_bad_rows=config.skip_bad_rows, split_glosses=config.split_glosses)
    for note in pairs.reading.notes():
        console.print(Text(f"{pairs.reading.name}: {note}"), soft_wrap=True)
    return pairs


def list_facts(path: str | os.PathLike | None) -> dict[str, str]:
    """Its name and the SHA-256 of its bytes as they are now; of a list that was read, ``pairs.reading.file`` says it."""
    file = local_file(SHIPPED if path is None else path)
    if file.is_dir():
        parts = sorted(part for part in file.rglob("*") if part.is_file() and part.suffix in (".parquet", ".csv"))
        return {"name": file.name, "sha256": hashlib.sha256("".join(map(sha256, parts)).encode()).hexdigest()}
    return {"name": "standard input" if path == STANDARD_INPUT else file.name, "sha256": sha256(file)}


def merge_by_source(rows: Iterable[Pair]) -> DiskBackedPairs:
    """Merge rows with the same source word into one pair, in the order of their first rows."""
    return _merged(enumerate(rows, 1), Reading(""))


def _merged(rows: Iterable[tuple[int, Pair]], reading: Reading) -> WordPairs:
    lines = array("I")
    with pair_writer() as writer:
        for line, pair in rows:
            lines.append(line)
            writer.add(pair)
        pairs = writer.pairs()
        sources = pairs.keys().sources
        order = np.argsort(sources, kind="stable")
        starts = np.flatnonzero(np.concatenate([[True], sources[order][1:] != sources[order][:-1]])[: len(order)])
        firsts, counts = order[starts], np.diff(starts, append=len(order))
        reading.pairs, reading.merged = len(starts), len(order) - len(starts)
        if reading.merged:
            numbers = firsts.copy()
            # in the order of the list, so that the example that is told is the first
            repeated = np.flatnonzero(counts > 1)
            for word in repeated[np.argsort(firsts[repeated])]:
                members = order[starts[word] : starts[word] + counts[word]]
                rows_of_word = list(pairs.subset(members))
                numbers[word] = writer.add(_merge(rows_of_word))
                _tell_merge(rows_of_word, [lines[member] for member in members], reading)
            pairs = writer.pairs().subset(numbers[np.argsort(firsts)])
    return WordPairs(reading, *pairs.parts())


def _tell_merge(rows: Sequence[Pair], lines: Sequence[int], reading: Reading) -> None:
    first = rows[0]
    for pair, line in zip(rows[1:], lines[1:], strict=True):
        if pair.source != first.source:
            reading.change(
                "rows merged with an earlier one whose word is the same in another spelling",
                line,
                f"{pair.source} with {first.source}",
            )
        elif set(pair.accepted) - set(first.accepted):
            reading.change(
                "rows merged with an earlier one of the same word, their targets now its synonyms", line, f"{pair.source} = {pair.target}"
            )


def _merge(rows: Sequence[Pair]) -> Pair:
    synonyms = dedupe_synonyms(gloss for pair in rows for gloss in pair.accepted)
    told = {name: next((value for pair in rows if (value := getattr(pair, name))), "") for name in ("word_class", "field", "family")}
    loan = next((pair.loan for pair in rows if pair.loan is not None), None)
    return replace(rows[0], synonyms=synonyms, loan=loan, **told)


def words_of(pairs: Iterable[Pair]) -> list[str]:
    """All sources, then all targets: the order in which words are tokenised, and of the rows of every tensor of words."""
    pairs = list(pairs)
    return [pair.source for pair in pairs] + [pair.target for pair in pairs]


def sample(pairs: Sequence[Pair], seed: int, most: int = MEASURED_PAIRS) -> np.ndarray:
    """Indices of a random sample of at most ``most`` pairs without replacement, int64, ascending; all if there are no more."""
    return np.sort(np.random.default_rng([seed, 3]).permutation(len(pairs))[:most])


def sample_splits(splits: Mapping[str, DiskBackedPairs], seed: int) -> dict[str, DiskBackedPairs]:
    """The pairs to measure, by split: all, or a random sample of many; splits without pairs are left out."""
    return {name: pairs.subset(sample(pairs, seed)) for name, pairs in splits.items() if len(pairs)}


def split_pairs(pairs: Sequence[Pair], held_out: float, seed: int, by: str = "families") -> tuple[DiskBackedPairs, DiskBackedPairs]:
    """Split into trained and held-out pairs, each in the given order, such that no word, and no family of words, is on both sides.

    Pairs that share a word, synonyms included, stay together. A string counts as one word in both languages, because to the
    model it is one state. The held-out count is the nearest to ``held_out * len(pairs)`` that such groups can add up to.

    by   "families": relatives (``tli/data/relatives.py``) stay together, too; "words": they may stand on both sides

    Raises:
        TliError: if a side would have fewer than 2 pairs, or no group is small enough to come near the share.
    """
    if not 0 < held_out < 1:
        raise TliError("--held-out", "the share of held-out pairs must lie between 0 and 1", held_out, "give a share such as 0.1")
    if seed < 0:
        raise TliError("--seed", "the seed must be at least 0", seed, "give another seed")
    pairs = as_disk_backed(pairs)
    goal = round(held_out * len(pairs))
    links = _word_links(pairs.keys())
    if by == "families":
        links = np.concatenate([links, relative_links(pairs)])
    groups = word_clusters(len(pairs), links) if len(pairs) else np.zeros(0, np.int64)
    order = np.random.default_rng(seed).permutation(groups.max(initial=-1) + 1)
    chosen = _subset_near(np.bincount(groups)[order].tolist() if len(order) else [], goal, least=2, most=len(pairs) - 2)
    if chosen is None:
        raise TliError(
            "--held-out",
            f"the list must fall into groups that share no word, such that about {max(goal, 2)} pairs can be held out and 2 be trained",
            f"{len(pairs)} pairs in {len(order)} groups",
            "add pairs or give another share" + (", or keep single words apart with --split words" if by == "families" else ""),
        )
    is_held_out = np.isin(groups, order[chosen])
    return pairs.subset(np.flatnonzero(~is_held_out)), pairs.subset(np.flatnonzero(is_held_out))


def check_disjoint(trained: Sequence[Pair], held_out: Sequence[Pair]) -> None:
    """Raise ``TliError`` with the first held-out word, in either language, synonyms included, that is trained, too."""
    trained, held_out = as_disk_backed(trained), as_disk_backed(held_out)
    known, keys = trained.keys(), held_out.keys()
    shared = [np.isin(words, np.concatenate([known.sources, known.glosses])) for words in (keys.sources, keys.glosses)]
    numbers = np.concatenate([np.flatnonzero(shared[0]), keys.gloss_owners()[shared[1]]])
    if not len(numbers):
        return
    number = numbers.min()
    pair, own = held_out[number], keys.take(np.array([number]))
    for word, key in zip((pair.source, *pair.accepted), (*own.sources, *own.glosses)):
        owners = np.concatenate([np.flatnonzero(known.sources == key), known.gloss_owners()[known.glosses == key]])
        if len(owners):
            other = trained[owners.max()]
            got = f"{normalise_word(word)!r} in {other.source} = {other.target} (trained) and in {pair.source} = {pair.target} (held out)"
            raise TliError("--held-out-pairs", "no word may stand on both sides", got, "remove it from one of the two lists")


def false_negative_pairs(pairs: Sequence[Pair]) -> np.ndarray:
    """False negatives among pairs: ``false_negative_edges`` of them.

    Their number grows with the square of how many share a gloss: for lists of bounded length.
    """
    return false_negative_edges(as_disk_backed(pairs).keys())


def false_negative_edges(keys: WordHashes) -> np.ndarray:
    """False negatives: all (i, j), i != j, where pairs i and j share a source word or an accepted gloss.

    Returns:
        int64 [E, 2], sorted, each pair of pairs in both orders. A retrieved j is as right as i, and never a negative of i.
    """
    from scipy.sparse import csr_array

    pairs = len(keys.sources)
    owners, words, first = [], [], 0
    for owner, side in ((np.arange(pairs), keys.sources), (keys.gloss_owners(), keys.glosses)):
        _, word, count = np.unique(side, return_inverse=True, return_counts=True)
        shared = count[word] > 1
        owners.append(owner[shared])
        # a word of one language is no gloss of the other
        words.append(word[shared] + first)
        first += len(count)
    rows_and_columns = np.concatenate(owners), np.concatenate(words)
    incidence = csr_array((np.ones(len(rows_and_columns[0]), np.int32), rows_and_columns), shape=(pairs, first))
    edges = np.stack((incidence @ incidence.T).nonzero(), axis=1).astype(np.int64)
    edges = edges[edges[:, 0] != edges[:, 1]]
    return edges[np.lexsort((edges[:, 1], edges[:, 0]))]


def _word_links(keys: WordHashes) -> np.ndarray:
    """int64 [E, 2]: links between pairs that share a word, in either language, as many as connect all pairs of each word."""
    words = np.concatenate([keys.sources, keys.glosses])
    order = np.argsort(words, kind="stable")
    words = words[order]
    # the pairs of a word lie side by side: linking each with the next connects them all
    again = np.flatnonzero(words[1:] == words[:-1])
    owners = np.concatenate([np.arange(len(keys.sources)), keys.gloss_owners()])
    return np.stack([owners[order[again]], owners[order[again + 1]]], axis=1)


def _subset_near(sizes: list[int], goal: int, least: int, most: int) -> list[int] | None:
    """Indices of sizes whose sum, within [least, most], is nearest to ``goal``; None if that is more than twice the goal.

    Subset sum by dynamic programming: bit c of ``sums`` says that some of the sizes so far add up to c.
    """
    most = max(0, min(most, max(least, 2 * goal)))
    sums, last_index, in_range = 1, np.full(most + 1, -1), (1 << most + 1) - 1
    for index, size in enumerate(sizes):
        fresh = (sums << size) & in_range & ~sums
        sums |= fresh
        while fresh:
            last_index[fresh.bit_length() - 1] = index
            fresh ^= 1 << (fresh.bit_length() - 1)
        if least <= goal <= most and last_index[goal] >= 0:
            break
    totals = least + np.flatnonzero(last_index[least:] >= 0)
    if not len(totals):
        return None
    # the first of two that are as near
    total = int(totals[np.abs(totals - goal).argmin()])
    chosen = []
    while total:
        chosen.append(last_index[total])
        total -= sizes[chosen[-1]]
    return chosen
