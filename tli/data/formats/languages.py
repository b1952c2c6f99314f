"""Which languages are meant: ``swahili``, ``sw``, ``swa``, ``swh`` and ``Kiswahili`` are one; and the two that a list is read for."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from tli.data.formats.source import Asked, Row
from tli.runtime.errors import TliError

# what people call the columns of a list, where they do not name languages
_COLUMN_NAMES = {
    "source", "target", "src", "trg", "tgt", "word", "words", "term", "terms", "entry", "headword", "lemma", "form", "phrase", "sentence",
    "text", "translation", "translations", "gloss", "glosses", "meaning", "meanings", "definition", "definitions", "sense", "senses",
    "front", "back", "question", "answer", "key", "value", "id", "l1", "l2", "lang1", "lang2", "language1", "language2", "native",
    "foreign", "source_word", "target_word",
}  # fmt: skip


class TwoLanguages:
    """The two languages asked for, among those that a list turns out to hold."""

    def __init__(self, asked: Asked):
        self.asked = asked
        self.found: dict[str, str] = {}

    def side(self, tag: str) -> str:
        """Which of the two a language is: "source", "target", or "" for neither."""
        if tag not in self.found:
            sides = (name for name, wanted in (("source", self.asked.source), ("target", self.asked.target)) if same(wanted, tag))
            self.found[tag] = next(sides, "")
        return self.found[tag]

    def rows(self, line: int, terms: Iterable[tuple[str, Any]]) -> Iterator[tuple[int, Row]]:
        """The row of each source term of a concept, with all target terms; a concept that lacks one is counted and left out."""
        sides: dict[str, list] = {"source": [], "target": [], "": []}
        for tag, term in terms:
            sides[self.side(tag)].append(term)
        if not (sides["source"] and sides["target"]):
            held = ", ".join(str(term) for side in sides.values() for term in side) or "an empty one"
            self.asked.reading.drop(f"entries without both {self.asked.source} and {self.asked.target}", line, repr(held))
        for term in sides["source"] if sides["target"] else []:
            yield line, {"source": term, "target": sides["target"]}

    def require(self, where: str) -> None:
        """Raise ``TliError`` with the languages that there are, unless both were met; for the end of a list that held something."""
        missing = [name for name in ("source", "target") if name not in self.found.values()]
        if self.found and missing:
            must = f"the list must hold the languages {self.asked.source} and {self.asked.target}"
            there = ", ".join(map(repr, sorted(self.found)[:20])) + (", ..." if len(self.found) > 20 else "")
            remedy = f"name two of these with {' and '.join(f'--{name}' for name in ('source', 'target'))}"
            raise TliError(where, must, f"the languages {there}", remedy)


def same(asked: str, found: str) -> bool:
    """Whether two names or codes are of one language; a region or script counts where both have one."""
    if asked.strip().casefold() == found.strip().casefold():
        return True
    return any(a == b and (not x or not y or x == y) for a, x in _meanings(asked) for b, y in _meanings(found))


def is_column_name(cell: str) -> bool:
    """Whether a cell reads like the name of a column: a language's name, a two-letter code, or a word such as ``translation``."""
    name = cell.strip().casefold()
    if _COLUMN_NAMES & {name, *name.split()}:
        return True
    # a code of three letters is too often a word
    return len(name) == 2 and name.isascii() and bool(_tag_meaning(name)) or len(name) > 3 and bool(_name_meaning(name))


@functools.cache
def _meanings(name: str) -> frozenset[tuple[str, str]]:
    """(language, region and script) that a code or a name may stand for; ``Ga`` is a name, and ``ga`` the code of another."""
    return _tag_meaning(name) | _name_meaning(name)


def _tag_meaning(name: str) -> frozenset[tuple[str, str]]:
    import langcodes

    try:
        tag = langcodes.Language.get(name.strip().replace("_", "-"))
    except ValueError:
        return frozenset()
    if not tag.language or not tag.is_valid():
        return frozenset()
    # swh is the individual language of the macrolanguage sw
    language = langcodes.standardize_tag(tag.language, macro=True)
    return frozenset({(language, f"{tag.script or ''}-{tag.territory or ''}".strip("-"))})


def _name_meaning(name: str) -> frozenset[tuple[str, str]]:
    import langcodes

    try:
        found = langcodes.find(name)
    # its trie answers some names with bytes that are none of its values
    except (LookupError, UnicodeDecodeError, SystemError):
        return frozenset()
    return frozenset({(langcodes.standardize_tag(found.language or "", macro=True), "")})
