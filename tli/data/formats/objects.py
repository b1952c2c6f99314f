"""Lists of objects: JSON, JSONL and parquet; the ``translation`` of Hugging Face's data sets; Wiktionary's entries by Wiktextract.

A key may lie deeper: ``translation.sw``, ``senses.glosses``; a list on the way, or at its end, gives several values.
"""

import itertools
import json
import pathlib
import re
import typing
from collections.abc import Iterator

from tli.data.formats.languages import TwoLanguages, same
from tli.data.formats.source import Asked, BadRow, ListFile, Row
from tli.data.formats.tables import OPTIONAL
from tli.data.pair_store import normalise_word
from tli.runtime.errors import TliError

_MISSING: typing.Any = object()
# the reader of an entry in Wiktextract's form knows no better than this what language its glosses are in
_GLOSSES_ARE_IN = "en"
_WIKTIONARY_CLASSES = {"adj": "adjective", "adv": "adverb", "num": "numeral", "pron": "pronoun", "conj": "conjunction",
                       "prep": "preposition", "intj": "interjection", "det": "determiner", "name": "proper noun"}  # fmt: skip


def is_json(file: ListFile) -> bool:
    """Whether the text is one JSON document: the suffix says so, or it begins like a list of objects."""
    return file.suffix == ".json" or re.match(r"\[\s*\{|\{\s*\"", file.head_text) is not None


def is_jsonl(file: ListFile) -> bool:
    """Whether every line is a JSON value: the suffix says so, or the first two are objects, whatever the suffix."""
    if file.suffix in (".jsonl", ".ndjson"):
        return True
    first = file.first_lines(2) if file.head_text.startswith("{") else []
    return all(map(_is_object, first)) and len(first) > (file.suffix == ".json")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def json_document(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    """The objects of a JSON list, or the members of an object that maps words to glosses; it is read whole."""
    asked.reading.format = "JSON list"
    text = "".join(file.lines(newline=""))
    document = _parsed(file.name, text)
    if isinstance(document, list):
        return _rows(file.name, _with_lines(text, document), asked)
    if isinstance(document, dict) and _maps_words(document) and not {asked.source, asked.target} & document.keys():
        asked.reading.format = "JSON object of words and their glosses"
        asked.reading.remarks.append(f"took the keys as {asked.source} and their values as {asked.target}")
        return _members(text)
    kind = "an object" if isinstance(document, dict) else json.dumps(document)[:80]
    inner = next((key for key, value in document.items() if isinstance(value, list)), None) if isinstance(document, dict) else None
    remedy = "put the rows in [ ]" if inner is None else f"run jq -c '.[\"{inner}\"][]' {file.path.name} > words.jsonl"
    raise TliError(f"{file.name}:1", "the file must be a list of objects", kind, remedy)


def _maps_words(document: dict) -> bool:
    return all(isinstance(text, str) for value in document.values() for text in (value if isinstance(value, list) else [value]))


def _members(text: str) -> Iterator[tuple[int, Row]]:
    """Each member of an object, its key as source, with the line where it begins."""
    decoder, between, line, counted, end = json.JSONDecoder(), re.compile(r"[,:\s]*"), 1, 0, text.index("{") + 1
    while text[start := _end(between, text, end)] != "}":
        line, counted = line + text.count("\n", counted, start), start
        key, end = decoder.raw_decode(text, start)
        value, end = decoder.raw_decode(text, _end(between, text, end))
        yield line, {"source": key, "target": value}


def _end(pattern: re.Pattern, text: str, start: int) -> int:
    """Where a match that begins at ``start`` ends; the pattern matches nothing, too."""
    found = pattern.match(text, start)
    return start if found is None else found.end()


def _with_lines(text: str, document: list) -> Iterator[tuple[int, object]]:
    """The line where each value of a list begins; json.loads keeps no positions, so walk through the text, known to be valid."""
    decoder, between, line, counted, end = json.JSONDecoder(), re.compile(r"[,\s]*"), 1, 0, text.index("[") + 1
    for _ in document:
        start = _end(between, text, end)
        line, counted = line + text.count("\n", counted, start), start
        row, end = decoder.raw_decode(text, start)
        yield line, row


def json_lines(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    """An object a line."""
    asked.reading.format = "JSON lines"

    def values() -> Iterator[tuple[int, object]]:
        # not splitlines: a JSON string may hold U+2028
        for line, record in enumerate(file.lines(newline="\n"), start=1):
            if record.strip():
                try:
                    yield line, json.loads(record)
                except (ValueError, RecursionError) as error:
                    yield line, BadRow("the file must be valid JSON", str(error).lower(), "mend it there")

    return _rows(file.name, values(), asked)


def parquet(file: ListFile, asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows of a parquet file."""
    return _parquet_rows(file.name, [file.path], asked)


def parquet_folder(folder: pathlib.Path, asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows of all parquet files below a folder, as a data set of the Hugging Face hub lies there, in the order of their names."""
    files = sorted(folder.rglob("*.parquet"))
    if len(files) > 1:
        asked.reading.remarks.append(
            f"took the rows of {len(files)} files: {', '.join(str(path.relative_to(folder)) for path in files[:10])}"
        )
    return _parquet_rows(str(folder), files, asked)


def _parquet_rows(name: str, files: list[pathlib.Path], asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    asked.reading.format = "parquet"
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise TliError(name, "parquet needs pyarrow", "none installed", "pip install 'tli[parquet]'") from error

    def values() -> Iterator[tuple[int, object]]:
        number = itertools.count(1)
        for path in files:
            try:
                with ParquetFile(path) as parquet_file:
                    for batch in parquet_file.iter_batches(1024):
                        yield from zip(number, batch.to_pylist(), strict=False)
            except (ArrowException, OSError, UnicodeDecodeError) as error:
                raise TliError(path, "the parquet file must be whole", " ".join(str(error).split())[:120], "download it again") from error

    return _rows(name, values(), asked)


def _parsed(name: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TliError(
            f"{name}:{getattr(error, 'lineno', 1)}", "the file must be valid JSON", str(error).lower(), "mend it there"
        ) from error


def _rows(name: str, values: Iterator[tuple[int, object]], asked: Asked) -> Iterator[tuple[int, Row | BadRow]]:
    asked.reading.columns = (asked.source, asked.target)
    languages, line = TwoLanguages(asked), 0
    for line, value in values:
        if isinstance(value, BadRow):
            yield line, value
        elif not isinstance(value, dict):
            got = json.dumps(value, default=str)[:80]
            yield line, BadRow("every row must be an object", got, f'write {{"{asked.source}": ..., "{asked.target}": ...}}')
        elif is_wiktionary(value):
            asked.reading.format = "Wiktionary entries (Wiktextract)"
            yield from _wiktionary(f"{name}:{line}", line, value, languages)
        elif {"sl", "tl", "src"} <= value.keys() and not {asked.source, asked.target} & value.keys():
            # SMOL and GATITOS: codes of both languages, a segment and its translations
            translations = value.get("trgs") or [value.get("trg")]
            yield from languages.rows(line, [(str(value["sl"]), value["src"]), *((str(value["tl"]), text) for text in translations)])
        else:
            yield line, _row(value, asked)
    languages.require(name)


def _row(value: dict, asked: Asked) -> Row | BadRow:
    folded = {normalise_word(str(name)): cell for name, cell in value.items()}
    found = {side: _found(folded, wanted) for side, wanted in (("source", asked.source), ("target", asked.target))}
    if _MISSING in found.values():
        inner = folded.get("translation")
        keys = [*map(str, value), *(f"translation.{name}" for name in inner)] if isinstance(inner, dict) else list(map(str, value))
        got = f"the keys {', '.join(map(repr, keys)) or '(none)'}"
        return BadRow(f"every row must have the keys {asked.source} and {asked.target}", got, "name yours with --source and --target")
    return found | {name: folded[name] for name in OPTIONAL if name in folded}


def _found(folded: dict, wanted: str) -> typing.Any:
    """What lies under a name: as a key, as a path of keys, or as a language of ``translation``; ``_MISSING`` if nothing does."""
    name = normalise_word(wanted)
    if name in folded:
        return folded[name]
    if "." in wanted and (deeper := list(_walk(folded, name.split(".")))):
        return deeper[0] if len(deeper) == 1 else deeper
    translation = folded.get("translation")
    of_language = [text for tag, text in translation.items() if same(wanted, tag)] if isinstance(translation, dict) else []
    return of_language[0] if of_language else _MISSING


def _walk(value: object, path: list[str]) -> Iterator[object]:
    if isinstance(value, list):
        for part in value:
            yield from _walk(part, path)
    elif not path:
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if normalise_word(str(name)) == path[0]:
                yield from _walk(inner, path[1:])


def is_wiktionary(value: dict) -> bool:
    """Whether an object is an entry of Wiktionary as Wiktextract, and so Kaikki, writes it."""
    return isinstance(value.get("word"), str) and "lang_code" in value and ("senses" in value or "translations" in value)


def _wiktionary(where: str, line: int, entry: dict, languages: TwoLanguages) -> Iterator[tuple[int, Row]]:
    """The pairs of an entry: its word with its glosses, or with its translations.

    ``--source word --target senses`` and ``--source word --target translations`` say which; with the names of languages, translations
    into the other are taken, or else English glosses.
    """
    asked, word = languages.asked, entry["word"]
    source, target = (normalise_word(name).partition(".")[0] for name in (asked.source, asked.target))
    own, entries = str(entry["lang_code"]), entry.get("translations") or []
    entries = [one for one in entries if isinstance(one, dict) and isinstance(one.get("word"), str)]
    translations = [(str(one.get("code") or one.get("lang_code") or one.get("lang")), one["word"]) for one in entries]
    told = {"class": _WIKTIONARY_CLASSES.get(str(entry.get("pos", "")), str(entry.get("pos", "")))}
    if {source, target} & {"word", "senses", "glosses", "translations"}:
        of_translations = "translations" in (source, target)
        found = [text for _, text in translations] if of_translations else _glosses(entry)
        languages.found.update(
            {own: "source"} | dict.fromkeys([tag for tag, _ in translations] if of_translations else ["glosses"], "target")
        )
        if len({own, *languages.found}) > 2:
            there = ", ".join(sorted(languages.found))
            remedy = "name the two languages, as in --source swahili --target english"
            raise TliError(where, "translations into one language must be asked for", f"entries of {there}", remedy)
        pairs = [(word, found)] if source == "word" else [(one, [word]) for one in found]
    else:
        side = languages.side(own)
        others = [text for tag, text in translations if side and languages.side(tag) not in ("", side)]
        if side == "source" and not others and same(asked.target, _GLOSSES_ARE_IN) and not same(own, _GLOSSES_ARE_IN):
            others = _glosses(entry)
            languages.found.setdefault("glosses", "target")
        pairs = [(word, others)] if side == "source" else [(other, [word]) for other in others]
    pairs = [(one, glosses) for one, glosses in pairs if glosses]
    if not pairs:
        languages.asked.reading.drop("entries without a gloss or translation in the language asked for", line, repr(word))
    for one, glosses in pairs:
        yield line, {"source": one, "target": glosses, **told}


def _glosses(entry: dict) -> list[str]:
    """The innermost gloss of each sense; a form of another word has none of its own."""
    senses = [sense for sense in entry.get("senses") or [] if isinstance(sense, dict)]
    senses = [sense for sense in senses if not {"form_of", "alt_of"} & sense.keys() and "form-of" not in (sense.get("tags") or [])]
    glosses = [sense.get("glosses") for sense in senses]
    return [of_sense[-1] for of_sense in glosses if isinstance(of_sense, list) and of_sense and isinstance(of_sense[-1], str)]
