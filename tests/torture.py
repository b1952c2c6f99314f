"""``python -m tests.torture --minutes 10``: mutated files to every reader, and random kills of a training, for as long as one likes.

    files   a run's whole surroundings are made (model, list, adapter, report, map, state); one file at a time is mutated: bits,
            ranges, words, and, knowing their forms, JSON values and headers of safetensors. A reader may take the file, or refuse it
            with one ``TliError``; a traceback, five seconds or much memory are faults
    kills   a training is killed at random moments and resumed: its adapter must have the bytes of one that was not

A table says what was tried and what was found; what failed stays in ``--keep``, a folder for each, to be tried again. Exit code 1 where
anything did. The mutations are functions of ``--seed`` and a number.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parent.parent
_MOST_S, _MOST_BYTES = 5.0, 512 << 20
# what a value of a JSON file is replaced by
_ODD = [None, True, -1, 0, 1, 3, 10**9, 10**30, -0.5, 1e300, float("nan"), "", "x", "../../etc/passwd", "[red]", "\x1b[31m",
        [], [[]], [1, 2], {}, {"a": 1}, "A" * 5000]  # fmt: skip
_WORDS = [
    b"\0",
    b"\xff\xfe",
    b"\t",
    b"\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"null",
    b"NaN",
    b"-1",
    b"99999999999999999999",
    b"\xe9",
    b"<",
    b"&",
]


@dataclasses.dataclass
class Reader:
    """A file that is mutated, and what reads it.

    file   relative to the surroundings, which are a fresh copy each time
    read   is given the surroundings' folder
    """

    name: str
    file: str
    read: Callable[[pathlib.Path], object]


@dataclasses.dataclass
class Outcome:
    """What came of a reader's files."""

    taken: int = 0
    refused: int = 0
    faults: int = 0
    slowest_s: float = 0.0


class TooSlow(BaseException):
    """Past every ``except Exception``."""


def surroundings(folder: pathlib.Path) -> None:
    """A small model, a list, an adapter with its report and map, and the state of a run that was stopped."""
    from tests.support import small_models
    from tli import TrainConfig, train
    from tli.commands import train as train_module
    from tli.data.word_pairs import SHIPPED

    small_models.save(folder / "model", "llama", small_models.tokenizer())
    rows = SHIPPED.read_text(encoding="utf-8").splitlines()[:61]
    (folder / "list.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    pairs = [row.split("\t")[:2] for row in rows[1:]]
    (folder / "list.jsonl").write_text("\n".join(json.dumps({"swahili": source, "english": target}) for source, target in pairs))
    (folder / "list.json").write_text(json.dumps([{"swahili": source, "english": target} for source, target in pairs], indent=1))
    units = "".join(f'<tu><tuv xml:lang="sw"><seg>{s}</seg></tuv><tuv xml:lang="en"><seg>{t}</seg></tuv></tu>' for s, t in pairs)
    (folder / "list.tmx").write_text(f"<tmx><body>{units}</body></tmx>")
    (folder / "table.csv").write_text("before,after\n" + "".join(f"{i / 7:.3f},{i / 5:.3f}\n" for i in range(30)))
    (folder / "text.txt").write_text("habari za leo ni njema sana " * 20)
    options = {
        "model": str(folder / "model"),
        "pairs": str(folder / "list.tsv"),
        "keep_weight": 0.0,
        "epochs": 2,
        "batch": 16,
        "layer": 2,
        "rank": 2,
    }
    train(TrainConfig(**options, output=str(folder / "adapter")))

    def stopped(*arguments, **named):
        raise KeyboardInterrupt

    kept, train_module._fit_map = train_module._fit_map, stopped
    with contextlib.suppress(KeyboardInterrupt):
        train(TrainConfig(**options, output=str(folder / "stopped"), no_report=True))
    train_module._fit_map = kept
    (folder / "cache").mkdir()


def readers() -> list[Reader]:
    """Every file that somebody else may have written, and what reads it."""
    import numpy as np
    import torch

    from tli.commands.grid import claim_folder
    from tli.data.word_pairs import read_pairs
    from tli.model.checkpoint import open_checkpoint
    from tli.model.decoder import init_empty_decoder, load_truncated_decoder
    from tli.model.linear_map import load_map
    from tli.model.text_windows import read_windows
    from tli.model.trained_adapter import check_compatible, load_adapter
    from tli.runtime import cpu, ops
    from tli.runtime.device import resolve_device
    from tli.stats.paired_table import compare_table, read_table
    from tli.training.run_logger import JsonlLogger
    from tli.training.state import TrainingState

    device = resolve_device("cpu", "float32")

    def model(folder: pathlib.Path) -> object:
        checkpoint = open_checkpoint(str(folder / "model"))
        load_truncated_decoder(checkpoint, 2, np.arange(4), device)
        return init_empty_decoder(checkpoint, checkpoint.blocks, np.zeros(1, np.int64), device), checkpoint.tokenizer()

    def adapter(folder: pathlib.Path) -> None:
        found = load_adapter(folder / "adapter")
        found.facts(), found.layer, found.option("arm", "early"), found.model_name()
        checkpoint = open_checkpoint(str(folder / "model"))
        check_compatible(found, checkpoint, device, checkpoint.sha256)

    def state(folder: pathlib.Path) -> None:
        from tli.model import lora

        decoder = load_truncated_decoder(open_checkpoint(str(folder / "model")), 2, np.arange(4), device)
        lora.inject(decoder, lora.LoRAConfig(rank=2, alpha=4.0))
        kept = TrainingState.__new__(TrainingState)
        kept.path = folder / "stopped" / "training_state.safetensors"
        # whatever it says it is of
        with contextlib.suppress(Exception):
            from safetensors import safe_open

            with safe_open(kept.path, framework="pt") as file:
                kept.fingerprints = {"options": file.metadata()["options"]}
        kept.fingerprints = getattr(kept, "fingerprints", {"options": ""})
        kept.begun_with()
        parameters = [p for p in decoder.parameters() if p.requires_grad]
        kept.restore(lora.adapters(decoder), torch.optim.AdamW(parameters))

    measured = cpu.ways()
    # which takes seconds, and reads nothing
    cpu.measure = lambda: measured

    def processor(folder: pathlib.Path) -> None:
        os.environ["TLI_CACHE"] = str(folder / "cache")
        cpu._known.clear()
        cpu.ways()

    def tuned(folder: pathlib.Path) -> None:
        os.environ["TLI_CACHE"] = str(folder / "cache")
        ops._dispatch(torch.device("cpu"))

    def pairs(name: str) -> Callable[[pathlib.Path], object]:
        return lambda folder: list(read_pairs(folder / name, "swahili", "english"))

    settings = {"a": 1, "b": {"c": 2}}
    found = [Reader(f"a list, {name}", name, pairs(name)) for name in ("list.tsv", "list.jsonl", "list.json", "list.tmx")]
    found += [
        Reader(f"a model's {name}", f"model/{name}", model)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    names = ("adapter_config.json", "adapter_model.safetensors", "report.json", "map.json", "map.safetensors")
    found += [Reader(f"an adapter's {name}", f"adapter/{name}", adapter) for name in names]
    return [
        *found,
        Reader("a map", "adapter/map.json", lambda folder: load_map(folder / "adapter")),
        Reader("a run's state", "stopped/training_state.safetensors", state),
        Reader("a run's log", "stopped/metrics.jsonl", lambda folder: JsonlLogger(folder / "stopped" / "metrics.jsonl", 3).close()),
        Reader("a table of figures", "table.csv", lambda folder: compare_table(read_table(folder / "table.csv", "before", "after"))),
        Reader("a text", "text.txt", lambda folder: read_windows(folder / "text.txt", open_checkpoint(str(folder / "model")))),
        Reader("the processor's measurement", "cache/processor.json", processor),
        Reader("tune's measurement", "cache/tune.json", tuned),
        Reader(
            "a study's settings",
            "study/study.json",
            lambda folder: claim_folder(folder / "study", "study.json", "study", settings),
        ),
    ]


def mutated(content: bytes, name: str, chance: random.Random) -> bytes:
    """The file with one to four mutations."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        way = chance.random()
        if name.endswith(".json") and way < 0.6:
            with contextlib.suppress(ValueError, RecursionError):
                content = json.dumps(_changed(json.loads(content), chance)).encode()
                continue
        if name.endswith(".safetensors") and way < 0.5 and len(content) > 8:
            content = _changed_header(content, chance)
            continue
        content = _changed_bytes(content, chance)
    return content


def _changed(value, chance: random.Random):
    """JSON values with one of them, anywhere, changed, gone, doubled or nested."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        if chance.random() < 0.15:
            del value[key]
        else:
            value[key] = _changed(value[key], chance)
        return value
    if chance.random() < 0.03:
        deep = 5
        for _ in range(5000):
            deep = [deep]
        return deep
    return chance.choice(_ODD)


def _changed_header(content: bytes, chance: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    with contextlib.suppress(ValueError, RecursionError):
        header = json.dumps(_changed(json.loads(content[8 : 8 + length]), chance)).encode()
        said = chance.choice((len(header), len(header), len(header), 0, 1 << 62, len(header) + 1))
        return struct.pack("<Q", said) + header + content[8 + length :]
    return _changed_bytes(content, chance)


def _changed_bytes(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    end = min(len(content), start + chance.choice((1, 1, 2, 8, 64, 1000)))
    way = chance.randrange(6)
    if way == 0 and content:
        place = chance.randrange(len(content))
        return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]
    middle = {1: b"", 2: content[start:end] * 2, 3: chance.choice(_WORDS), 4: bytes(end - start)}.get(way)
    # the rest is lost
    return content[:start] if middle is None else content[:start] + middle + content[end:]


def try_one(reader: Reader, folder: pathlib.Path) -> tuple[str, str, float]:
    """taken, refused or fault; what was said; seconds."""
    from tli.runtime.errors import TliError

    def late(*_):
        raise TooSlow

    signal.signal(signal.SIGALRM, late)
    began, said, result = time.monotonic(), "", "taken"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, 2 * _MOST_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            reader.read(folder)
    except TliError as error:
        result, said = "refused", str(error)
        if "\n" in said:
            result = "fault"
    except TooSlow:
        result, said = "fault", f"more than {2 * _MOST_S:.0f} s\n{traceback.format_exc()}"
    except BaseException:
        result, said = "fault", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if result != "fault" and (seconds > _MOST_S or grown > _MOST_BYTES):
        result, said = "fault", f"{seconds:.1f} s, {grown / 1e6:.0f} MB\n{said}"
    return result, said, seconds


def fuzz(seconds: float, seed: int, keep: pathlib.Path, only: str) -> dict[str, Outcome]:
    """Mutated files to the readers by turns, until the time is up; every reader has at least one."""
    outcomes: dict[str, Outcome] = collections.defaultdict(Outcome)
    met: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory() as place:
        made = pathlib.Path(place) / "made"
        made.mkdir()
        surroundings(made)
        # the model's own place is in the report
        readable = [reader for reader in readers() if only in reader.name]
        for reader in readable:
            _first(made, reader)
        originals = {reader.file: (made / reader.file).read_bytes() for reader in readable}
        ends = time.monotonic() + seconds
        for number in itertools.count():
            reader = readable[number % len(readable)]
            if time.monotonic() > ends and number >= len(readable):
                break
            content = mutated(originals[reader.file], reader.file, random.Random(f"{seed} {number}"))
            (made / reader.file).write_bytes(content)
            result, said, taken_s = try_one(reader, made)
            outcome = outcomes[reader.name]
            outcome.taken += result == "taken"
            outcome.refused += result == "refused"
            outcome.faults += result == "fault"
            outcome.slowest_s = max(outcome.slowest_s, taken_s)
            if result == "fault":
                kind = said.strip().splitlines()[-1][:60]
                if (reader.name, kind) not in met:
                    met.add((reader.name, kind))
                    folder = keep / f"{number}-{pathlib.PurePath(reader.file).name}"
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / pathlib.PurePath(reader.file).name).write_bytes(content)
                    (folder / "said.txt").write_text(f"{reader.name}\n{said}")
                    print(f"fault: {reader.name}: {kind} (kept in {folder})", flush=True)
            (made / reader.file).write_bytes(originals[reader.file])
    return outcomes


def _first(made: pathlib.Path, reader: Reader) -> None:
    """What is written by the reading itself is there before it is mutated."""
    path = made / reader.file
    path.parent.mkdir(exist_ok=True)
    if path.name == "tune.json":
        path.write_text(json.dumps({"interpreter, triton 3, torch 2": {"decode_rows": 16, "fused_rows": 64}}))
    result, said, _ = try_one(reader, made)
    if result != "taken" or not path.is_file():
        raise SystemExit(f"{reader.name}: the file as it is must be taken, got {result}: {said}")


def kills(seconds: float, seed: int, keep: pathlib.Path) -> Outcome:
    """A training that is killed at random moments until it ends must leave the bytes of one that was not."""
    outcome, chance = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        surroundings(folder)
        # saved after each step, so that a kill comes in a save as likely as elsewhere
        code = "import runpy, sys; from tli.training import loop; loop._SAVE_EVERY_S = 0.0; sys.argv[0] = 'tli.train'; "
        command = [sys.executable, "-c", code + "runpy.run_module('tli.train', run_name='__main__')", f"--model={folder / 'model'}"]
        command += [f"--pairs={folder / 'list.tsv'}", "--keep-weight=0", "--epochs=60", "--batch=16", "--layer=2", "--rank=2"]
        command += ["--no-report", "--dtype=float32"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TLI_CACHE": str(folder / "cache")}

        def run(output: str, kill_after_s: float | None) -> int:
            flags = [f"--output={folder / output}", "--resume", "--overwrite"]
            process = subprocess.Popen([*command, *flags], env=environment, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
            try:
                process.communicate(timeout=kill_after_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
            return process.returncode

        began = time.monotonic()
        assert run("whole", None) == 0
        whole_s = time.monotonic() - began
        whole = (folder / "whole" / "adapter_model.safetensors").read_bytes()
        ends = time.monotonic() + seconds
        while time.monotonic() < ends or outcome.taken + outcome.faults == 0:
            shutil.rmtree(folder / "killed", ignore_errors=True)
            code = -signal.SIGKILL
            while code == -signal.SIGKILL:
                code = run("killed", chance.uniform(0.4, 0.9) * whole_s)
                # of this outcome: kills
                outcome.refused += code == -signal.SIGKILL
            file = folder / "killed" / "adapter_model.safetensors"
            litter = [path.name for path in (folder / "killed").glob(".*")] if file.parent.is_dir() else []
            good = code == 0 and file.is_file() and file.read_bytes() == whole and not litter
            outcome.taken, outcome.faults = outcome.taken + good, outcome.faults + (not good)
            if not good:
                print(f"fault: a run killed and resumed ended with {code}, other bytes or {litter}", flush=True)
                shutil.copytree(folder / "killed", keep / f"killed-{outcome.faults}", dirs_exist_ok=True)
    return outcome


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("tests.torture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name holds this; kills: the kills alone")
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("runs") / "torture", help="where what failed is kept")
    options = parser.parse_args()
    seconds, rows = 60 * options.minutes, []
    faults = 0
    if options.only != "kills":
        outcomes = fuzz(seconds * (1.0 if options.only else 0.7), options.seed, options.keep, options.only)
        rows = [[name, o.taken + o.refused + o.faults, o.taken, o.refused, o.faults, f"{o.slowest_s:.2f}"] for name, o in outcomes.items()]
        faults += sum(o.faults for o in outcomes.values())
    print(f"{'reader':34} {'files':>7} {'taken':>7} {'refused':>8} {'faults':>7} {'slowest s':>9}")
    for name, *numbers in rows:
        print(f"{name:34} " + " ".join(f"{number:>{width}}" for number, width in zip(numbers, (7, 7, 8, 7, 9))))
    if options.only in ("", "kills"):
        found = kills(seconds * (0.3 if not options.only else 1.0), options.seed, options.keep)
        print(f"{found.refused} kills in {found.taken + found.faults} runs: {found.faults} with other bytes, litter or an error")
        faults += found.faults
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
