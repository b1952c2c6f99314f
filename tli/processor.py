"""What the processor is good at: as many threads as it may run, and the dtype in which it multiplies fastest, measured."""

import contextlib
import json
import os
import pathlib
import platform
import time

import torch

from tli import ops
from tli.errors import TliError
from tli.files import cache_folder, write_text

# of what a container may use: version 2 of control groups, and version 1
_QUOTAS = (pathlib.Path("/sys/fs/cgroup/cpu.max"), pathlib.Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
# bf16 costs precision, and what lies between the products does not gain: it must be faster than by a little
_FASTER = 1.4
_ROWS, _WIDTH = 256, 1024


def name() -> str:
    """The processor's name."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def limit_threads() -> int:
    """Let torch have no more threads than the container's quota of processors; returns how many it has.

    Without a quota torch takes the processor's cores, which is right. Twenty threads on two processors wait for one another. What
    OMP_NUM_THREADS says is left alone.
    """
    quota = _quota()
    if quota is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), round(quota))))
    return torch.get_num_threads()


def _quota() -> float | None:
    for file in _QUOTAS:
        try:
            quota, *period = file.read_text().split()
            period = period or (file.parent / "cpu.cfs_period_us").read_text().split()
            return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period[0])
        except (OSError, ValueError):
            continue
    return None


def keep_few_programs() -> None:
    """Have oneDNN keep the programs of a few steps' products, not of 1,024: it makes one for each number of nodes that a batch can have.

    Else they grow with a run's steps. With half as many as these a step takes 8 % longer. To be called before the first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def fastest_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it at least 1.4 times as fast as float32, else float32.

    Measured once for a processor and a version of torch, and kept: a run that goes on tomorrow must multiply as it did today.
    """
    file, key = cache_folder() / "processor.json", f"{name()}, torch {torch.__version__}"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if known.get(key) not in ("float32", "bfloat16"):
        seconds = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
        faster = seconds[torch.float32] >= _FASTER * seconds[torch.bfloat16]
        known[key] = "bfloat16" if faster else "float32"
        # where the cache cannot be written, the next run measures again
        with contextlib.suppress(TliError, OSError):
            write_text(file, json.dumps(known, indent=1) + "\n")
    return getattr(torch, known[key])


def _product_seconds(dtype: torch.dtype) -> float:
    """The least of five products, by the op that training would take."""
    x, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    seconds = []
    # the first one makes oneDNN's program
    for _ in range(6):
        began = time.perf_counter()
        ops.processor_product(x, weight)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
