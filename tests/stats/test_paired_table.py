"""Tables of values from any source, as people's programs write them, and every way in which they can be wrong."""

import csv
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from tli.commands.evaluate import evaluate
from tli.config import EvaluateConfig
from tli.runtime.errors import TliError, run_command
from tli.stats.paired_table import compare_table, read_table

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def gains() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {"trained": generator.normal(0.09, 0.04, 60), "control": generator.normal(0.088, 0.05, 12)}


@pytest.fixture
def table(tmp_path, gains) -> pathlib.Path:
    """The gains as a program for spreadsheets writes them: byte order mark, quotes, CRLF, a comma in a name."""
    path = tmp_path / "cosines.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["pair, word", "cosine before", "cosine after", "list"])
        for name, values in gains.items():
            for i, gain in enumerate(values.tolist()):
                writer.writerow([f"{name}, {i // 2}", 0.3 + i / 1000, 0.3 + i / 1000 + gain, name])
    return path


COLUMNS = {"before": "cosine before", "after": "cosine after"}


def test_the_statistics_are_scipys_group_by_group_and_group_against_group(table, gains):
    config = EvaluateConfig(from_csv=str(table), **COLUMNS, group="list", margin=0.03)
    facts = evaluate(config)
    assert [record["group"] for record in facts["groups"]] == ["trained", "control"]
    for record in facts["groups"]:
        values = gains[record["group"]]
        t = scipy.stats.ttest_1samp(values, 0)
        assert record["n"] == len(values)
        assert record["mean_gain"] == pytest.approx(values.mean())
        assert record["mean_after"] - record["mean_before"] == pytest.approx(values.mean())
        assert (record["t"], record["p_t"]) == (pytest.approx(t.statistic), pytest.approx(t.pvalue))
        assert record["p_wilcoxon"] == pytest.approx(scipy.stats.wilcoxon(values).pvalue)
        assert record["d_z"] == pytest.approx(values.mean() / values.std(ddof=1))
        assert record["low"] < record["mean_gain"] < record["high"]
        assert record["p_t"] <= record["p_t_holm"] <= 2 * record["p_t"]
    (between,) = facts["between"]
    truth = scipy.stats.ttest_ind(gains["trained"], gains["control"], equal_var=False)
    assert (between["first"], between["second"]) == ("trained", "control")
    assert (between["t"], between["p"]) == (pytest.approx(truth.statistic), pytest.approx(truth.pvalue))
    assert between["equivalence"]["margin"] == 0.03
    assert 0 < between["equivalence"]["p"] < 1
    alone = evaluate(EvaluateConfig(from_csv=str(table), **COLUMNS))
    assert alone["between"] == []
    (everything,) = alone["groups"]
    assert (everything["group"], everything["n"]) == (None, 72)
    json.dumps([facts, alone], allow_nan=False)


def test_rows_that_share_a_word_are_resampled_together(table):
    alone = compare_table(read_table(table, *COLUMNS.values()))["groups"][0]
    together = compare_table(read_table(table, *COLUMNS.values(), cluster="pair, word"))["groups"][0]
    assert (alone["clusters"], together["clusters"]) == (72, 36)
    assert (alone["low"], alone["high"]) != (together["low"], together["high"])
    assert alone["t"] == together["t"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_missing_values_are_counted_and_left_out_whatever_the_delimiter(tmp_path, delimiter, newline):
    rows = [("w", "before", "after"), ("a", "0.1", "0.3"), ("b", "", "0.5"), ("", "", ""), ("c", "0.2", "NA"), ("d", " 0.25 ", "3e-1"),
            ("e", "null", "None")]  # fmt: skip
    path = tmp_path / "table.csv"
    path.write_bytes(newline.join(delimiter.join(row) for row in rows).encode())
    found = read_table(path, "before", "after")
    assert found.before.tolist() == [0.1, 0.25]
    assert found.after.tolist() == [0.3, 0.3]
    assert found.left_out == [3, 5, 7]
    facts = evaluate(EvaluateConfig(from_csv=str(path)))
    assert facts["table"]["lines_left_out"] == [3, 5, 7]


@pytest.mark.parametrize("missing", ["NaN", "nan", "NA", "n/a", "null", "None", "-", "", "#N/A", "<NA>"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_missing_value_in_every_common_spelling_leaves_its_row_out(tmp_path, capsys, missing, delimiter):
    path = tmp_path / "table.csv"
    rows = [("w", "before", "after"), ("a", "0.1", "0.3"), ("b", missing, "0.5"), ("c", "0.2", "0.9"), ("d", "0.3", missing)]
    path.write_text("\n".join(delimiter.join(row) for row in rows))
    found = read_table(path, "before", "after")
    assert (found.before.tolist(), found.after.tolist(), found.left_out) == ([0.1, 0.2], [0.3, 0.9], [3, 5])
    evaluate(EvaluateConfig(from_csv=str(path)))
    assert "2 rows; left out, a value is missing: 2 (lines 3, 5)" in capsys.readouterr().err


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_comma_is_a_decimal_point_where_it_divides_no_columns(tmp_path, delimiter):
    path = tmp_path / "table.csv"
    rows = [("w", "before", "after"), ("a", "0,1", "0,3"), ("b", "-1,5e-1", "0.5"), ("c", "2", "1,25")]
    path.write_text("\r\n".join(delimiter.join(row) for row in rows))
    found = read_table(path, "before", "after")
    assert (found.before.tolist(), found.after.tolist()) == ([0.1, -0.15, 2.0], [0.3, 0.5, 1.25])
    path.write_text(path.read_text().replace("0,3", "1,000,3"))
    with pytest.raises(TliError, match=r":2: after must be a finite number, got '1,000,3'"):
        read_table(path, "before", "after")


def test_a_group_that_cannot_be_tested_says_so_beside_those_that_can(tmp_path, capsys):
    path = tmp_path / "table.csv"
    lines = [
        "before,after,g",
        *(f"{i / 10},{i / 10 + i * i / 100},many" for i in range(6)),
        "0.1,0.2,one",
        "0.1,0.2,alike",
        "0.2,0.3,alike",
    ]
    path.write_text("\n".join(lines))
    facts = evaluate(EvaluateConfig(from_csv=str(path), group="g", margin=0.1))
    many, one, alike = facts["groups"]
    assert many["p_t_holm"] is not None
    assert {one[key] for key in ("t", "p_t", "p_t_holm", "p_sign_flip", "low", "d_z")} == {None}
    assert (alike["t"], alike["p_t"], alike["d_z"]) == (None, None, None)
    # two tests were made, so Holm counts two
    assert many["p_sign_flip_holm"] == pytest.approx(min(1, 2 * many["p_sign_flip"]))
    by_names = {(test["first"], test["second"]): test for test in facts["between"]}
    assert by_names["many", "one"]["p"] is None
    assert by_names["many", "alike"]["p"] is not None
    json.dumps(facts, allow_nan=False)
    assert "many" in capsys.readouterr().err


HEADER = "word,before,after,group\n"


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (HEADER + "a,1,2,x\n", {"before": "Before"}, r":1: .* 'Before' once, got the columns 'word', 'before', "
         r"'after', 'group'; name one with --before"),
        (HEADER + "a,1,2,x\n", {"group": "kind"}, r"'kind' once, .*; name one with --group"),
        ("before,after,after\n1,2,3\n", {}, "'after' once"),
        (HEADER + "a,1,2,x\nb,0.5,nam,x\n", {}, r":3: after must be a finite number, got 'nam'; "),
        (HEADER + "a,1,2,x\nb,inf,1,x\n", {}, r":3: before must be a finite number, got 'inf'; "),
        (HEADER + 'a,1,2,x\n"b\nb",1,2,x\nc,"0,5",1,x\n', {}, r":5: before must be a finite number, got '0,5'; "),
        (HEADER + "a,1_0,2,x\n", {}, ":2: before must be a finite number, got '1_0'"),
        (HEADER + "a,1,2\n", {}, r":2: the row must have the header's 4 columns, got 3: "),
        (HEADER + "a,0,5,0,6,x\n", {}, r":2: the row must have the header's 4 columns, got 6: "),
        (HEADER + 'a,1,2,"x\n', {}, r":2: the row must be well-formed, got "),
        (HEADER + "a,1,2,x\n", {}, "a test needs at least two rows with both values, got 1; "),
        (HEADER + "a,1,,x\nb,,3,x\n", {}, "at least two rows with both values, got 0; "),
        (HEADER + "a,1,2,x\nb,2,4,y\n", {"group": "group"}, "at least two rows with both values, got 1 in each of 2 groups"),
        (HEADER + "a,0.1,0.3,x\nb,0.2,0.4,x\nc,0.7,0.9,x\n", {}, "the gains, after - before, must vary, got 0.2 in all 3 rows; "),
        (HEADER + "a,1,1,x\nb,2,2,x\n", {}, "must vary, got 0 in all 2 rows"),
        (HEADER, {}, "at least two rows"),
        ("", {}, ":1: the table must have a header and rows, got none"),
        ("\n\n", {}, "must have a header"),
        (HEADER + "a,1,2,x\nb,2,4,x\n", {"margin": 0.0}, "^--margin: the number must be above 0, got 0.0"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_with_the_line(tmp_path, content, more, message):
    path = tmp_path / "table.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TliError, match=message):
        evaluate(EvaluateConfig(from_csv=str(path), output=str(tmp_path / "out"), **more))
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_tables_are_refused(tmp_path):
    with pytest.raises(TliError, match="must be that of a readable file, got no such file"):
        read_table(tmp_path / "none.csv", "before", "after")
    with pytest.raises(TliError, match="readable file"):
        read_table(tmp_path, "before", "after")
    (tmp_path / "latin.csv").write_bytes("before,after\n1,2\nné,3\n".encode("latin-1"))
    with pytest.raises(TliError, match=r"latin.csv:3: the file must be UTF-8, got byte 0xe9"):
        read_table(tmp_path / "latin.csv", "before", "after")


def test_the_tables_are_printed_and_written_only_where_asked(table, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    evaluate(EvaluateConfig(from_csv=str(table), **COLUMNS, group="list", margin=0.03))
    printed = capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    for said in ("trained - control", "sign flip", "TOST", "mismatched"):
        assert said in printed
    config = EvaluateConfig(from_csv=str(table), **COLUMNS, output=str(tmp_path / "out"))
    facts = evaluate(config)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == json.loads(json.dumps(facts))
    assert "| sign flip |" in (tmp_path / "out" / "evaluation.md").read_text()
    mine = (tmp_path / "out" / "evaluation.md").read_bytes()
    with pytest.raises(TliError, match="new or empty"):
        evaluate(config)
    assert (tmp_path / "out" / "evaluation.md").read_bytes() == mine


def test_many_groups_do_not_flood_the_console(tmp_path, capsys):
    path = tmp_path / "table.csv"
    generator = np.random.default_rng(0)
    path.write_text("before,after,g\n" + "".join(f"0,{generator.normal():.4f},g{i % 12}\n" for i in range(48)))
    facts = evaluate(EvaluateConfig(from_csv=str(path), group="g"))
    assert len(facts["between"]) == 66
    printed = capsys.readouterr().err
    assert printed.count(" - g") == 20
    # those with the smallest p
    smallest = min(facts["between"], key=lambda test: test["p"])
    assert f"{smallest['first']} - {smallest['second']}" in printed


def test_the_command_imports_no_torch_and_prints_json(table):
    code = f"""
import sys
sys.argv = ["evaluate", "--from-csv", {str(table)!r}, "--before", "cosine before", "--after", "cosine after", "--json"]
import runpy
runpy.run_module("tli.evaluate", run_name="__main__")
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["groups"][0]["n"] == 72


def test_the_command_ends_with_one_line_and_2(tmp_path, capsys):
    config = EvaluateConfig(from_csv=str(tmp_path / "none.csv"))
    with pytest.raises(SystemExit) as left:
        run_command(lambda: evaluate(config))
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for arguments in ({}, {"from_csv": "a.csv", "adapters": ("b",)}):
        with pytest.raises(TliError, match="there must be adapters, or a table with --from-csv"):
            EvaluateConfig(**arguments)


def test_the_papers_figures_from_a_table(tmp_path):
    # 623 pairs with mean gain .0902 and sd .0410, 63 with .0890: t about 54.9, and the two lists as good as alike
    path = tmp_path / "paper.csv"
    generator = np.random.default_rng(0)
    lines = ["pair,before,after,list"]
    for name, n, mean in (("trained", 623, 0.0902), ("control", 63, 0.0890)):
        shape = generator.normal(size=n)
        values = mean + 0.0410 * (shape - shape.mean()) / shape.std(ddof=1)
        lines += [f"{i},0.32,{0.32 + gain!r},{name}" for i, gain in enumerate(values.tolist())]
    path.write_text("\n".join(lines))
    facts = evaluate(EvaluateConfig(from_csv=str(path), group="list", margin=0.02))
    assert round(facts["groups"][0]["t"], 1) == 54.9
    assert facts["groups"][0]["t"] == pytest.approx(0.0902 / (0.0410 / math.sqrt(623)))
    (between,) = facts["between"]
    assert 0.8 < between["p"] < 0.85
    assert between["equivalence"]["p"] < 0.001
