"""Any bytes are a list or one error; a list that is written reads back to equal pairs."""

import contextlib
import json
import pathlib

import hypothesis
import hypothesis.strategies as st

from tests.support.word_lists import function_scoped, read, written
from tli.commands.lexicon import write_tsv
from tli.data.formats import FORMATS
from tli.data.word_pairs import read_pairs
from tli.runtime.errors import TliError

STARTS = [b"", b"PAR1", b"PK\x03\x04", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00", b"<tmx><body><tu>", b"<TEI><entry><form>", b"<martif>",
          b"<dictionary><e>", b"[{", b"{\"", b"[[", b"#separator:tab\n#html:true\n", b"StarDict's dict ifo file\nsametypesequence=m\n",
          b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xd0\xcf\x11\xe0", b"swahili\tenglish\n", b"swahili,english\n", b"sep=;\n",
          b"<?xml version='1.0' encoding='utf-7'?><tmx>",
          b"ID,Language_ID,Parameter_ID,Form\n", b'{"word": "a", "lang_code": "sw", "senses": [{"glosses": ']  # fmt: skip
SUFFIXES = [
    ".tsv",
    ".csv",
    ".json",
    ".jsonl",
    ".index",
    ".ifo",
    ".idx",
    ".dict",
    ".dict.dz",
    ".xlsx",
    ".parquet",
    ".tmx",
    ".tei",
    ".dix",
    ".txt",
    ".gz",
    "",
]
FRAGMENTS = st.sampled_from(
    [
        b"\t",
        b"\n",
        b",",
        b'"',
        b"swahili",
        b"english",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b"null",
        b"<seg>",
        b"</tu>",
        b"&x;",
        b"\0",
        b"\xe9",
        b"A\tA\n",
    ]
)


@hypothesis.given(
    st.sampled_from(STARTS),
    st.lists(FRAGMENTS | st.binary(max_size=12), max_size=12),
    st.sampled_from(SUFFIXES),
    st.booleans(),
    st.booleans(),
)
@hypothesis.settings(function_scoped, max_examples=600)
def test_any_bytes_are_a_list_or_one_error(tmp_path, start, parts, suffix, split, companions):
    content = start + b"".join(parts)
    if companions:
        for other in (".dict", ".idx"):
            written(tmp_path, f"any{other}", content)
    try:
        with contextlib.suppress(TliError):
            pairs = read(tmp_path, f"any{suffix}", content, split_glosses=split)
            assert all(pair.source and pair.target for pair in pairs)
    finally:
        for path in tmp_path.iterdir():
            path.unlink()


CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\"',;<&ab #\u2028\u200f"), min_size=1, max_size=8)


@hypothesis.given(
    st.lists(
        st.tuples(CELL, CELL, st.lists(CELL, max_size=2), CELL | st.just(""), st.sampled_from([True, False, None]), CELL | st.just("")),
        min_size=1,
        max_size=6,
    )
)
@hypothesis.settings(function_scoped, max_examples=300)
def test_tlis_own_tsv_reads_back_to_equal_pairs(tmp_path, rows):
    objects = [
        {
            "swahili": f"x{a}",
            "english": f"y{b}",
            "synonyms": [f"z{c}" for c in more],
            "class": kind,
            "loan": loan,
            "field": field,
            "family": field,
        }
        for a, b, more, kind, loan, field in rows
    ]
    pairs = read(tmp_path, "words.json", json.dumps(objects))
    write_tsv(pairs, tmp_path / "words.tsv", "swahili", "english")
    assert list(read_pairs(tmp_path / "words.tsv", "swahili", "english")) == list(pairs)


def test_every_format_is_documented():
    documented = (pathlib.Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert [form.name for form in FORMATS if form.name not in documented] == []
