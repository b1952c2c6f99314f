"""The process and its machine: versions, processor, threads, memory; what a number was made with, as plain JSON values for a report."""

import ctypes
import os
import pathlib
import platform
import re
import sys

from tli.runtime import cpu
from tli.runtime.device import DeviceConfig

# limit, use, and the page cache that use counts: version 2 and version 1 of control groups
_CGROUPS = tuple(
    tuple(f"/sys/fs/cgroup/{name}" for name in names[:3]) + names[3:]
    for names in (
        ("memory.max", "memory.current", "memory.stat", "file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache"),
    )
)


def versions() -> dict[str, str]:
    """Versions of tli, torch, transformers and Python."""
    import torch
    import transformers

    import tli

    return {
        "tli": tli.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine(device_config: DeviceConfig) -> dict:
    """The processor and its threads, the device and the dtype that a run computed with."""
    import torch

    return {
        "processor": cpu.name(),
        "instructions": cpu.instructions(),
        "threads": torch.get_num_threads(),
        "device": str(device_config.device),
        **device_config.facts,
    }


def cores() -> int:
    """As many processors as this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int | None:
    """The largest part of memory that this process ever held; None where the system does not say (Windows)."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # what getrusage says would count the parent's peak, which a child inherits
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    try:
        import resource
    except ModuleNotFoundError:
        return None
    # in bytes on a Mac, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def return_freed_memory() -> None:
    """Give freed memory back to the system: glibc finds the next block no room in the holes that the last one leaves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def available_bytes() -> int | None:
    """What this machine, or the control group that the process is in, has left for it; None where it does not say (not Linux).

    Page cache counts as free: the system gives it up when somebody needs the room.
    """
    found = []
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        found += [int(size) * 1024 for size in re.findall(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())]
    for limit, used, statistics, cache in _CGROUPS:
        try:
            pages = dict(line.split() for line in pathlib.Path(statistics).read_text().splitlines())
            found.append(int(pathlib.Path(limit).read_text()) - int(pathlib.Path(used).read_text()) + int(pages.get(cache, 0)))
        except (OSError, ValueError):
            # no such group, or no limit ("max")
            continue
    return max(0, min(found)) if found else None


def process_memory(what: str) -> int:
    """A number of bytes out of this process's status: RssAnon, VmHWM; 0 where the system does not say (not Linux)."""
    status = pathlib.Path("/proc/self/status")
    found = re.search(rf"{what}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0
