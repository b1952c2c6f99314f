"""The record of a benchmark: what was measured, on which machine, with which versions; written once, never edited."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import re
import subprocess

import torch

import tli
from tli.config import TrainConfig
from tli.data import word_pairs
from tli.model import starter
from tli.model.checkpoint import open_checkpoint
from tli.runtime import cpu, environment
from tli.runtime.files import SCHEMA, sha256

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def machine() -> dict:
    """The facts of this machine and of what runs on it."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "sentence-transformers", "datasets", "numpy", "pytest-benchmark")
    return {
        "processor": cpu.name(),
        "cores": environment.cores(),
        "instructions": cpu.instructions(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": int(_first("/proc/meminfo", r"MemTotal:\s*(\d+) kB") or 0) * 1024,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"tli": tli.__version__, **{name: _version(name) for name in packages}},
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--", "tli", "kernels", "bench/*.py")),
    }


def material(config: TrainConfig) -> dict:
    """The model and the list that were used, by name and hash."""
    words = pathlib.Path(config.pairs or word_pairs.SHIPPED)
    checkpoint = open_checkpoint(config.model or str(starter.starter_folder()))
    return {
        "model": {"name": config.model or starter.NAME, "sha256": checkpoint.sha256(checkpoint.blocks)},
        "pairs": {
            "name": words.name,
            "sha256": sha256(words),
            "pairs": len(word_pairs.read_pairs(config.pairs, config.source, config.target)),
        },
    }


def write(kind: str, content: dict, folder: pathlib.Path = RESULTS) -> pathlib.Path:
    """Write ``content`` with today's date and the machine's facts to a new file in ``folder``, and return its path.

    A file that is there already is never touched: a second run of the day gets a number. Of the setting's absolute paths, which mean
    nothing elsewhere, the last part is kept.
    """
    facts = machine()
    content = content | {"setting": {name: _named(value) for name, value in content.get("setting", {}).items()}}
    date = datetime.date.today().isoformat()
    name = re.sub(r"[^a-z0-9]+", "-", facts["processor"].lower()).strip("-")
    stem = f"{date}-{kind}-{name}-{facts['cores']}-cores"
    text = json.dumps({"schema": SCHEMA, "date": date, "kind": kind, "machine": facts, **content}, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(folder / stem)


def _named(value):
    return pathlib.Path(value).name if isinstance(value, str) and pathlib.Path(value).is_absolute() else value


def _first(path: str, pattern: str) -> str | None:
    file = pathlib.Path(path)
    found = re.search(pattern, file.read_text()) if file.exists() else None
    return found[1].strip() if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
