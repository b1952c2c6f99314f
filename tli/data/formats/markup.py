"""Lists in XML: TMX and TBX, FreeDict's TEI, Apertium's bilingual dictionaries. Read element by element, each forgotten when it is done."""

import pathlib
import re
import typing
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

from tli.data.formats.languages import TwoLanguages, same
from tli.data.formats.source import Asked, ListFile, Row
from tli.data.glosses import glosses_of_lines
from tli.runtime.errors import TliError

CLASSES = {
    "n": "noun", "np": "proper noun", "v": "verb", "vblex": "verb", "vt": "verb", "vi": "verb", "adj": "adjective", "adv": "adverb",
    "num": "numeral", "pron": "pronoun", "prn": "pronoun", "conj": "conjunction", "cnjcoo": "conjunction", "cnjsub": "conjunction",
    "cnjadv": "conjunction", "prep": "preposition", "pr": "preposition", "interj": "interjection", "int": "interjection",
    "ij": "interjection", "det": "determiner",
}  # fmt: skip
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
# native codes of a translation tool; what they stand around is text
_CODES = {"bpt", "ept", "ph", "it", "ut"}


def root_of(file: ListFile) -> str:
    """The name of the root element, without a prefix; empty for what is no XML."""
    head = file.head_text
    head = re.sub(r"<\?.*?\?>|<!--.*?-->|<!DOCTYPE[^\[>]*(\[.*?\]\s*)?>", "", head, flags=re.DOTALL).lstrip() if head[:1] == "<" else ""
    found = re.match(r"<(?:[\w.-]+:)?([A-Za-z][\w.-]*)[\s/>]", head)
    return found[1] if found else ""


def tmx(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row]]:
    """The segments of each translation unit in the two languages."""
    languages = TwoLanguages(asked)
    for line, unit in _elements(file, "tu"):
        terms = [
            (_language(variant), text)
            for variant in unit.iter("tuv")
            for segment in variant.iter("seg")
            if (text := _text(segment, _CODES))
        ]
        yield from languages.rows(line, terms)
    languages.require(file.name)


def tbx(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row]]:
    """The terms of each concept in the two languages."""
    languages = TwoLanguages(asked)
    for line, concept in _elements(file, "termEntry", "conceptEntry"):
        sections = [section for name in ("langSet", "langSec") for section in concept.iter(name)]
        terms = [(_language(section), text) for section in sections for term in section.iter("term") if (text := _text(term))]
        yield from languages.rows(line, terms)
    languages.require(file.name)


def tei(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row]]:
    """The translations of each entry of a FreeDict dictionary, for each of its spellings.

    Headwords are the source, unless the languages that the file states are the two asked for, the other way round.
    """
    for line, entry in _elements(file, "entry"):
        words = [text for form in entry.iter("form") for orth in form.iter("orth") if (text := _text(orth))]
        quotes = [quote for cit in entry.iter("cit") if cit.get("type") in ("trans", "translation") for quote in cit.iter("quote")]
        # as dictionaries of before 2010 have it
        quotes += [translation for group in entry.iter("trans") for translation in group.iter("tr")]
        glosses = glosses_of_lines([text for quote in quotes if (text := _text(quote))])
        word_class = next((text for part in entry.iter("pos") if (text := _text(part))), "")
        told = {"class": CLASSES.get(word_class.rstrip("."), word_class)}
        tags = [tag for cit in entry.iter("cit") if cit.get("type") in ("trans", "translation") and (tag := _language(cit))]
        if tags and not same(asked.target, tags[0]) and same(asked.source, tags[0]):
            words, glosses = glosses, words
        elif tags and not same(asked.target, tags[0]):
            must = f"the dictionary must translate into {asked.target}"
            raise TliError(f"{file.name}:{line}", must, f"the language {tags[0]!r}", f"name it with --target {tags[0]}")
        if not (words and glosses):
            asked.reading.drop("entries without a translation", line, repr(", ".join(words or glosses)))
        for word in words if glosses else []:
            yield line, {"source": word, "target": glosses, **told}


def dix(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row]]:
    """The left and the right side of each entry of an Apertium bilingual dictionary.

    The left side is the source, unless the file's name, as ``apertium-swa-eng.swa-eng.dix``, has the two languages the other way round.
    """
    languages = re.findall(r"\b([a-z]{2,3})-([a-z]{2,3})\b", pathlib.PurePath(file.name).name)
    swapped = bool(languages) and same(asked.source, languages[-1][1]) and same(asked.target, languages[-1][0])
    names, line = ("r", "l") if swapped else ("l", "r"), 0
    for line, entry in _elements(file, "e"):
        if entry.get("i") == "yes":
            continue
        if entry.find("par") is not None and entry.find("p") is None:
            must = "the dictionary must be bilingual, of entries <e><p><l>...</l><r>...</r></p></e>"
            got = f"an entry with a paradigm, {entry.get('lm', '')!r}"
            raise TliError(
                f"{file.name}:{line}", must, got, "name the .dix with two languages in its name, such as apertium-swa-eng.swa-eng.dix"
            )
        same_word = entry.find("i")
        sides = [same_word, same_word] if same_word is not None else [entry.find(f"p/{name}") for name in names]
        words = ["" if side is None else _text(side, {"s", "par"}) for side in sides]
        symbol = next((part.get("n", "") for side in sides if side is not None for part in side.iter("s")), "")
        if all(words):
            yield line, {"source": words[0], "target": words[1], "class": CLASSES.get(symbol, symbol)}
        else:
            asked.reading.drop("entries without a word on both sides", line, repr(" ".join(words).strip()))


def _elements(file: ListFile, *names: str) -> Iterator[tuple[int, ElementTree.Element]]:
    """Every element of one of these names, with the line where it ends; it is emptied when the next one is asked for.

    Raises:
        TliError: the file is not well-formed, with the line.
    """
    parser: ElementTree.XMLPullParser = ElementTree.XMLPullParser(("start", "end"))
    open_elements: list[ElementTree.Element] = []
    try:
        for line, record in enumerate(file.lines(), 1):
            parser.feed(record)
            for event, element in typing.cast(Iterator[tuple[str, ElementTree.Element]], parser.read_events()):
                if event == "start":
                    open_elements.append(element)
                    element.tag = str(element.tag).rpartition("}")[2]
                    continue
                open_elements.pop()
                if element.tag in names:
                    yield line, element
                if element.tag in names or not any(parent.tag in names for parent in open_elements):
                    element.clear()
                    if open_elements:
                        open_elements[-1].remove(element)
        parser.close()
    except ElementTree.ParseError as error:
        raise TliError(f"{file.name}:{error.position[0]}", "the file must be well-formed XML", str(error), "mend it there") from error


def _language(element: ElementTree.Element) -> str:
    return element.get(_LANGUAGE) or element.get("lang") or ""


def _text(element: ElementTree.Element, without: set[str] | frozenset[str] = frozenset()) -> str:
    """The text of an element and of all below it; that of elements called ``without`` is left out, ``<b/>`` is a space."""
    parts = [element.text or ""]
    for child in element:
        parts.append(
            " " if child.tag == "b" and not len(child) and not child.text else "" if child.tag in without else _text(child, without)
        )
        parts.append(child.tail or "")
    return " ".join("".join(parts).split())
