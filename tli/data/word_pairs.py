"""Word pairs: one per source word, a train/held-out split without leakage, and false negatives.

Readers are in ``tli/data/readers.py``; how a long list is held, in ``tli/data/pair_store.py``. ``python -m tli.lexicon check`` compares a
list with a dictionary (``tli/data/dictionary.py``).
"""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tli.data.pair_store import DiskBackedPairs, Pair, WordHashes, as_disk_backed, normalise_word, pair_writer
from tli.data.readers import dedupe_synonyms, read_rows
from tli.data.relatives import relative_links
from tli.runtime.errors import TliError
from tli.stats.bootstrap import word_clusters

SHIPPED = pathlib.Path(__file__).parent / "swahili-english.tsv"
# a report measures a sample of this size from a longer list: retrieval is quadratic, and intervals of so many pairs are narrow enough
MEASURED_PAIRS = 5_000


def read_pairs(path: str | os.PathLike | None, source: str, target: str) -> DiskBackedPairs:
    """Read a word list: cleaned pairs, one per source word, in the order of the file.

    Exact duplicates collapse; the further targets of a source word become synonyms of its first. A target may serve several
    source words: such pairs are false negatives of each other (``false_negative_pairs``).

    Args:
        path:   ``.tsv``, ``.csv``, ``.json``, ``.jsonl``, or the ``.index`` of a dictd dictionary; None: the shipped list.
        source: name of the source language's column or key, in any case. A dictd dictionary has no names.
        target: name of the target language's. The columns ``class``, ``loan`` (yes or no), ``field`` (of meaning), ``family`` (of words
                of one stem) and ``synonyms`` (separated by ``;``, in JSON a list is allowed) are optional; others are ignored.

    Returns:
        A sequence of ``Pair`` (source, target, synonyms, word_class, loan, field, family) that is kept in a temporary file, not in memory.

    Raises:
        TliError: with the file and the line of what is wrong.

    Example:
        >>> from tli import read_pairs
        >>> pairs = read_pairs(None, "swahili", "english")
        >>> len(pairs), pairs[0].source, pairs[0].target
        (2243, 'abiria', 'passenger')
    """
    return merge_by_source(read_rows(SHIPPED if path is None else pathlib.Path(path), source, target))


def merge_by_source(rows: Iterable[Pair]) -> DiskBackedPairs:
    """Merge rows with the same source word into one pair, in the order of their first rows."""
    with pair_writer() as writer:
        for pair in rows:
            writer.add(pair)
        pairs = writer.pairs()
        sources = pairs.keys().sources
        order = np.argsort(sources, kind="stable")
        starts = np.flatnonzero(np.concatenate([[True], sources[order][1:] != sources[order][:-1]])[: len(order)])
        firsts, counts = order[starts], np.diff(starts, append=len(order))
        if len(starts) == len(order):
            return pairs
        numbers = firsts.copy()
        for word in np.flatnonzero(counts > 1):
            rows_of_word = pairs.subset(order[starts[word] : starts[word] + counts[word]])
            numbers[word] = writer.add(_merge(list(rows_of_word)))
        return writer.pairs().subset(numbers[np.argsort(firsts)])


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
