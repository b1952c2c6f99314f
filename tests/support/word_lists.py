"""Word lists as tests write and read them: the same few pairs in every format."""

import json
import pathlib

import hypothesis
import pytest

from tli.data.pair_store import Pair
from tli.data.word_pairs import read_pairs
from tli.runtime.errors import TliError

WORDS = [("bandari", "port"), ("bandeji", "bandage"), ("bandika", "paste"), ("bangi", "cannabis"), ("bangili", "bracelet")]
PAIRS = [Pair(*words) for words in WORDS]
NOUNS = [Pair(*words, (), "noun") for words in WORDS]
MUSE = [("kitabu", "book"), ("kitabu", "ledger"), ("ndege", "bird"), ("ndege", "plane"), *WORDS]
MUSE_PAIRS = [Pair("kitabu", "book", ("ledger",)), Pair("ndege", "bird", ("plane",)), *PAIRS]
MERGED = "rows merged with an earlier one of the same word, their targets now its synonyms"
NO_NAMES = "no row of column names: column 1 is swahili, column 2 is english; the first pair is kitabu = book"
function_scoped = hypothesis.settings(
    deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def written(folder: pathlib.Path, name: str, content: str | bytes) -> pathlib.Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(rows, separator="\t", header=("swahili", "english")) -> str:
    return "".join(separator.join(row) + "\n" for row in ([header] if header else []) + list(rows))


def read(folder, name, content, source="swahili", target="english", **options):
    return read_pairs(written(folder, name, content), source, target, **options)


def message(folder, name, content, source="swahili", target="english", **options) -> str:
    with pytest.raises(TliError) as caught:
        read(folder, name, content, source, target, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TRANSLATION = [{"id": str(i), "translation": {"sw": a, "en": b}} for i, (a, b) in enumerate(WORDS)]
