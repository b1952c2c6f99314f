"""Word families: pairs whose words come of one stem, such as burudisha, to entertain, and burudani, entertainment.

A map from spelling to spelling translates a held-out word by the trained one of its family, so families stay on one side of a split.
The rule is simple, and the same for all languages: two pairs are relatives if their source words share four letters in a row, and a
target or synonym of the one begins with the same four letters as one of the other's. A list with a column ``family`` says itself which
pairs are: those with the same entry; the rule is not applied to it.
"""

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from tli.data.pair_store import Pair, alphanumeric, normalise_word, word_hash

LETTERS = 4
# how a split was made that two lists are
LISTS = "lists"


def relative_links(pairs: Sequence[Pair]) -> np.ndarray:
    """int64 [E, 2]: links between relatives, as many as connect each family; those of a family are not all linked to each other."""
    links: list[tuple[int, int]] = []
    for _, members in _by_stem(pairs):
        links += [(members[0], other) for other in members[1:]]
    return np.array(sorted(set(links)), np.int64).reshape(-1, 2)


def has_relative(pairs: Sequence[Pair], others: Sequence[Pair]) -> np.ndarray:
    """bool [B]: whether each of the pairs has a relative among the others."""
    found = np.zeros(len(pairs), bool)
    for _, members in _by_stem(_Both(pairs, others)):
        if members[-1] >= len(pairs):
            found[[member for member in members if member < len(pairs)]] = True
    return found


def split_facts(trained: Sequence[Pair], held_out: Sequence[Pair], split: str) -> dict[str, int | str]:
    """What a report says of a split: both sizes, how it was made, and how many held-out pairs a trained relative may give away."""
    related = int(has_relative(held_out, trained).sum())
    return {"trained": len(trained), "held_out": len(held_out), "split": split, "with_relative": related}


class _Both(Sequence[Pair]):
    """Two sequences of pairs, one behind the other."""

    def __init__(self, first: Sequence[Pair], second: Sequence[Pair]):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index):
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]

    def __iter__(self) -> Iterator[Pair]:
        yield from self.first
        yield from self.second


def _by_stem(pairs: Sequence[Pair]) -> Iterator[tuple[str, list[int]]]:
    """Each stem, of the source word or the family's name, with the two or more pairs that have it: their indices, ascending.

    Pairs are first gathered by the beginnings of their glosses, hashed in flat arrays, and then read group by group: a list of a
    million pairs takes some 20 bytes a pair, not all its words' parts.
    """
    beginnings, owners, named = array("Q"), array("q"), False
    for number, pair in enumerate(pairs):
        if pair.family and not named:
            beginnings, owners, named = array("Q"), array("q"), True
        for beginning in _beginnings(pair, named):
            beginnings.append(word_hash(beginning))
            owners.append(number)
    keys, numbers = np.array(beginnings, np.uint64), np.array(owners, np.int64)
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=np.uint64(0)) != 0)
    for group in np.split(numbers[order], starts):
        if len(group) > 1:
            stems: dict[str, list[int]] = {}
            for number in group.tolist():
                for stem in _stems(pairs[number], named):
                    stems.setdefault(stem, []).append(number)
            yield from ((stem, members) for stem, members in stems.items() if len(members) > 1)


def _beginnings(pair: Pair, named: bool) -> set[str]:
    if named:
        return {normalise_word(pair.family)} if pair.family else set()
    glosses = map(alphanumeric, pair.accepted)
    return {letters[:LETTERS] for letters in glosses if len(letters) >= LETTERS}


def _stems(pair: Pair, named: bool) -> set[str]:
    if named:
        return {normalise_word(pair.family)}
    letters = alphanumeric(pair.source)
    return {letters[start : start + LETTERS] for start in range(len(letters) - LETTERS + 1)}
