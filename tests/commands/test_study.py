"""The study as its user meets it: real cells in processes of their own, kills, parts without a coordinator, and bad input."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tli.commands import study as study_module
from tli.commands.grid import Cell, run_cells
from tli.commands.study import study
from tli.config import StudyConfig
from tli.data import word_pairs
from tli.reports import study as study_report
from tli.reports import study_results
from tli.runtime.cli import parse
from tli.runtime.console import open_console
from tli.runtime.errors import TliError, run_command

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def settings(make_model, tmp_path_factory) -> dict:
    """A study of four cells and two controls, of a step or two each."""
    words = tmp_path_factory.mktemp("words") / "ninety.tsv"
    rows = word_pairs.SHIPPED.read_text(encoding="utf-8").splitlines()[:91]
    words.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {
        "model": str(make_model("llama")),
        "pairs": str(words),
        "ranks": "1,2",
        "seeds": 1,
        "rates": "1e-3",
        "search_rank": 2,
        "batch": 40,
        "epochs": 1,
        "warmup": 1,
        # its windows are many times the words
        "keep_weight": 0.0,
    }


@pytest.fixture(scope="module")
def complete(settings, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """A study with a rate search, run whole."""
    folder = tmp_path_factory.mktemp("study") / "whole"
    return folder, study(StudyConfig(**settings | {"rates": "1e-4,1e-2", "arms": "early", "seeds": 2}, output=str(folder), jobs=2))


def as_flags(settings: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def command(flags: list[str], capsys) -> tuple[int, str]:
    """Exit code and standard error of ``python -m tli.study``, in this process."""
    with pytest.raises(SystemExit) as left:
        run_command(lambda: (study(parse(StudyConfig, "tli.study", flags)), sys.exit(0)))
    return left.value.code, capsys.readouterr().err


def process(flags: list[str], cwd: pathlib.Path, **more) -> subprocess.Popen:
    environment = {"PYTHONPATH": str(ROOT), **os.environ, **more.pop("environment", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "tli.study", *flags], cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True, **more
    )


def contents(folder: pathlib.Path) -> dict[str, tuple]:
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_every_value_is_the_mean_of_the_cells_reports(complete):
    folder, results = complete
    assert {path.name for path in folder.iterdir()} >= {*study_report.FILES, "study.json", "cells"}
    assert results == json.loads((folder / "results.json").read_text())
    for rank, shuffled in ((1, False), (2, False), (2, True)):
        names = [f"early-rank{rank}-seed{seed}" + "-shuffled" * shuffled for seed in range(2)]
        reports = [json.loads((folder / "cells" / name / "report.json").read_text()) for name in names]
        for layer, metric in ((2, "mrr"), ("output", "gap"), (2, "clipscore")):
            found = [
                m["value"]
                for report in reports
                for m in report["measurements"]
                if (m["split"], m["when"], m["layer"], m["metric"]) == ("held_out", "after", layer, metric)
            ]
            value = study_results.find(results, "early", rank, layer, metric, shuffled=shuffled)
            assert value["by_seed"] == found
            assert value["value"] == pytest.approx(np.mean(found))


def test_cells_of_a_seed_differ_in_rank_alone(complete):
    folder, results = complete
    reports = {path.parent.name: json.loads(path.read_text()) for path in (folder / "cells").glob("early-*/report.json")}
    for seed in range(2):
        own = [report for name, report in reports.items() if f"seed{seed}" in name]
        # the same words, so the same values before training, and as many steps
        before = [[m["value"] for m in report["measurements"] if m["when"] == "before"] for report in own]
        assert before[0] == before[1] == before[2]
        assert len({report["training"]["steps"] for report in own}) == 1
    one, other = (reports[f"early-rank{rank}-seed0"]["config"] for rank in (1, 2))
    assert {name for name in one if one[name] != other[name]} == {"rank", "alpha", "output"}
    assert results["steps"] == reports["early-rank1-seed0"]["training"]["steps"]


def test_the_rate_is_that_which_finds_the_search_words_best(complete, settings):
    folder, results = complete
    found = results["search"]["early"]
    assert [one["rate"] for one in found["tried"]] == [1e-4, 1e-2]
    assert found["chosen"] == max(found["tried"], key=lambda one: one["value"])["rate"]
    # one run may be luck: of each rate the worst counts
    assert all((len(one["runs"]), one["value"]) == (2, min(one["runs"])) for one in found["tried"])
    used = {json.loads(path.read_text())["config"]["lr"] for path in (folder / "cells").glob("early-*/report.json")}
    assert used == {found["chosen"]}
    # and no cell of the grid has a word of theirs
    lists = [word_pairs.read_pairs(folder / f"{name}.jsonl", "swahili", "english") for name in ("grid", "search")]
    word_pairs.check_disjoint(*lists)
    # nothing is lost on the way: glosses and loan marks, too
    whole = {pair.source: pair for pair in word_pairs.read_pairs(settings["pairs"], "swahili", "english")}
    assert {pair.source: pair for part in lists for pair in part} == whole


def test_more_ranks_and_seeds_leave_the_complete_cells_alone(complete, settings, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(complete[0], folder)
    before = contents(folder / "cells")
    more = settings | {"rates": "1e-4,1e-2", "arms": "early", "ranks": "1,2,4", "seeds": 2}
    results = study(StudyConfig(**more, output=str(folder)))
    assert results["ranks"] == [1, 2, 4]
    after = contents(folder / "cells")
    assert before.items() <= after.items()
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"early-rank4-seed0", "early-rank4-seed1"}
    assert [trend["p_page"] is not None for trend in results["trends"]].count(True) > 0


def test_torchruns_processes_share_the_cells(settings, tmp_path):
    folder = tmp_path / "parts"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tli.study"]
    flags = as_flags(settings | {"output": folder, "arms": "early"})
    done = subprocess.run(
        [*launch, *flags], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert "in part 1 of 2" in done.stderr
    assert "in part 2 of 2" in done.stderr
    names = {path.name for path in (folder / "cells").iterdir()}
    assert names == {"early-rank1-seed0", "early-rank2-seed0", "early-rank2-seed0-shuffled"}
    # whoever completed the last cell reported
    assert (folder / "results.json").is_file()


def test_processes_that_claim_one_folder_at_once_all_go_on(settings, tmp_path, monkeypatch):
    """Whatever the others have written between one's look into the folder and its own writing."""
    import concurrent.futures
    import threading

    from tli.commands import study as module

    for turn in range(20):
        config, start = StudyConfig(**settings, output=str(tmp_path / str(turn))), threading.Barrier(4)

        def claim(_, config=config, start=start):
            start.wait()
            module._claim(pathlib.Path(config.output), config)
            module._write_lists(pathlib.Path(config.output), config, open_console())

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(claim, range(4))) == [None] * 4
        with pytest.raises(TliError, match="a study must go on as it was begun"):
            module._claim(pathlib.Path(config.output), dataclasses.replace(config, epochs=7))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(TliError, match="the folder must be new, empty or a study's"):
        module._claim(tmp_path / "other", config)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_a_part_alone_leaves_the_rest_to_others(settings, tmp_path):
    flags = settings | {"output": str(tmp_path / "parts"), "arms": "early"}
    assert study(StudyConfig(**flags, cells="2/3")) == {"complete": 1, "cells": 3}
    assert [path.name for path in (tmp_path / "parts" / "cells").iterdir()] == ["early-rank2-seed0"]
    assert not (tmp_path / "parts" / "results.json").exists()
    # whatever is asked next, the complete cell stays
    before = contents(tmp_path / "parts" / "cells")
    assert "values" in study(StudyConfig(**flags))
    assert before.items() <= contents(tmp_path / "parts" / "cells").items()


def commands_with(text: str) -> list[str]:
    """The command lines of all processes that hold this text."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [line] if text in (line := path.read_text(errors="replace")) else []
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP], ids=str)
def test_a_killed_study_goes_on_to_the_same_numbers(settings, tmp_path, number):
    flags = settings | {"arms": "early", "epochs": 30, "ranks": "1"}
    whole = study(StudyConfig(**flags, output=str(tmp_path / "whole")))
    folder = tmp_path / "killed"
    begun = process(as_flags(flags | {"output": folder}), tmp_path)
    partial = folder / "cells" / ".early-rank1-seed0.partial"
    deadline = time.monotonic() + 120
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert commands_with(str(partial))
    begun.send_signal(number)
    assert begun.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    assert not (folder / "cells" / "early-rank1-seed0").exists()
    # the cell's own process is told to end; the next study goes on with what it left
    while commands_with(str(partial)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not commands_with(str(partial))
    results = study(StudyConfig(**flags, output=str(folder)))
    keys = ("value", "layer", "metric", "split", "when")
    assert [[v[key] for key in keys] for v in results["values"]] == [[v[key] for key in keys] for v in whole["values"]]
    assert sorted(path.name for path in (folder / "cells").iterdir()) == ["early-rank1-seed0", "early-rank2-seed0-shuffled"]


def test_ctrl_c_stops_the_cells_and_keeps_them(settings, tmp_path):
    folder = tmp_path / "stopped"
    begun = process(as_flags(settings | {"output": folder, "arms": "early", "epochs": 4000, "ranks": "1"}), tmp_path)
    log, steps = (folder / "cells" / f".early-rank1-seed0{name}" for name in (".log", ".partial/metrics.jsonl"))
    deadline = time.monotonic() + 120
    while not (steps.exists() and steps.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    assert begun.wait(timeout=60) == 130
    # the run was told, and left what it needs to go on
    assert "--resume goes on from here" in log.read_text().replace("\n", " ")
    assert (folder / "cells" / ".early-rank1-seed0.partial" / "training_state.safetensors").is_file()


def test_a_cell_that_fails_says_why_and_the_rest_is_kept(tmp_path):
    done = []
    good = Cell("good", {"pairs": None})
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "report.json").write_text('{"config": {"pairs": null}}')
    with pytest.raises(TliError, match="cell bad: its run must end well, got --model: .*nowhere"):
        run_cells([good, Cell("bad", {"model": str(tmp_path / "nowhere")})], tmp_path, 1, done.append)
    assert done == [good]
    assert (tmp_path / ".bad.log").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"ranks": "4,1"}, "--ranks: the ranks must be whole numbers from 1 on, ascending, each once, got '4,1'"),
        ({"ranks": "4,4"}, "each once, got '4,4'"),
        ({"ranks": "0,4"}, "from 1 on"),
        ({"ranks": "1,two"}, "whole numbers"),
        ({"ranks": "1,4096"}, "--ranks: the rank must be at most"),
        ({"arms": "early,late"}, "--arms: the arms must be early, full, or early,full"),
        ({"rates": "1e-3,-1"}, "--rates: the rates must be numbers above 0"),
        ({"cells": "3/2"}, "--cells: the part must be i/n with i from 1 to n"),
        ({"seeds": 0}, "--seeds: the number must be at least 1"),
        ({"layer": 9}, "--layer: the layer must be from 1 to 4"),
        ({"model": "no/where"}, "no/where"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(settings, tmp_path, capsys, monkeypatch, more, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "study"
    code, error = command([*as_flags(settings | more), f"--output={folder}"], capsys)
    assert (code, error.count("error: ")) == (2, 1)
    assert said in " ".join(error.split())
    assert "Traceback" not in error
    assert not folder.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"epochs": 2}, "epochs: a study must go on as it was begun, with 1, got 2"),
        ({"alpha_rule": "rslora"}, "alpha_rule: a study must go on as it was begun, with 2R, got rslora"),
        ({"pairs": None}, "pairs: a study must go on as it was begun"),
    ],
    ids=["settings", "rule", "list"],
)
def test_a_study_with_other_settings_is_refused(complete, settings, capsys, more, said):
    folder, before = complete[0], contents(complete[0])
    kept = {name: value for name, value in (settings | {"rates": "1e-4,1e-2", "arms": "early"} | more).items() if value is not None}
    code, error = command([*as_flags(kept), f"--output={folder}"], capsys)
    assert code == 2
    assert said in error
    assert contents(folder) == before


def test_a_study_of_another_version_is_refused(complete, settings, capsys, monkeypatch):
    folder, before = complete[0], contents(complete[0])
    monkeypatch.setattr(study_module.tli, "__version__", "9.9")
    code, error = command([*as_flags(settings), f"--output={folder}"], capsys)
    assert code == 2
    assert "version: a study must go on as it was begun, with" in error
    assert contents(folder) == before


def test_the_other_study_is_behind_its_name(tmp_path):
    # its options are its own, and so are its errors
    command = [sys.executable, "-m", "tli.study", "protocol", "--model", "./absent"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model: the model must be a folder or a hub name, got ./absent")
    helped = subprocess.run(
        [*command[:4], "--help"], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert "one switch changed at a time" in " ".join(helped.stdout.split())
    assert "--ranks" not in helped.stdout


def test_a_folder_that_is_no_studys_is_refused(settings, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    code, error = command([*as_flags(settings), f"--output={tmp_path}"], capsys)
    assert code == 2
    assert "--output: the folder must be new, empty or a study's" in error
    assert contents(tmp_path).keys() == {"thesis.txt"}


def test_a_cell_with_other_options_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "report.json").write_text('{"config": {"rank": 8}}')
    with pytest.raises(TliError, match="the cell must have been run with rank 4, got 8"):
        Cell("cell", {"rank": 4}).report(tmp_path)
