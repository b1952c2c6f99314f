"""The GPU that is measured: its name, its driver, its clocks."""

import importlib.metadata
import subprocess

import torch


def card(device: torch.device) -> dict:
    """The GPU, its driver and the packages that matter; read only."""
    versions = {}
    for name in ("torch", "triton", "bitsandbytes", "peft", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    if device.type != "cuda":
        return {"name": "Triton's interpreter on a CPU", "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "fp32_products": torch.get_float32_matmul_precision(),
        "versions": versions,
        "before": state(),
    }


def state() -> dict:
    """Driver, clocks, power and temperature at this moment, as nvidia-smi tells."""
    fields = "driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"unread": str(error)}
    if done.returncode != 0 or not done.stdout.strip():
        return {"unread": done.stderr.strip()[:200] or "nothing was printed"}
    return dict(zip(fields.split(","), (value.strip() for value in done.stdout.splitlines()[0].split(","))))
