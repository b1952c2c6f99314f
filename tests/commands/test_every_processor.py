"""Every command in its default settings as other processors would run it, each kind in a process of its own.

``ONEDNN_MAX_CPU_ISA`` and ``ATEN_CPU_CAPABILITY`` make oneDNN and torch do without the instructions of newer processors; what they then
refuse, an older processor refuses. Nothing is patched but what a kind of processor differs in.
"""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent.parent
# as such a processor's environment has it, and what must be done in the process before anything else
KINDS = {
    "this one": ({}, ""),
    "SSE4.1": ({"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}, ""),
    "AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, ""),
    "AVX-512 without bf16": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ""),
    "torch without AVX": ({"ATEN_CPU_CAPABILITY": "default"}, ""),
    "oneDNN switched off": ({}, "import torch; torch.backends.mkldnn.set_flags(False)"),
}
THREADS = {
    "one thread": ({"OMP_NUM_THREADS": "1"}, ""),
    "more threads than cores": ({"OMP_NUM_THREADS": "7"}, "import torch; torch.set_num_threads(7)"),
    "OMP_NUM_THREADS=0": ({"OMP_NUM_THREADS": "0"}, ""),
}
READMES = ["tli.train", "--rank", "16", "--layer", "2"]
# the small model is one that NF4 can round
SIZES = {"hidden_size": 64, "intermediate_size": 128}
RUN_ALL = """
import json, runpy, sys
for module, *flags in json.loads(sys.argv[1]):
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__")
"""


def run(kind: str, folder: pathlib.Path, *commands: list[str]) -> str:
    """The commands, one after the other in a new process on such a processor; what they said."""
    variables, first = (KINDS | THREADS)[kind]
    done = start(folder, variables, first, *commands)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def start(folder: pathlib.Path, variables: dict[str, str], first: str, *commands: list[str]) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "ONEDNN_", "ATEN_", "TRITON_"))}
    environment |= {"PYTHONPATH": str(ROOT), "TLI_CACHE": str(folder / "cache"), "COLUMNS": "400", **variables}
    return subprocess.run(
        [sys.executable, "-c", f"{first}\n{RUN_ALL}", json.dumps(commands)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=800,
        stdin=subprocess.DEVNULL,
    )


# what other systems and other boards lack: Windows, a Mac, an Arm board
HIDE = """
import builtins, os, sys
for name in ("bitsandbytes", "gguf", "triton"):
    sys.modules[name] = None
imported = builtins.__import__

def without(name, globals=None, locals=None, fromlist=(), level=0):
    # from our own modules alone: other packages ask what system this is
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").partition(".")[0] in ("tli", "tli_kernels", "__main__"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return imported(name, globals, locals, fromlist, level)

builtins.__import__ = without
del os.sched_getaffinity
"""


def report(folder: pathlib.Path, name: str = "report.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_runs_on_every_processor(kind, make_model, word_list, tmp_path):
    model, few = f"--model={make_model('llama', **SIZES)}", ["--rank=4", "--batch=14", "--epochs=4", "--warmup=2"]
    words = f"--pairs={word_list}"
    said = run(
        kind,
        tmp_path,
        ["tli.train", model, words, *few, "--output=default"],
        ["tli.train", model, words, *few, "--output=exact", "--dtype=float32"],
        ["tli.train", model, words, "--rank=4", "--epochs=1", "--recipe=paper", "--output=paper"],
        ["tli.train", model, words, *few, "--output=half", "--dtype=float16", "--no-report", "--weights=nf4"],
        ["tli.scan", model, words, "--output=scan"],
        ["tli.evaluate", "default", "--output=evaluation"],
        ["bench.step", model, words, "--batches=12", "--rounds=1", "--rank=4", "--subjects=tli,peft-truncated", "--results=bench"],
    )
    assert "reference ops, linear layers " in said
    default, exact, paper = (report(tmp_path / name) for name in ("default", "exact", "paper"))
    for run_report in (default, exact, paper):
        assert all(math.isfinite(row["value"]) for row in run_report["measurements"] if row["value"] is not None)
    assert default["training"]["loss_last"] < default["training"]["loss_first"]
    # whatever dtype this processor is the fastest in, the run is the same run
    for loss in ("loss_first", "loss_last"):
        assert default["training"][loss] == pytest.approx(exact["training"][loss], rel=0.02)
    assert default["machine"]["measured_in"] == "float32"
    assert paper["machine"]["dtype"] == "bfloat16"
    if kind == "oneDNN switched off":
        assert "oneDNN" not in exact["machine"]["matmul"]
        assert exact["machine"]["instructions"].endswith("oneDNN off")
    (record,) = (tmp_path / "bench").glob("*.json")
    assert {row["subject"] for row in json.loads(record.read_text())["step"]} >= {"tli", "peft-truncated"}


@pytest.mark.parametrize("kind", THREADS)
def test_training_runs_with_any_number_of_threads(kind, make_model, word_list, tmp_path):
    model, few = f"--model={make_model('llama', **SIZES)}", ["--rank=4", "--batch=14", "--epochs=4", "--warmup=2", "--no-report"]
    run(kind, tmp_path, ["tli.train", model, f"--pairs={word_list}", *few, "--output=default", "--json"])
    assert (tmp_path / "default" / "adapter_model.safetensors").is_file()


@pytest.mark.timeout(900)
def test_the_readmes_own_line_learns_on_the_starter(starter, tmp_path):
    (tmp_path / "cache").symlink_to(starter.parent)
    said = run("this one", tmp_path, [*READMES, "--epochs", "3"])
    facts = report(tmp_path / "runs/default-layer2-rank16-seed0")
    assert facts["config"]["dtype"] == "auto"
    assert facts["training"]["loss_last"] < facts["training"]["loss_first"] - 0.2
    before, after = (
        next(
            row["value"]
            for row in facts["measurements"]
            if (row["split"], row["when"], row["layer"], row["metric"]) == ("trained", when, 2, "mrr")
        )
        for when in ("before", "after")
    )
    assert after > 1.3 * before
    assert all(harm["after"][0]["perplexity_ratio"]["value"] < 1.5 for harm in facts["harm"])
    assert "Layer 2" in said


@pytest.mark.timeout(900)
def test_the_readmes_own_line_learns_on_an_older_processor(starter, tmp_path):
    (tmp_path / "cache").symlink_to(starter.parent)
    run("AVX2", tmp_path, [*READMES, "--epochs", "3", "--no-report"])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/default-layer2-rank16-seed0/metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) / 4 < losses[0] - 0.2
    assert (tmp_path / "runs/default-layer2-rank16-seed0/map.safetensors").is_file()


def test_what_needs_no_absent_module_works_without_it(make_model, word_list, tmp_path):
    model, words = f"--model={make_model('llama', **SIZES)}", f"--pairs={word_list}"
    few = ["--rank=4", "--batch=14", "--epochs=2"]
    done = start(
        tmp_path,
        {},
        HIDE,
        ["tli.train", model, words, *few, "--output=run"],
        ["tli.scan", model, words, "--output=scan"],
        ["tli.evaluate", "run", "--output=evaluation"],
        ["tli.export", "run", "merged"],
        ["tli.memory", model, words],
    )
    assert done.returncode == 0, done.stderr
    # Windows does not say it without another package
    assert report(tmp_path / "run")["training"]["peak_bytes"] is None or pathlib.Path("/proc/self/status").exists()


NEEDED = {
    "bitsandbytes": (["tli.train", "--weights=nf4", "--output=run"], "--weights: bitsandbytes must be installed to round weights to NF4"),
    "triton": (["tli.train", "--impl=fused", "--output=run"], "--impl: the fused ops must be able to run, got no triton on this machine"),
    "fcntl": (["tli.study", "--ranks=1", "--seeds=1", "--output=study"], "grid: this system must lock files that a process inherits"),
    "gguf": (["tli.train", "--output=run"], "starter model: gguf must be there to read it, got none in"),
}


@pytest.mark.parametrize("absent", NEEDED)
def test_what_needs_an_absent_module_says_so_in_one_line(absent, make_model, word_list, tmp_path):
    (module, *flags), message = NEEDED[absent]
    own = [] if absent == "gguf" else [f"--model={make_model('llama', **SIZES)}", f"--pairs={word_list}"]
    done = start(tmp_path, {}, HIDE, [module, *own, *flags])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {message}")
