"""``tli``, one name for every command: what it runs, what it says, and that several processes of one run are refused."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import tli
from tli.__main__ import COMMANDS
from tli.config import ProtocolConfig, TrainConfig
from tli.runtime.cli import parse

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
    assert all(f"\n {command} " in shown for command in COMMANDS)
    wrong = run("tli", "trian")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith('error: tli: the command line must be valid, got Unknown command "trian". Did you mean "train"?')


def test_the_installed_command_is_named_tli(tmp_path):
    script = tmp_path / "tli"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tli.__main__ import command; command()")
    done = subprocess.run([sys.executable, script, "memory", "--help"], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("Usage: tli memory [OPTIONS]")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_and_their_flags(shell, tmp_path):
    done = run("tli", "--completion", shell)
    assert done.returncode == 0
    assert all(word in done.stdout for word in (*COMMANDS, "protocol", "held-out", "full-hook"))
    # the script is one that its shell can read, where that shell is here
    if shutil.which(shell):
        (tmp_path / "script").write_text(done.stdout)
        assert subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True).returncode == 0
    assert run("tli", "--completion", "cmd").returncode == 2


GIVEN = {
    "train": ["--recipe=paper", "--layer=auto", "--prefix=", "--alpha=5", "--micro-batch=4", "--overwrite", "--no-pool-bos"],
    "map": ["--layer=output", "--split=words", "--seed=4"],
    "scan": ["--adapter=somewhere", "--sample=12", "--recipe=paper"],
    "evaluate": ["one", "two", "--layers=all", "--margin=0.1", "--seed=3", "--prefix= "],
    "study": ["--ranks=1,2", "--rates=1e-3", "--cells=1/4"],
    "study protocol": ["--epochs=2", "--pairs=näher.tsv"],
    "export": ["an adapter", "merged", "--dtype=float16"],
    "memory": ["--arm=full", "--batch=12"],
    "tune": ["--like=qwen3-4b"],
    "lexicon": ["check", "--source=shona"],
    "starter": [],
}
CONFIGS = COMMANDS | {"study protocol": ProtocolConfig}


@pytest.mark.parametrize("command", CONFIGS)
def test_what_print_config_prints_is_read_back(command, tmp_path, capsys):
    module, flags = f"tli.{command}", GIVEN[command]
    with pytest.raises(SystemExit) as left:
        parse(CONFIGS[command], module, [*flags, "--print-config"])
    assert left.value.code == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert parse(CONFIGS[command], module, [f"--config={tmp_path / 'run.yaml'}"]) == parse(CONFIGS[command], module, flags)


def test_what_follows_from_other_options_follows_them_beside_the_file_too(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, "tli.train", ["--recipe=paper", "--print-config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    changed = parse(TrainConfig, "tli.train", [f"--config={tmp_path / 'run.yaml'}", "--rank=4", "--layer=3"])
    assert changed == TrainConfig(recipe="paper", rank=4, layer=3)
    assert (changed.alpha, changed.output) == (8.0, "runs/paper-layer3-rank4-seed0")


@pytest.mark.parametrize("flags", [["--rank=3", "--rank=5"], ["--rank", "3", "--arm=full", "--rank", "5", "--arm=early"]])
def test_of_a_repeated_flag_the_last_counts(flags):
    assert parse(TrainConfig, "tli.train", flags) == TrainConfig(rank=5)


@pytest.mark.parametrize("name", ["run.yaml", "run.toml"])
def test_flags_win_over_the_file_wherever_they_stand(name, tmp_path):
    rows = {"rank": 8, "held_out": 0.25, "overwrite": True, "recipe": '"paper"', "layer": '"auto"'}
    sign = ": " if name == "run.yaml" else " = "
    (tmp_path / name).write_text("".join(f"{key}{sign}{str(value).lower()}\n" for key, value in rows.items()))
    file = ["--config", str(tmp_path / name)]
    expected = TrainConfig(rank=8, held_out=0.25, overwrite=True, recipe="paper", layer="auto")
    assert parse(TrainConfig, "tli.train", file) == expected
    expected = dataclasses.replace(expected, rank=4, alpha=8.0, output=None, overwrite=False)
    for flags in (["--rank=4", "--no-overwrite", *file], [*file, "--rank", "4", "--no-overwrite"]):
        assert parse(TrainConfig, "tli.train", flags) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnak: 3", 'Unknown option: "[rnak]" from {file}'),
        ("rank: many", 'Invalid value for [rank] from {file}: unable to convert "many" into int'),
        ("arm: late", "for [arm] from {file}"),
        ("rank: [1", "the file must be YAML or TOML of a command's options, got {file}: "),
        (None, "the file must be YAML or TOML of a command's options, got {file}: "),
    ],
)
def test_what_is_wrong_with_a_file_is_said_of_it(text, said, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as left:
        parse(TrainConfig, "tli.train", ["--config", str(file)])
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert said.format(file=file) in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "scan", "evaluate", "export", "memory"])
def test_several_processes_of_one_run_are_one_clear_error(command):
    adapter = ["adapter", "merged"][: {"evaluate": 1, "export": 2}.get(command, 0)]
    done = run(f"tli.{command}", *adapter, RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr == f"error: tli.{command}: one process must do this, got torchrun's WORLD_SIZE 2; run it without torchrun\n"


def test_torchrun_itself_is_told_so(tmp_path):
    done = run("torch.distributed.run", "--nproc-per-node=2", "-m", "tli.train", f"--output={tmp_path / 'out'}")
    assert done.returncode != 0
    # the first to leave takes the other with it, which may or may not have said so, too
    assert "error: tli.train: one process must do this, got torchrun's WORLD_SIZE 2; run it without torchrun" in done.stderr
    assert not (tmp_path / "out").exists()
