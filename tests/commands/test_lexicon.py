"""``tli lexicon show`` and ``convert``, and how a command tells what it understood of a list."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from tli.commands.evaluate import _read_lists
from tli.commands.lexicon import lexicon
from tli.config import LIST_OPTIONS, EvaluateConfig, LexiconConfig, ListConfig, ProtocolConfig
from tli.data.pair_store import Pair
from tli.data.word_pairs import SHIPPED, list_facts, read_list, read_pairs, split_pairs
from tli.runtime.errors import TliError

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
TMX = '<tmx version="1.4"><body>' + "".join(
    f'<tu><tuv xml:lang="sw"><seg>{a}</seg></tuv><tuv xml:lang="en"><seg>{b}</seg></tuv></tu>\n'
    for a, b in [("nyumba", "house"), ("nyumba", "home; dwelling"), ("Nyumba!", '"hut"'), ("paka", "cat,"), ("peke", "")]
) + "</body></tmx>"  # fmt: skip


@pytest.fixture
def tmx(tmp_path) -> pathlib.Path:
    path = tmp_path / "words.tmx"
    path.write_text(TMX, encoding="utf-8")
    return path


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-m", "tli.lexicon", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        **options,
    )


def test_show_prints_what_was_understood(tmx, capsys):
    assert lexicon(LexiconConfig(action="show", files=(str(tmx),)))
    assert (
        capsys.readouterr().out
        == f"""{tmx}: TMX translation memory, utf-8
  4 rows, 1 left out, 2 merged with an earlier row: 2 pairs
  cells of several glosses, notes or markup, taken as they are (--split-glosses makes synonyms of them): 1, 'home; dwelling' (line 2)
  words that lost a separator at their end: 1, 'cat,' (line 4)
  rows merged with an earlier one of the same word, their targets now its synonyms: 1, nyumba = home; dwelling (line 2)
  rows merged with an earlier one whose word is the same in another spelling: 1, Nyumba! with nyumba (line 3)
  left out, entries without both swahili and english: 1, 'peke' (line 5)
  nyumba = house; home; dwelling; "hut"
  paka = cat
"""
    )


def test_show_of_the_shipped_list_has_ten_examples_and_nothing_to_say(capsys):
    assert lexicon(LexiconConfig(action="show"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "  columns: swahili, english, synonyms, class, loan, field",
        "  2,243 rows, 0 left out, 0 merged with an earlier row: 2,243 pairs",
    ]
    assert lines[3] == "  abiria = passenger"
    assert len(lines) == 13


def test_convert_writes_a_tsv_that_reads_back_to_equal_pairs(tmx, tmp_path, capsys):
    out = tmp_path / "words.tsv"
    assert lexicon(LexiconConfig(action="convert", files=(str(tmx), str(out))))
    assert "words that lost a separator at their end: 1, 'cat,' (line 4)" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == 'swahili\tenglish\nnyumba\thouse\nnyumba\thome; dwelling\nnyumba\t"""hut"""\npaka\tcat\n'
    assert list(read_pairs(out, "swahili", "english")) == list(read_pairs(tmx, "swahili", "english"))
    with pytest.raises(TliError, match="the file to write must be new, got one that is there; .*--overwrite"):
        lexicon(LexiconConfig(action="convert", files=(str(tmx), str(out))))
    assert lexicon(LexiconConfig(action="convert", files=(str(tmx), str(out)), split_glosses=True, overwrite=True))
    assert read_pairs(out, "swahili", "english")[0] == Pair("nyumba", "house", ("home", "dwelling", '"hut"'))


def test_the_shipped_list_converts_to_itself(tmp_path):
    out = tmp_path / "words.tsv"
    assert lexicon(LexiconConfig(action="convert", files=(str(SHIPPED), str(out))))
    assert list(read_pairs(out, "swahili", "english")) == list(read_pairs(None, "swahili", "english"))


def test_the_command_line(tmx, tmp_path):
    shown = command("show", tmx)
    assert (shown.returncode, shown.stdout.splitlines()[0]) == (0, f"{tmx}: TMX translation memory, utf-8")
    piped = command("show", "-", "--source", "sw", "--target", "en", input=TMX)
    assert piped.stdout.splitlines()[-1] == "  paka = cat"
    assert command("convert", tmx, tmp_path / "out.tsv").returncode == 0
    missing = command("show", tmp_path / "none.tsv")
    assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"action": "convert", "files": ("a",)}, "convert must have a list and a file to write, got 1: a"),
        ({"action": "convert"}, "convert must have a list and a file to write, got 0"),
        ({"action": "show", "files": ("a", "b")}, "show must have one list, got 2: a b"),
        ({"action": "show", "files": ("a",), "pairs": "b"}, "--pairs: the list must be named once"),
        ({"action": "count"}, "one of show, convert, check"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(TliError, match=says):
        LexiconConfig(**options)


def test_a_command_says_each_thing_once_whatever_brackets_are_in_it(tmp_path, capsys):
    from rich.console import Console

    path = tmp_path / "[v2].tsv"
    path.write_text("nyumba\t[bold]house,\npaka\tcat,\n", encoding="utf-8")
    pairs = read_list(ListConfig(pairs=str(path)), Console(stderr=True, highlight=False))
    assert len(pairs) == 2
    assert capsys.readouterr().err.splitlines() == [f"{path}: {note}" for note in pairs.reading.notes()]
    assert pairs.reading.notes()[1] == "words that lost a separator at their end: 2, such as '[bold]house,' (line 1)"


def test_evaluate_can_be_told_all_that_a_list_is_read_by():
    assert {field.name for field in dataclasses.fields(EvaluateConfig)} >= set(LIST_OPTIONS)


def test_evaluate_reads_a_list_as_training_did_unless_it_is_told_otherwise(tmp_path):
    from rich.console import Console

    path = tmp_path / "words.tsv"
    path.write_text("sw\ten\n" + "".join(f"neno{i}\tgloss{i}, thing{i}\n" for i in range(40)) + "peke\t\n")

    class Run:
        report = {"pairs": list_facts(path)}
        config = {
            "pairs": str(path),
            "source": "sw",
            "target": "en",
            "skip_bad_rows": True,
            "split_glosses": True,
            "held_out": 0.2,
            "seed": 3,
        }

        def option(self, name, default):
            return self.config.get(name, default)

    run, console = Run(), Console(stderr=True)
    splits, facts = _read_lists(EvaluateConfig(adapters=("x",)), [run], console)
    pairs = read_pairs(path, "sw", "en", skip_bad_rows=True, split_glosses=True)
    assert pairs[0] == Pair("neno0", "gloss0", ("thing0",))
    assert [list(splits[name]) for name in ("trained", "held_out")] == list(map(list, split_pairs(pairs, 0.2, 3, "words")))
    assert (facts["sha256"], facts["source"], facts["split_is_recorded"]) == (run.report["pairs"]["sha256"], "sw", True)
    whole, _ = _read_lists(EvaluateConfig(adapters=("x",), split_glosses=False), [run], console)
    assert whole["trained"][0].synonyms == ()
    with pytest.raises(TliError, match="words.tsv:42: en must hold a word"):
        _read_lists(EvaluateConfig(adapters=("x",), skip_bad_rows=False), [run], console)


def test_the_protocol_reads_its_list_many_times():
    with pytest.raises(TliError, match="--pairs: the list must be a file that each of the runs can read, got standard input"):
        ProtocolConfig(pairs="-")
