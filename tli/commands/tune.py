"""``python -m tli.tune``: measure on this GPU from how many rows on each way of a product is the fastest, and keep it.

An NF4 weight can be decoded inside the product or dequantised once before it; the product can be Triton's, with the low-rank
term in the same kernel, or cuBLAS's. Which is fastest depends on the card and on the number of rows (packed tokens), so forward
and backward are timed each way over a ladder of rows. Later runs on the same card, triton and torch read the result.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from tli.config import TuneConfig
from tli.runtime import ops
from tli.runtime.console import open_console
from tli.runtime.errors import TliError
from tli.runtime.files import SCHEMA

ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_REPEATS = 9

# way -> the rows up to which (NF4 is decoded in the product, the product is Triton's): always or never
WAYS = {"decode": (ops.ALWAYS, ops.ALWAYS), "dequantise, Triton": (0, ops.ALWAYS), "dequantise, cuBLAS": (0, 0)}


def tune(config: TuneConfig) -> dict:
    """Measure, keep the result unless ``dry_run``, and return it: the seconds by rows and way, and the rows that follow.

    Raises:
        TliError: no such GPU.
    """
    try:
        device = torch.device(config.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TliError("--device", "the device must be a GPU of this machine", config.device, "run this where the GPU is") from error
    if device.type != "cuda":
        raise TliError("--device", "the device must be a GPU", config.device, "nothing needs tuning on a CPU")
    console = open_console()
    dtype = getattr(torch, config.dtype)
    console.print(ops.resolve("fused", dtype, device, ops.Matmul).description)
    seconds = measure(ops.projections(config.like), ROWS, dtype, config.rank, device)
    decode_rows, fused_rows = crossovers(seconds)
    if not config.dry_run:
        ops.save_tuned(device, decode_rows, fused_rows)
    _show(console, config, seconds, decode_rows, fused_rows)
    return {
        "schema": SCHEMA,
        "config": dataclasses.asdict(config),
        "seconds": seconds,
        "decode_rows": decode_rows,
        "fused_rows": fused_rows,
    }


def measure(
    sizes: list[tuple[int, int]], rows: tuple[int, ...], dtype: torch.dtype, rank: int, device: torch.device, repeats: int = _REPEATS
) -> dict[int, dict[str, float]]:
    """Seconds of forward and backward through one layer of each size (N, K), by rows and way: medians of interleaved rounds."""
    seconds, fused = {m: dict.fromkeys(WAYS, 0.0) for m in rows}, ops.fused()
    for n, k in sizes:
        weight = ops.NF4Weight.quantise(torch.randn(n, k, device=device, dtype=torch.bfloat16))
        lora_a, lora_b = (torch.randn(size, device=device, requires_grad=True) for size in ((rank, k), (n, rank)))
        for m in rows:
            x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
            dy = torch.randn(m, n, device=device, dtype=dtype)

            def step(x=x, dy=dy, weight=weight, lora_a=lora_a, lora_b=lora_b):
                y = fused.lora_linear(x, weight, lora_a, lora_b, 2.0, dropout=0.1, seed=1)
                torch.autograd.grad(y, (x, lora_a, lora_b), dy)

            rounds: dict[str, list[float]] = {way: [] for way in WAYS}
            # the first round compiles
            for number, (way, limits) in itertools.product(range(1 + repeats), WAYS.items()):
                with ops.override_dispatch(device, *limits):
                    taken = _seconds(step, device)
                if number:
                    rounds[way].append(taken)
            for way, times in rounds.items():
                seconds[m][way] += statistics.median(times)
    return seconds


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # so that the GPU has a queue and never waits for Python
    torch.cuda._sleep(1_000_000)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def crossovers(seconds: dict[int, dict[str, float]]) -> tuple[int, int]:
    """The (decode_rows, fused_rows) whose slowest place, as a ratio to the fastest way there, is the least slow.

    Among equals the larger numbers of rows; ``ops.ALWAYS`` where a way is kept beyond the last rung.
    """
    decode, fused, cublas = WAYS
    rungs = sorted(seconds)

    def slowness(limits: tuple[int, int]) -> tuple[float, float]:
        decode_rows, fused_rows = limits
        ratios = []
        for m in rungs:
            way = decode if m <= decode_rows else fused if m <= fused_rows else cublas
            ratios.append(seconds[m][way] / min(seconds[m].values()))
        return max(ratios), sum(ratios)

    candidates = [(d, f) for d, f in itertools.product((0, *rungs), (0, *rungs[:-1], ops.ALWAYS)) if f == ops.ALWAYS or f >= d or f == 0]
    return min(reversed(candidates), key=slowness)


def _show(console, config: TuneConfig, seconds: dict[int, dict[str, float]], decode_rows: int, fused_rows: int) -> None:
    from rich.table import Table

    table = Table("rows", *WAYS, title=f"{config.like}, {config.dtype}, rank {config.rank}: forward and backward, ms")
    for m, times in seconds.items():
        best = min(times.values())
        table.add_row(str(m), *(f"{1e3 * value:.3f}{' *' if value == best else ''}" for value in times.values()))
    console.print(table)
    above = "Triton's product at any number" if fused_rows == ops.ALWAYS else f"cuBLAS's above {max(decode_rows, fused_rows)}"
    kept = "not kept (--dry-run)" if config.dry_run else f"kept in {ops.dispatch_file()}"
    console.print(f"NF4 decoded in the product up to {decode_rows} rows, dequantised once above; {above}; {kept}")
