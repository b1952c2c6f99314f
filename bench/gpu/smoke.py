"""``python -m bench.gpu.smoke``: what only a real GPU can show, in under a minute, before anything is timed on it.

    attention   which of torch's attentions runs for bins with a mask, whether twice gives the same bits, and its error beside eager's
    races       each way of ``nf4_lora``, forward and backward, launched again and again beside a stream that keeps the GPU busy:
                the same bits each time (decoded weights as a register operand of wgmma may be overwritten too early: Triton issue 9433)
    capture     a step is recorded as a CUDA graph while another thread pins and copies

One line each, a JSON of them all in ``--output``; exit code 1 where one fails.
"""

import dataclasses
import json
import pathlib
import sys
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import record
from bench.gpu.cases import RANK, WAYS
from bench.gpu.operands import SCALE, BenchDevice
from bench.gpu.timing import reason
from tli.runtime import ops
from tli.runtime.cli import option, parse
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError, run_command

# Llama-3-8B's linear layers [N, K]; rows of few, some and many words
_SIZES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
_ROWS = (16, 64, 200)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmokeConfig:
    """Show what only a real GPU can: which attention runs, races, and captures beside a copying thread."""

    launches: int = option(1000, "bench", "launches of each product", least=1)
    output: str = option(str(record.ROOT / "runs" / "smoke.json"), "bench", "file for the results")


def attention() -> dict:
    """Bins of 4 x width under a tree's mask, forward and backward, in bf16."""
    found = {}
    for heads, width, size in ((32, 64, 128), (32, 128, 128), (32, 192, 128), (9, 64, 64)):
        generator = torch.Generator("cuda").manual_seed(width)
        q, k, v, dy = (torch.randn(4, heads, width, size, device="cuda", generator=generator) for _ in range(4))
        mask = torch.rand(4, 1, width, width, device="cuda", generator=generator) < 0.3
        mask |= torch.eye(width, dtype=torch.bool, device="cuda")
        bias = torch.zeros(mask.shape, device="cuda").masked_fill(~mask, torch.finfo(torch.bfloat16).min)

        def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return ((q @ k.mT) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v

        def solved(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
            leaves = [each.to(dtype).requires_grad_() for each in (q, k, v)]  # noqa: B023
            y = function(*leaves, bias.to(dtype))  # noqa: B023
            return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]  # noqa: B023

        def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            one = solved(sdpa, torch.bfloat16)
            torch.cuda.synchronize()
        # the longest names are the attention's own
        kernels = sorted({event.key for event in profile.key_averages() if "elementwise" not in event.key and "Mem" not in event.key})
        same = all(torch.equal(a, b) for _ in range(20) for a, b in zip(one, solved(sdpa, torch.bfloat16), strict=True))
        truth = solved(eager, torch.float64)
        errors, allowed = (
            [((a.double() - t).abs().max() / t.abs().max()).item() for a, t in zip(got, truth, strict=True)]
            for got in (one, solved(eager, torch.bfloat16))
        )
        passed = same and all(error <= 2 * allow + 1e-3 for error, allow in zip(errors, allowed, strict=True))
        facts = {"same_bits": same, "errors": errors, "eager_errors": allowed, "kernels": [name[:120] for name in kernels]}
        found[f"{heads} heads of {size}, width {width}"] = {"passed": passed, **facts}
    return found


def races(launches: int) -> dict:
    """Every way by every size: how many of the launches gave other bits than the first."""
    bench_device, found = BenchDevice(torch.device("cuda"), torch.bfloat16, cold_bytes=0), {}
    beside, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    for size in _SIZES:
        weight = bench_device.weight(size, True)
        held = ops.dequantise(weight, torch.bfloat16)
        a = bench_device.normal(RANK, size[1], dtype=torch.float32, seed=3) / size[1] ** 0.5
        b = bench_device.normal(size[0], RANK, dtype=torch.float32, seed=4)
        for rows in _ROWS:
            x, dy = bench_device.normal(rows, size[1], seed=1, grad=True), bench_device.normal(rows, size[0], seed=2)
            for way, limits in WAYS.items():
                operand = held if way.startswith("resident") else weight

                def solve(operand=operand, x=x, dy=dy, a=a, b=b) -> tuple[Tensor, ...]:
                    y = ops.fused().lora_linear(x, operand, a, b, SCALE, dropout=0.1, seed=7)
                    return y.detach(), *torch.autograd.grad(y, [x], dy)

                with ops.override_dispatch(bench_device.device, *limits):
                    first, other = solve(), torch.zeros((), dtype=torch.int64, device="cuda")
                    for number in range(launches):
                        if number % 8 == 0:
                            with torch.cuda.stream(beside):
                                busy @ busy
                        for one, again in zip(first, solve(), strict=True):
                            other += (one != again).any()
                    found[f"{list(size)}, {rows} rows, {way}"] = {"passed": other.item() == 0, "differ": other.item(), "of": 2 * launches}
    return found


def capture() -> dict:
    """A product and its gradient, captured in thread-local mode while another thread pins and copies; replayed beside it."""
    x, w = (torch.randn(256, 256, device="cuda", requires_grad=True) for _ in range(2))
    torch.autograd.grad((x @ w).sum(), [x, w])
    over, failed = threading.Event(), []
    copies: list[Tensor] = []

    def copy() -> None:
        stream = torch.cuda.Stream()
        try:
            while not over.is_set():
                with torch.cuda.stream(stream):
                    copies.append(torch.randn(1000 + len(copies)).pin_memory().to("cuda", non_blocking=True))
                    if len(copies) > 50:
                        del copies[:40]
        except RuntimeError as error:
            failed.append(reason(error))

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        for _ in range(20):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = torch.autograd.grad((x @ w).sum(), [x, w])
            graph.replay()
    except RuntimeError as error:
        failed.append(reason(error))
    finally:
        over.set()
        thread.join()
    torch.cuda.synchronize()
    exact = not failed and torch.allclose(result[0], w.sum(1).expand_as(x), atol=1e-2)
    return {"20 captures": {"passed": not failed and exact, "failed": failed}}


def main() -> None:
    """The command."""
    config = parse(SmokeConfig, "bench.gpu.smoke")
    if not torch.cuda.is_available():
        raise TliError("bench.gpu.smoke", "there must be a GPU", "none that torch sees", "run it where one is")
    # as training sets it up
    resolve_device("cuda", "bfloat16")
    found = {}
    for name, look in (("attention", attention), ("capture", capture), ("races", lambda: races(config.launches))):
        try:
            found[name] = look()
        except Exception as error:
            found[name] = {name: {"passed": False, "failed": reason(error)}}
        wrong = {what: row for what, row in found[name].items() if not row["passed"]}
        print(f"{name}: {len(found[name]) - len(wrong)} of {len(found[name])} passed", flush=True)
        for what, row in wrong.items():
            print(f"  wrong: {what}: {row}", flush=True)
    path = pathlib.Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(not row["passed"] for rows in found.values() for row in rows.values()))


if __name__ == "__main__":
    run_command(main)
