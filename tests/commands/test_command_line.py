"""``tli``, one name for every command: what it runs, what it says, and that several processes of one run are refused."""

import os
import pathlib
import subprocess
import sys

import pytest

import tli
from tli.__main__ import COMMANDS

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(tli.__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help_under_both_names(command):
    under_one, own = run("tli", command, "--help"), run(f"tli.{command}", "--help")
    assert under_one.returncode == own.returncode == 0
    assert under_one.stdout == own.stdout
    assert "--help" in own.stdout


def test_the_commands_are_the_thin_modules():
    files = {path.stem for path in (ROOT / "tli").glob("*.py")} - {"__init__", "__main__", "config"}
    assert files == set(COMMANDS)


def test_what_tli_says_of_itself():
    assert run("tli", "--version").stdout == run("tli.train", "--version").stdout == f"tli {tli.__version__}\n"
    shown = run("tli").stdout
    assert shown == run("tli", "--help").stdout
    assert all(command in shown for command in COMMANDS)
    wrong = run("tli", "trian")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: tli: the command must be one of train, scan, ")
    assert "got 'trian'; see tli --help" in wrong.stderr


def test_the_installed_command_is_named_tli(tmp_path):
    script = tmp_path / "tli"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tli.__main__ import command; command()")
    done = subprocess.run([sys.executable, script, "memory", "--help"], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("usage: tli memory [options]")


@pytest.mark.parametrize("command", ["train", "scan", "evaluate", "export", "memory"])
def test_several_processes_of_one_run_are_one_clear_error(command):
    adapter = ["adapter", "merged"][: {"evaluate": 1, "export": 2}.get(command, 0)]
    done = run(f"tli.{command}", *adapter, RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr == f"error: tli.{command}: one process must do this, got torchrun's WORLD_SIZE 2; run it without torchrun\n"


def test_torchrun_itself_is_told_so(tmp_path):
    done = run("torch.distributed.run", "--nproc-per-node=2", "-m", "tli.train", f"--output={tmp_path / 'out'}")
    assert done.returncode != 0
    assert done.stderr.count("error: tli.train: one process must do this, got torchrun's WORLD_SIZE 2; run it without torchrun") == 2
    assert not (tmp_path / "out").exists()
