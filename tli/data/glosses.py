"""Several glosses in one cell, notes in parentheses, and markup: finding them, and taking them apart."""

import html
import re
from collections.abc import Iterable

# letters' abbreviations of word classes as dictionaries put them before a gloss
_ABBREVIATION = re.compile(r"^\s*(?:(?:n|v|vt|vi|adj|adv|pron|prep|conj|interj|num|art|det|pl|sg)\.\s*)+(?=\S)", re.IGNORECASE)
# not a comma or a slash within a number
_SEPARATOR = re.compile(r"[;،؛、|\n]|(?<!\d)[,/]|[,/](?!\d)")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->", re.DOTALL)
_ENTITY = re.compile(r"&(?:[A-Za-z]\w*|#\d+|#x[0-9A-Fa-f]+);")
_LINE_BREAK = re.compile(r"<(?:br|/?(?:div|p|li|ul|ol|tr|dt|dd|blockquote))\b[^<>]*>", re.IGNORECASE)
_SOUND = re.compile(r"\[sound:[^\]]*\]")
_BRACKETS = (re.compile(r"\([^()]*\)"), re.compile(r"\[[^\[\]]*\]"))
# what any of the above begins with: a quick look before the slow ones
_SIGN = re.compile(r"[,;/|()\[\]<&،؛、\n]|^\s*\w{1,6}\.\s")
_AT_END = " \t,;،؛、"


def has_glosses_or_markup(text: str) -> bool:
    """Whether ``split_glosses`` would change a word."""
    return _SIGN.search(text) is not None and split_glosses(text) != [text.strip()]


def without_final_separator(text: str) -> str:
    """``book`` of ``book,``; a word of separators alone stays as it is."""
    return text.rstrip(_AT_END) or text


def split_glosses(text: str) -> list[str]:
    """The glosses of a cell: split at ``, ; / |``, without parentheses, brackets, markup and abbreviations of word classes.

    Never empty: of a cell that holds nothing else, the cell as it stands.
    """
    plain = without_notes("\n".join(html_lines(text)) if _TAG.search(text) or _ENTITY.search(text) else text)
    glosses = [" ".join(_ABBREVIATION.sub("", part).split()) for part in _SEPARATOR.split(plain)]
    return list(dict.fromkeys(gloss for gloss in glosses if gloss)) or [text.strip()]


def html_lines(text: str) -> list[str]:
    """The lines of a piece of HTML as a reader would see them: no tags, entities resolved, no sound files."""
    broken = _LINE_BREAK.sub("\n", _SOUND.sub(" ", text))
    lines = html.unescape(_TAG.sub("", broken)).replace("\u00a0", " ").split("\n")
    return [line.strip() for line in lines if line.strip()]


def without_notes(text: str) -> str:
    """Remove parentheses and brackets and what is in them; they may be nested."""
    for bracket in _BRACKETS:
        while (shorter := bracket.sub(" ", text)) != text:
            text = shorter
    return text


def glosses_of_lines(lines: Iterable[str]) -> list[str]:
    """The glosses of a dictionary's entry: split at ``;`` and ``,``, without parentheses and without the senses' numbers."""
    parts = re.split("[;,\n]", without_notes("\n".join(lines)))
    return [re.sub(r"^\d+[.)]\s*", "", part.strip()) for part in parts if not re.fullmatch(r"\s*(\d+[.)]?)?\s*", part)]
