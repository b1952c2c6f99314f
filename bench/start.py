"""``python -m bench.start [FOLDER]``: how soon a run begins, and what it reads of the checkpoint for that. Linux.

Seconds go from the shell to the end of the first optimiser step, with the page cache warm: of ``tli.train`` on the starter, of its
``--help``, and, with FOLDER (what ``python -m bench.synthetic --like llama-3-8b --blocks 0 FOLDER`` writes), of ``tli.train`` and of
``bench/peers/peft_truncated.py`` on that checkpoint, in turns and in random order, the script in each dtype that is timed.

Bytes read are those of the checkpoint's shards that are in the page cache afterwards, counted by ``mincore``, when the kernel was
told to drop them all before (``posix_fadvise``): whatever a run reads or maps and touches, and what the kernel read ahead on its
behalf. What was needed is counted apart from tli: the tensors of the first L blocks and the final norm by the files' own headers, and
one row of the embedding for each distinct token of the words.
"""

import ctypes
import dataclasses
import json
import mmap
import os
import pathlib
import statistics
import struct
import tempfile

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import record
from bench.command import CommandConfig, command, tli_train, write_lists
from bench.harness import dtypes, goal, goals_table, ratios, results_option, run, turns
from tli.data import word_pairs
from tli.runtime.cli import as_dict, option, parse
from tli.runtime.errors import TliError, run_command


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Time runs from the shell to their first step, and count the bytes that they read of a large checkpoint."""

    model: str | None = option(None, "bench", "folder of a large checkpoint with all its shards (default: the starter alone)")
    runs: int = option(5, "bench", "timed starts of each")
    batch: int = option(64, "bench", "pairs of the step on the large checkpoint")
    layer: int = option(2, "bench", "hidden state to align")
    rank: int = option(16, "bench", "LoRA rank")
    results: str = results_option()


def starter(config: StartConfig) -> dict:
    """Seconds from the command to the end of its first optimiser step on the starter, and of ``--help``: medians."""
    with tempfile.TemporaryDirectory() as folder:

        def first_step(number: int) -> float:
            flags = ["--no-report", "--epochs=1", "--json", f"--layer={config.layer}", f"--rank={config.rank}"]
            done = tli_train([*flags, f"--output={folder}/{number}"])
            return done.said["training"]["first_step_at"] - done.began

        # the first of each warms the page cache
        first_steps = [first_step(number) for number in range(config.runs + 1)][1:]
        helps = [tli_train(["--help"]).seconds for _ in range(config.runs + 1)][1:]
    return {
        "first_step_seconds": statistics.median(first_steps),
        "help_seconds": statistics.median(helps),
        "first_step_runs": first_steps,
        "help_runs": helps,
    }


def large(config: StartConfig, console: Console) -> dict:
    """On the large checkpoint: seconds to the first step of tli and of the script, and the bytes that each reads."""
    model = pathlib.Path(config.model).expanduser()
    one_step = CommandConfig(model=str(model), epochs=1, batch=config.batch, layer=config.layer, rank=config.rank, dropout=0.0, warmup=0)
    with tempfile.TemporaryDirectory() as folder:
        lists = write_lists(word_pairs.read_pairs(None, "swahili", "english"), pathlib.Path(folder), config.batch, config.batch)
        keys = [("tli", None), *(("peft-truncated", dtype) for dtype in dtypes("cpu"))]

        def once(key: tuple[str, str | None], number: int) -> tuple[float, int]:
            done = run(key[0], command(*key, one_step, str(model), lists, f"{folder}/{key[0]}-{key[1]}-{number}"))
            at = (done.said["training"] if key[0] == "tli" else done.said)["first_step_at"]
            console.print(f"{key[0]} {key[1] or ''}: {at - done.began:.1f} s")
            return at - done.began, done.peak_bytes

        rows = {}
        for key in keys:
            forget(model)
            cold, peak = once(key, -1)
            rows[key] = {
                "subject": key[0],
                "dtype": key[1],
                "cold_seconds": cold,
                "peak_bytes": peak,
                "bytes_read": cached(model),
                "runs": [],
            }
        # the peer's read more than tli's do
        for number, key in turns(keys, config.runs):
            rows[key]["runs"].append(once(key, number)[0])
        needed = needed_bytes(
            model, config.layer, [pair for path in lists for pair in word_pairs.read_pairs(str(path), "source", "target")]
        )
    own = rows["tli", None]
    for row in rows.values():
        row |= {"seconds": statistics.median(row["runs"]), "ratio": ratios(row["runs"], own["runs"])["ratio"]}
        row["times_needed"] = row["bytes_read"] / needed
    return {"needed_bytes": needed, "rows": list(rows.values())}


def shards(model: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoint's files of tensors."""
    return sorted(model.glob("*.safetensors"))


def forget(model: pathlib.Path) -> None:
    """Have the kernel drop the shards' pages from its cache.

    Raises:
        TliError: more than a hundredth of them stayed, as when another process has them mapped.
    """
    for path in shards(model):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size = sum(path.stat().st_size for path in shards(model))
    if (stayed := cached(model)) > size / 100:
        raise TliError(model, "the kernel must drop the shards from its cache", f"{stayed:,} bytes that stayed", "end what uses them")


def cached(model: pathlib.Path) -> int:
    """How many bytes of the shards are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    pages = 0
    for path in shards(model):
        size = path.stat().st_size
        resident = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        with path.open("rb") as file:
            address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
            failed = libc.mincore(address, size, resident.ctypes.data)
            libc.munmap(address, size)
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        pages += int((resident & 1).sum())
    return pages * mmap.PAGESIZE


def needed_bytes(model: pathlib.Path, layer: int, pairs: list[word_pairs.Pair]) -> int:
    """Bytes of the tensors that a run up to ``layer`` cannot do without: blocks, final norm, and a row for each distinct token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    words = tokenizer([" " + word for pair in pairs for word in (pair.source, pair.target)], add_special_tokens=False)["input_ids"]
    rows = len({tokenizer.bos_token_id}.union(*words))
    wanted, total = ("model.norm.", *(f"model.layers.{index}." for index in range(layer))), 0
    for path in shards(model):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                if name.startswith(wanted):
                    total += end - begin
                elif name == "model.embed_tokens.weight":
                    total += rows * (end - begin) // tensor["shape"][0]
    return total


def goals(begun: dict, of_large: dict | None) -> list[dict]:
    """Each goal with what was got."""
    found = [
        ("seconds from the command to the first optimiser step on the starter, at most", 5, begun["first_step_seconds"], False),
        ("seconds of --help, at most", 0.5, begun["help_seconds"], False),
    ]
    if of_large is not None:
        tli, *peers = of_large["rows"]
        found.append(("times sooner at the first step than peft-truncated, at least", 3, min(row["ratio"] for row in peers), True))
        found.append(("times the needed tensors' bytes read, at most", 1.05, tli["times_needed"], False))
    return [goal(*each) for each in found]


def main() -> None:
    """The command."""
    config = parse(StartConfig, "bench.start")
    console, load = Console(width=120), {"before": os.getloadavg()}
    begun = starter(config)
    of_large = large(config, console) if config.model else None
    if of_large is not None:
        columns = ("subject", "dtype", "median s, warm", "times tli's", "s, cold", "read, MB", "times needed", "peak, MB")
        shown = Table(*columns, title=f"to the first step; needed: {of_large['needed_bytes'] / 1e6:,.0f} MB")
        for row in of_large["rows"]:
            sizes = [f"{row['bytes_read'] / 1e6:,.0f}", f"{row['times_needed']:.3f}", f"{row['peak_bytes'] / 1e6:,.0f}"]
            seconds = [f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['cold_seconds']:.1f}"]
            shown.add_row(row["subject"], row["dtype"] or "its own choice", *seconds, *sizes)
        console.print(shown)
    reached = goals(begun, of_large)
    console.print(goals_table(reached))
    load["after"] = os.getloadavg()
    content = {"setting": as_dict(config), "load_average": load, "starter": begun, "large": of_large, "goals": reached}
    console.print("written:", str(record.write("start", content, pathlib.Path(config.results))))


if __name__ == "__main__":
    run_command(main)
