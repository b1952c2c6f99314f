"""StarDict's and dictd's dictionaries in their variants."""

import gzip
import struct

import pytest

from tests.support.word_lists import read, written
from tli.data.pair_store import Pair
from tli.data.word_pairs import read_pairs
from tli.runtime.errors import TliError


def stardict(folder, entries, kinds="m", width=4, packed=True, **ifo):
    data, index = b"", b""
    for word, entry in entries:
        entry = entry if isinstance(entry, bytes) else entry.encode()
        index += word.encode() + b"\0" + struct.pack(">Q" if width == 8 else ">I", len(data)) + struct.pack(">I", len(entry))
        data += entry
    written(folder, "d.dict.dz" if packed else "d.dict", gzip.compress(data) if packed else data)
    written(folder, "d.idx", index)
    facts = {"version": "2.4.2", "bookname": "x", "wordcount": len(entries), **({"sametypesequence": kinds} if kinds else {}), **ifo}
    return written(folder, "d.ifo", "StarDict's dict ifo file\n" + "".join(f"{key}={value}\n" for key, value in facts.items()))


@pytest.mark.parametrize(
    ("kinds", "entries", "options"),
    [
        ("m", [("paka", "cat, tomcat"), ("mbwa", "n. dog"), ("x", "")], {}),
        ("m", [("paka", "paka\n1. cat; tomcat"), ("mbwa", "<n> dog")], {"width": 8, "idxoffsetbits": 64}),
        ("tm", [("paka", b"pa.ka\0cat; tomcat (male)"), ("mbwa", b"mb\0n. dog")], {"packed": False}),
        ("h", [("paka", "<b>paka</b><br>cat<br>tomcat"), ("mbwa", "<i>n.</i> dog&nbsp;")], {}),
        ("x", [("paka", "<k>paka</k>\ncat\ntomcat"), ("mbwa", "<k>mbwa</k><abr>n.</abr> dog")], {}),
        ("", [("paka", b"mcat, tomcat\0tpa\0"), ("mbwa", b"W\0\0\0\2xxmn. dog\0")], {}),
    ],
)
@pytest.mark.parametrize("named", ["d.ifo", "d.idx", "d.dict.dz"])
def test_stardict_in_its_variants(tmp_path, kinds, entries, options, named):
    path = stardict(tmp_path, entries, kinds, **options)
    if (tmp_path / named).exists():
        path = tmp_path / named
    assert list(read_pairs(path, "any", "other")) == [Pair("paka", "cat", ("tomcat",)), Pair("mbwa", "dog", (), "noun")]


def test_a_damaged_stardict_names_the_entry(tmp_path):
    path = stardict(tmp_path, [("paka", "cat"), ("mbwa", "dog")])
    whole = (tmp_path / "d.idx").read_bytes()
    (tmp_path / "d.idx").write_bytes(whole[:-3])
    with pytest.raises(TliError, match=r"d\.idx:2: the index must be whole"):
        read_pairs(path, "any", "other")
    (tmp_path / "d.idx").write_bytes(whole[:-1] + b"\xff")
    with pytest.raises(TliError, match=r"d\.idx:2: the entry must lie within the dictionary"):
        read_pairs(path, "any", "other")
    (tmp_path / "d.idx").unlink()
    with pytest.raises(TliError, match="no such file"):
        read_pairs(path, "any", "other")


def test_dictd_with_indented_text_a_fourth_column_and_latin_letters(tmp_path):
    written(tmp_path, "a.dict", "-\n   cat, tomcat\nmbwa\n   dog\n")
    assert list(read(tmp_path, "a.index", "paka\tA\tR\tPaka\nmbwa\tR\tM\n")) == [Pair("Paka", "cat", ("tomcat",)), Pair("mbwa", "dog")]
    written(tmp_path, "b.dict", "café\nmkahawa\n".encode("latin-1"))
    pairs = read(tmp_path, "b.index", "café\tA\tN\n".encode("latin-1"))
    assert list(pairs) == [Pair("café", "mkahawa")]
    assert "not UTF-8: read as cp1252, the best guess, with words such as café" in pairs.reading.notes()[0]
    assert list(read_pairs(tmp_path / "a.dict", "any", "other"))[1] == Pair("mbwa", "dog")
