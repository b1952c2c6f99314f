"""Check a word list against a dictd dictionary: the share of its pairs that the dictionary confirms."""

import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable

from tli.data.glosses import without_notes
from tli.data.pair_store import Pair, alphanumeric, normalise_word
from tli.data.rows import with_rows
from tli.data.word_pairs import SHIPPED, merge_by_source, read_pairs
from tli.runtime.errors import TliError

FREEDICT = pathlib.Path("/usr/share/dictd/freedict-swh-eng.index")
AGREEMENT = 0.95


def check(pairs: str | None, source: str, target: str, dictionary: str | os.PathLike, **options: bool) -> float:
    """Print which pairs of a list a dictd dictionary confirms and which it does not; return the share that it confirms.

    The share is among the source words that the dictionary has; 0 if it has none of them. ``options`` as for ``read_pairs``.
    """
    if pathlib.Path(dictionary) == FREEDICT and not os.path.exists(FREEDICT):
        raise TliError(
            FREEDICT, "the FreeDict dictionary must be installed", "no such file", "apt install dict-freedict-swh-eng, or give --dictionary"
        )
    rows = with_rows(lambda rows, _: [pair for _, pair in rows], SHIPPED if pairs is None else pairs, source, target, **options)
    repeated = [
        [w for w, n in Counter(normalise_word(getattr(pair, side)) for pair in rows).items() if n > 1] for side in ("source", "target")
    ]
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
        entries.setdefault(alphanumeric(pair.source), set()).update(pair.accepted)
    compared = [(pair, theirs) for pair in merge_by_source(rows) if (theirs := _looked_up(pair, entries))]
    disagreements = [(pair, theirs) for pair, theirs in compared if not _agree(pair.accepted, theirs)]
    agreed = len(compared) - len(disagreements)
    share = agreed / len(compared) if compared else 0.0
    print(f"{dictionary}: {len(compared):,} of these words found, {agreed:,} agree ({share:.1%}; at least {AGREEMENT:.0%} is wanted)")
    for pair, theirs in disagreements:
        print(f"  {pair.source}: {', '.join(pair.accepted)} | {', '.join(sorted(theirs))}")
    return share


def _looked_up(pair: Pair, entries: dict[str, set[str]]) -> set[str] | None:
    """The dictionary's glosses, or None; a verb may be listed with or without the infinitive's ku-, or after a hyphen."""
    word = alphanumeric(pair.source)
    # a noun such as kuku is no infinitive
    variants = [word, word.removeprefix("ku"), "ku" + word] if pair.word_class.casefold() in ("verb", "v", "") else [word]
    return next((entries[variant] for variant in variants if variant in entries), None)


def _agree(ours: Iterable[str], theirs: Iterable[str]) -> bool:
    """True if a gloss of ours equals one of theirs up to an English ending, or is one word of a gloss of at most three words."""
    ours, theirs = _plain_glosses(ours), _plain_glosses(theirs)
    inflected = {form for gloss in ours for form in _inflections(gloss)} & theirs
    inflects = {form for gloss in theirs for form in _inflections(gloss)} & ours
    return bool(inflected or inflects or any(word in ours for gloss in theirs if len(gloss.split()) <= 3 for word in gloss.split()))


def _plain_glosses(glosses: Iterable[str]) -> set[str]:
    parts = (part for gloss in glosses for part in re.split(r"[,;/]|\b\d+\.", without_notes(normalise_word(gloss))))
    return {re.sub(r"^((to|an?|the|be) )+", "", " ".join(part.split())) for part in parts} - {""}


def _inflections(word: str) -> set[str]:
    stem = word.removesuffix("e")
    return {word, word + "s", word + "es", word + "ing", word + "ed", stem + "ing", stem + "ed"}
