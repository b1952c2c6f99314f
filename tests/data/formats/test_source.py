"""A list's bytes and text: packed, piped, in other encodings; and what is not read."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import sys
import zipfile

import pytest

from tests.support.word_lists import MUSE, MUSE_PAIRS, PAIRS, TRANSLATION, lines, message, read, table
from tli.data.word_pairs import list_facts, read_pairs


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["list.tsv.gz", "list.tsv", "list"])
def test_packed_lists_are_known_by_their_first_bytes(tmp_path, pack, name):
    packed = pack(table(MUSE).encode())
    assert list(read(tmp_path, name, packed)) == MUSE_PAIRS
    assert "the list must be a whole" in message(tmp_path, name, packed[:-10])


def zipped(**files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_", "."), content)
    return buffer.getvalue()


def test_a_zip_archive_holds_one_list(tmp_path):
    assert list(read(tmp_path, "words.zip", zipped(words_csv=table(MUSE, ",")))) == MUSE_PAIRS
    assert list(read(tmp_path, "words.zip", zipped(words_jsonl=lines(TRANSLATION)), "sw", "en")) == PAIRS
    said = message(tmp_path, "words.zip", zipped(a_tsv="x", b_tsv="y"))
    assert said == "words.zip: a zip archive must hold one list, got 2: a.tsv, b.tsv; run unzip words.zip and name one of its files"
    assert "got none" in message(tmp_path, "words.zip", zipped())
    assert "whole zip file" in message(tmp_path, "words.zip", zipped(words_csv=table(MUSE))[:80])


def test_a_bomb_does_not_go_off(tmp_path):
    row = b"x" * 1000 + b"\n"
    said = message(tmp_path, "words.tsv.gz", gzip.compress(b"swahili\tenglish\n" + row * 90_000))
    assert "a compressed list must hold at most 200 times its size" in said


def test_standard_input_and_pipes(tmp_path):
    code = """
from tli.data.word_pairs import *
pairs = read_pairs('-', 'swahili', 'english')
print(len(pairs), pairs.reading.name, list_facts('-')['name'])
"""
    done = subprocess.run([sys.executable, "-c", code], input=gzip.compress(table(MUSE).encode()), capture_output=True, check=True)
    assert done.stdout.decode() == "7 standard input standard input\n"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen([sys.executable, "-c", f"open({str(pipe)!r}, 'w').write({table(MUSE)!r})"]):
        assert list(read_pairs(str(pipe), "swahili", "english")) == MUSE_PAIRS
        assert len(list_facts(str(pipe))["sha256"]) == 64


LETTERS = {
    "utf-16": [("कुत्ता", "dog"), ("paka", "cat")],
    "utf-16-le": [("ndege", "bird"), ("paka", "café")],
    "utf-16-be": [("ndege", "bird"), ("paka", "café")],
    "utf-32": [("ndege", "bird"), ("paka", "café")],
    "cp1252": [("mkahawa", "café"), ("mtoto", "niño"), ("barabara", "Straße"), ("ng’ombe", "cow")],
    "cp1251": [("книга", "kitabu"), ("дом", "nyumba"), ("кошка", "paka"), ("собака", "mbwa"), ("вода", "maji")],
    "cp1256": [("كتاب", "book"), ("قلم", "pen"), ("بيت", "house"), ("ماء", "water"), ("كلب", "dog")],
    "gb18030": [("书", "kitabu"), ("猫", "paka"), ("狗", "mbwa"), ("水", "maji"), ("房子", "nyumba")],
}


@pytest.mark.parametrize("encoding", LETTERS)
@pytest.mark.parametrize(("name", "separator"), [("list.tsv", "\t"), ("list.csv", ";")])
def test_other_encodings_are_read_and_a_guess_is_said(tmp_path, encoding, name, separator):
    pairs = read(tmp_path, name, table(LETTERS[encoding], separator).encode(encoding))
    assert [(pair.source, pair.target) for pair in pairs] == LETTERS[encoding]
    notes = pairs.reading.notes()
    assert len(notes) == (not encoding.startswith("utf"))
    assert all(f"not UTF-8: read as {encoding}, the best guess, with words such as" in note for note in notes)


def test_one_wrong_byte_makes_no_other_letters_of_a_whole_list(tmp_path):
    content = table([(f"neno{i}", f"gloss é{i}") for i in range(50)]).encode() + b"x\tcaf\xe9\n"
    assert "words.tsv:52: the file must be UTF-8, got byte 0xe9; mend the line" in message(tmp_path, "words.tsv", content)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("words.mobi", "x", "got a Kindle book; convert it: pyglossary words.mobi words.txt --write-format=Tabfile"),
        ("words.slob", "!-1SLOB\x1f", "got an Aard 2 dictionary; convert it: pyglossary"),
        ("words", b"SQLite format 3\0", "got an SQLite database; convert it: sqlite3 -header"),
        ("words.pdf", "%PDF-1.7", "got a PDF; convert it: pdftotext -layout words.pdf words.txt"),
        ("words.po", 'msgid "x"', "got a gettext catalogue; convert it: po2csv words.po words.csv"),
        ("words.bin", bytes(range(256)) * 40, "got bytes that are no text"),
        ("deck.apkg", zipped(collection_anki2="x"), "export it from Anki again"),
    ],
)
def test_what_is_not_read_is_named_with_what_converts_it(tmp_path, name, content, says):
    assert says in message(tmp_path, name, content)
