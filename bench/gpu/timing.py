"""How ``bench.gpu`` times a case: in rounds, each a row of calls of every variant, and a second one of ours, in a new random order.

Time is the GPU's, between two events, and the queue is filled while the GPU is held up: what Python needs to fill it is noted beside it,
and is what a user waits for where it is the longer of the two. A ratio is the median over rounds of (its seconds / ours in the same
round); that of ``again`` would be 1 on a silent machine, and its quartiles are the noise that the others carry, too.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bench.gpu.cases import BenchDevice, Case, KernelVariant

AGAIN = "again"
# how far the results of a case's variants may be apart, relatively: bf16, and TF32
_CLOSE = 0.03
# a row of calls lasts at least so long on the GPU, or has so many calls
_ROW_S, _MOST_CALLS = 2e-4, 20
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 15
# so long the GPU is held up at most while its queue is filled
_LONGEST_HOLD_S = 0.1
# what a case may always have, and what its fewest rounds may take of the others' time
_LEAST_S, _DEAR_S = 0.5, 25
_COPY_BYTES, _PRODUCT_SIDE = 2 << 30, 8192


class Skipped(Exception):
    """A case that the time does not allow."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of calls: seconds of one call on the device and in Python, and whether the queue was full all the while."""

    seconds: float
    host_seconds: float
    queue_full: bool


class Stopwatch:
    """What is left of the time, and how it is shared out."""

    def __init__(self, seconds: float):
        self.ends = time.perf_counter() + seconds

    def left(self) -> float:
        return self.ends - time.perf_counter()

    def share(self, waiting: int) -> float:
        """Seconds for the next of ``waiting`` cases: twice its part, since many need less than theirs."""
        return min(self.left(), max(_LEAST_S, 2 * self.left() / waiting))

    def limit(self) -> float:
        """The most seconds that the next case may take."""
        return min(self.left(), max(_DEAR_S, self.left() / 10))


class Clock:
    """Times rows of calls by events, with the GPU held up until they are queued; on a CPU by the host's clock."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            cycles = 20_000_000
            torch.cuda._sleep(cycles)
            self.cycles_per_s = cycles / self._between(lambda: torch.cuda._sleep(cycles))

    def row(self, variant: KernelVariant, first: int, calls: int, host_s: float) -> Row:
        """Make ``calls`` calls; ``host_s`` is how long Python is expected to need for one."""
        with variant.around():
            if not self.cuda:
                began = time.perf_counter()
                for i in range(first, first + calls):
                    variant.call(i)
                took = time.perf_counter() - began
                return Row(took / calls, took / calls, True)
            held = min(_LONGEST_HOLD_S, 1.5 * calls * host_s + 5e-5)
            began, ended = _events()
            before = time.perf_counter()
            torch.cuda._sleep(int(held * self.cycles_per_s))
            began.record()
            for i in range(first, first + calls):
                variant.call(i)
            ended.record()
            host = time.perf_counter() - before
            ended.synchronize()
            return Row(began.elapsed_time(ended) / 1e3 / calls, host / calls, host < held)

    def median(self, work: Callable[[], object], repeats: int) -> float:
        """Median seconds of ``work``, the first time left out."""
        return statistics.median([self._between(work) for _ in range(1 + repeats)][1:])

    def _between(self, work: Callable[[], object]) -> float:
        if not self.cuda:
            before = time.perf_counter()
            work()
            return time.perf_counter() - before
        began, ended = _events()
        torch.cuda.synchronize()
        began.record()
        work()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def ceilings(bench_device: BenchDevice, clock: Clock) -> dict:
    """What this card does at best: bytes read and written per second by a large copy, operations by a large product of random numbers."""
    size, side = (_COPY_BYTES, _PRODUCT_SIDE) if clock.cuda else (1 << 20, 64)
    source = torch.empty(size // 4, dtype=torch.int32, device=bench_device.device).random_()
    target = torch.empty_like(source)
    copy_s = clock.median(lambda: target.copy_(source), 15)
    a, b = bench_device.normal(side, side, seed=1), bench_device.normal(side, side, seed=2)
    out = torch.empty_like(a)
    product_s = clock.median(lambda: torch.matmul(a, b, out=out), 25)
    rates = {"copy_bytes_per_s": 2 * size / copy_s, "product_flops_per_s": 2 * side**3 / product_s}
    return {**rates, "copy_bytes": 2 * size, "product_side": side, "product_dtype": str(bench_device.dtype)}


def measure(case: Case, bench_device: BenchDevice, clock: Clock, ceiling: dict, share_s: float, limit_s: float) -> dict:
    """The record of a case: every variant's times, what it reached, and its memory, or why it did not run.

    Raises:
        Skipped: where the fewest rounds take longer than ``limit_s``.
        RuntimeError: where our own variant cannot run.
    """
    began = time.perf_counter()
    variants, host, failed = prepare(case, bench_device)
    prepared = time.perf_counter() - began
    rounds, dropped = interleave(variants, case.ours, clock, host, max(_LEAST_S, share_s - prepared), limit_s - prepared)
    failed |= dropped
    rows = summary(rounds, variants, case.ours, ceiling)
    if case.measures_memory:
        for row in rows:
            if row["subject"] in variants:
                row["peak_bytes"] = _peak_bytes(variants[row["subject"]], bench_device, case.input_bytes(bench_device))
    rows += [{"subject": name, "failed": reason} for name, reason in failed.items()]
    return {**case.facts(), "ours": case.ours, "prepared_s": _short(prepared), "subjects": rows}


def prepare(case: Case, bench_device: BenchDevice) -> tuple[dict[str, KernelVariant], dict[str, float], dict[str, str]]:
    """The variants that run and agree with ours, what Python needs for a call of each, and why the others do not."""
    variants, host, failed, results = {}, {}, {}, {}
    for name, maker in case.makers(bench_device).items():
        try:
            variant = maker()
            results[name], host[name] = _warm(variant, bench_device)
            variants[name] = variant
        except TimeoutError:
            raise
        except Exception as error:
            failed[name] = reason(error)
            # it holds on to the tensors of where it came from
            error.__traceback__ = None
            free()
    if case.ours not in variants:
        raise RuntimeError(f"{case.ours}: {failed[case.ours]}")
    for name, result in results.items() if case.comparable else ():
        far = _distance(result, results[case.ours])
        # not > so that a NaN is found, too
        if not far <= _CLOSE:
            failed[name] = f"computes something else: a relative difference of {far:.2g} to {case.ours}"
            del variants[name]
    if case.ours in failed:
        raise RuntimeError(f"{case.ours}: the results are not finite")
    return variants, host, failed


def _warm(variant: KernelVariant, bench_device: BenchDevice) -> tuple[tuple[Tensor, ...], float]:
    """The results of a first call, which compiles, and the seconds that Python needs for a later one."""
    with variant.around():
        # the interpreter compiles nothing, and takes its time
        for i in range(1 if bench_device.rehearsal else 3):
            before = time.perf_counter()
            result = variant.call(i)
            took = time.perf_counter() - before
            wait(bench_device)
    return result, took


def _distance(result: tuple[Tensor, ...], ours: tuple[Tensor, ...]) -> float:
    """The largest relative difference of the results; NaN if there is one in either."""
    norms = [((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item() for a, b in zip(result, ours)]
    return float(np.max(norms)) if norms else 0.0


def interleave(
    variants: dict[str, KernelVariant], ours: str, clock: Clock, host: dict[str, float], seconds: float, limit: float
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Rows of each variant, one in each round, by name; ``again`` is our second one. As many rounds as the seconds allow.

    Returns:
        the rows, and the variants that were left out because the fewest rounds with them would take longer than ``limit``.
    """
    turns = {**variants, AGAIN: variants[ours]}
    host = {**host, AGAIN: host[ours]}
    pilots = {name: clock.row(variant, 3, 1, host[name]) for name, variant in variants.items()}
    pilots[AGAIN] = pilots[ours]
    most = _MOST_CALLS if clock.cuda else 1
    calls = {name: max(1, min(most, round(_ROW_S / max(pilot.seconds, 1e-7)))) for name, pilot in pilots.items()}
    costs = {name: calls[name] * (pilot.seconds + 2.5 * host[name]) + 1e-4 for name, pilot in pilots.items()}
    least, most = (_LEAST_ROUNDS, _MOST_ROUNDS) if clock.cuda else (2, 2)
    dropped = {}
    while least * sum(costs.values()) > limit:
        slowest = max(costs.keys() - {ours, AGAIN}, key=costs.get, default=ours)
        too_long = f"skipped: {least} rounds of it would take {least * costs[slowest]:.1f} s, {max(0.0, limit):.1f} s were left for all"
        if slowest == ours:
            raise Skipped(too_long)
        dropped[slowest] = too_long
        del costs[slowest], turns[slowest]
    round_s = sum(costs.values())
    rows: dict[str, list[Row]] = {name: [] for name in turns}
    next_copy, order = dict.fromkeys(turns, 4), np.random.default_rng(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(max(least, min(most, int(seconds / round_s)))):
            for name in order.permutation(list(turns)):
                row = clock.row(turns[name], next_copy[name], calls[name], host[name])
                rows[name].append(row)
                next_copy[name] += calls[name]
                if not row.queue_full:
                    host[name] = max(host[name], row.host_seconds)
    finally:
        gc.enable()
    return rows, dropped


def summary(rounds: dict[str, list[Row]], variants: dict[str, KernelVariant], ours: str, ceiling: dict) -> list[dict]:
    """Of each variant: median seconds, ratios to ours, and what it reached of the card's ceilings."""
    found = []
    for name, rows in rounds.items():
        variant = variants[ours if name == AGAIN else name]
        seconds, host = (statistics.median(getattr(row, field) for row in rows) for field in ("seconds", "host_seconds"))
        low, ratio, high = statistics.quantiles(
            (row.seconds / own.seconds for row, own in zip(rows, rounds[ours])), n=4, method="inclusive"
        )
        by_bytes, by_flops = variant.bytes / ceiling["copy_bytes_per_s"], variant.flops / ceiling["product_flops_per_s"]
        found.append(
            {
                "subject": name,
                "seconds": _short(seconds),
                "host_seconds": _short(host),
                "python_bound": host > seconds,
                "queue_full": sum(row.queue_full for row in rows) / len(rows),
                "ratio": _short(ratio),
                "ratio_quartiles": [_short(low), _short(high)],
                "bytes_per_s": _short(variant.bytes / seconds),
                "flops_per_s": _short(variant.flops / seconds),
                "bound": "copy" if by_bytes >= by_flops else "product",
                "share_of_ceiling": _short(max(by_bytes, by_flops) / seconds),
                "rounds": [_short(row.seconds) for row in rows],
            }
        )
    return found


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def _peak_bytes(variant: KernelVariant, bench_device: BenchDevice, inputs: int) -> int | None:
    """The most memory that a call takes, its inputs counted once."""
    if bench_device.device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with variant.around():
        variant.call(0)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + inputs


def wait(bench_device: BenchDevice) -> None:
    """Until the device is done; what went wrong there is raised here."""
    if bench_device.device.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give memory back that nothing holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"out of memory: {first}" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {first}"
