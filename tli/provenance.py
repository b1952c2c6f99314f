"""What a number was made with: versions, the machine and its memory, as plain JSON values for a report."""

import pathlib
import platform
import sys

from tli import processor
from tli.checkpoint import Checkpoint
from tli.truncated import Placement


def model_facts(name: str, checkpoint: Checkpoint, sha256: str) -> dict:
    """What the model is called and is; ``sha256``: ``checkpoint.sha256`` of the blocks that were read."""
    return {
        "name": name,
        "family": checkpoint.config.model_type,
        "blocks": checkpoint.blocks,
        "width": checkpoint.config.hidden_size,
        "sha256": sha256,
    }


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


def machine(placement: Placement) -> dict:
    """The processor and its threads, the device and the dtype that a run computed with."""
    import torch

    return {
        "processor": processor.name(),
        "instructions": processor.instructions(),
        "threads": torch.get_num_threads(),
        "device": str(placement.device),
        **placement.facts,
    }


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
