"""``python -m tli.lexicon``: what is understood of a list of word pairs, the list as TSV, and how far it agrees with a dictionary."""

import os
import pathlib
from collections.abc import Callable, Iterable

from tli.config import LexiconConfig
from tli.data.dictionary import AGREEMENT, FREEDICT, check
from tli.data.pair_store import Pair
from tli.data.word_pairs import WordPairs, read_list, read_pairs
from tli.runtime.console import open_console
from tli.runtime.errors import TliError, disk_errors
from tli.runtime.files import atomic_write

_EXAMPLES = 10
_LOAN = {True: "yes", False: "no", None: ""}


def lexicon(config: LexiconConfig) -> bool:
    """Do what ``config.action`` says with ``config.pairs``; False where a list and a dictionary agree too little."""
    options = {"skip_bad_rows": config.skip_bad_rows, "split_glosses": config.split_glosses}
    if config.action == "check":
        return check(config.pairs, config.source, config.target, config.dictionary or FREEDICT, **options) >= AGREEMENT
    if config.action == "show":
        show(read_pairs(config.pairs, config.source, config.target, **options))
        return True
    out = pathlib.Path(config.files[1])
    if os.path.exists(out) and not config.overwrite:
        raise TliError(out, "the file to write must be new", "one that is there", "choose another name, or allow it with --overwrite")
    write_tsv(read_list(config, open_console()), out, config.source, config.target)
    return True


def show(pairs: WordPairs) -> None:
    """Print what was understood of a list, what was changed and left out, and its first pairs."""
    reading = pairs.reading
    print(f"{reading.name}: {reading.format}{f', {reading.encoding}' if reading.encoding else ''}")
    if reading.columns:
        print(f"  columns: {', '.join(reading.columns)}")
    dropped = sum(tally.count for tally in reading.dropped.values())
    print(f"  {reading.rows:,} rows, {dropped:,} left out, {reading.merged:,} merged with an earlier row: {reading.pairs:,} pairs")
    for note in reading.notes():
        print(f"  {note}")
    for pair in pairs[:_EXAMPLES]:
        print(f"  {pair.source} = {'; '.join(pair.accepted)}")


def write_tsv(pairs: WordPairs, path: pathlib.Path, source: str, target: str) -> None:
    """Write pairs as tli's own TSV, which reads back to equal pairs: source, target, and those optional columns that hold something."""
    columns: dict[str, Callable[[Pair], str]] = {
        "synonyms": lambda pair: ";".join(pair.synonyms[: _first_with_semicolon(pair)]),
        "class": lambda pair: pair.word_class,
        "loan": lambda pair: _LOAN[pair.loan],
        "field": lambda pair: pair.field,
        "family": lambda pair: pair.family,
    }
    used = {name: text for name, text in columns.items() if any(map(text, pairs))}
    with disk_errors(path), atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:

        def write(cells: Iterable[str]) -> None:
            file.write("\t".join(map(_cell, cells)) + "\n")

        write([source, target, *used])
        for pair in pairs:
            write([pair.source, pair.target, *(text(pair) for text in used.values())])
            # the others stand on rows of their own, which are merged again
            for synonym in pair.synonyms[_first_with_semicolon(pair) :]:
                write([pair.source, synonym])


def _first_with_semicolon(pair: Pair) -> int:
    """How many synonyms can stand in the column ``synonyms``: those before the first that holds its separator."""
    return next((i for i, synonym in enumerate(pair.synonyms) if ";" in synonym), len(pair.synonyms))


def _cell(text: str) -> str:
    """A cell as the table's reader takes it: one that is wholly in quotes is put in quotes once more."""
    return '"' + text.replace('"', '""') + '"' if len(text) > 1 and text[0] == text[-1] == '"' else text
