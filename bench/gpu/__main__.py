"""``python -m bench.gpu``: the kernels on this GPU beside their peers, in less than nine minutes, from nothing but installed packages.

First every kernel is held against fp64 on this very card (``parity``): if one is wrong, nothing is timed. Then come the card's own
ceilings, a large copy and a large product, and then the cases (``cases``), those that a goal is about first, each as ``timing``
says. What the time does not reach, and what cannot run here, is listed with its reason. One record of it all goes to ``bench/results/``;
the tables and the goals (``goals``) are made of it.
"""

import contextlib
import dataclasses
import gc
import hashlib
import importlib
import importlib.metadata
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import tempfile
import time
import warnings

import torch
from rich.console import Console

from bench import record
from bench.gpu.card import card, state
from tli.runtime.cli import as_dict, option, parse
from tli.runtime.errors import TliError, disk_errors, run_command

# kept back for what comes after the last case
_RESERVE_S = 12
_COMPILING_S = 90
_CACHE_BYTES = 50 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Check the kernels on this GPU, and time them beside their peers."""

    seconds: float = option(500.0, "bench", "time for all of it; cases that it does not reach are listed as skipped")
    all: bool = option(False, "bench", "time every named shape, not Llama-3-8B's alone")
    keep_going: bool = option(False, "bench", "time the kernels even if one is wrong; the exit code is 1 all the same")
    output: str | None = option(None, "bench", "folder for the record (default: bench/results; of a rehearsal runs/rehearsal)")
    rehearse: bool = option(False, "bench", "run everything at toy sizes in Triton's interpreter, where times mean nothing")


def where(config: GpuConfig) -> tuple[torch.device, pathlib.Path]:
    """The device, and the folder of the record; checked before anything heavy begins.

    Raises:
        TliError: no GPU, the interpreter on, a folder that cannot be written, or a rehearsal that would lie among the results.
    """
    default = record.ROOT / "runs" / "rehearsal" if config.rehearse else record.RESULTS
    folder = pathlib.Path(config.output or default).resolve()
    if config.rehearse:
        if record.RESULTS in (folder, *folder.parents):
            raise TliError("--output", "a rehearsal must not lie among the results", folder, "choose another folder")
        # Triton asks when it meets @triton.jit, and no kernel is defined so far
        os.environ["TRITON_INTERPRET"] = "1"
        return torch.device("cpu"), _writable(folder)
    if not torch.cuda.is_available():
        raise TliError("bench.gpu", "there must be a GPU to measure", "none that torch sees", "run it where one is, or --rehearse it here")
    interpreter = os.environ.get("TRITON_INTERPRET", "")
    if interpreter not in ("", "0"):
        raise TliError("TRITON_INTERPRET", "the interpreter must be off on a GPU", repr(interpreter), "unset it")
    return torch.device("cuda"), _writable(folder)


def _writable(folder: pathlib.Path) -> pathlib.Path:
    # now, not when minutes have gone into the record
    with disk_errors("--output"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder


def sources() -> str:
    """One hash over all that was measured and all that measured it: a tree without version control is known by it."""
    whole = hashlib.sha256()
    for path in sorted(path for folder in ("bench", "kernels", "tli") for path in (record.ROOT / folder).rglob("*.py")):
        whole.update(path.relative_to(record.ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()


# (kernel, what it is compiled for): copies of this process find it there
_ahead: list[tuple] = []


def compile_ahead(cases: list, bench_device, timeout_s: float) -> dict:
    """Fill Triton's cache with what the cases launch, on all cores at once; whatever is missing is compiled when it is met."""
    from tli_kernels import launch

    from bench.gpu.operands import forget

    began = time.perf_counter()
    jobs = {
        job.key: (kernel, job)
        for case in cases
        for kernel, job in jobs_of(case, launch.capability(bench_device.device), bench_device.dtype)
    }
    _ahead[:] = jobs.values()
    forget()
    # made now, since a kernel's key depends on the order in which a process met them all; none of the copies touches the GPU
    with multiprocessing.get_context("fork").Pool(min(len(os.sched_getaffinity(0)), 16)) as pool:
        errors = pool.map_async(compile_job, range(len(_ahead)), chunksize=1).get(timeout_s)
    return {"builds": len(_ahead), "seconds": time.perf_counter() - began, "errors": [error for error in errors if error]}


def jobs_of(case, capability: int, dtype: torch.dtype) -> list[tuple]:
    """Every kernel that our own variants of a case launch, with the specialisation, found on tensors without memory."""
    from tli_kernels import compile_check, launch

    from bench.gpu.cases import WAYS
    from bench.gpu.operands import BenchDevice

    with launch.recording(capability) as launches:
        for name, maker in case.makers(BenchDevice(torch.device("meta"), dtype, cold_bytes=0)).items():
            if name in ("ours", "fused", *WAYS):
                variant = maker()
                with variant.around():
                    variant.call(0)
    return [(one.kernel, compile_check.specialise(one, capability)) for one in launches if 0 not in one.grid]


def compile_job(bench_device: int) -> str | None:
    """Compile one of them; returns what went wrong."""
    import triton

    kernel, job = _ahead[bench_device]
    source = triton.compiler.ASTSource(kernel, job.signature, job.constants, job.attributes)
    target = triton.backends.compiler.GPUTarget("cuda", job.capability, 32)
    try:
        triton.compile(source, target=target, options=job.options)
    # it is met again where the case runs
    except Exception as error:
        return f"{job}: {type(error).__name__}: {error}"[:500]
    return None


def run_cases(cases: list, bench_device, clock, ceiling: dict, watch, console: Console, found: list[dict], left_out: list[dict]) -> None:
    """Add the records of the cases to ``found``, and to ``left_out`` those that were skipped or failed, with the reason."""
    from bench.gpu.goals import line
    from bench.gpu.operands import forget
    from bench.gpu.timing import Skipped, free, measure, reason, wait

    for number, case in enumerate(cases):
        try:
            if watch.left() <= 0:
                raise Skipped("no time was left")
            found.append(measure(case, bench_device, clock, ceiling, watch.share(len(cases) - number), watch.limit()))
            # should the process be killed, this is what is left of it
            console.print(f"{case}: {'ran' if bench_device.rehearsal else line(found[-1])}", markup=False, soft_wrap=True)
            continue
        except (Skipped, TimeoutError) as error:
            left_out.append({"case": str(case), "skipped": str(error)})
        except Exception as error:
            left_out.append({"case": str(case), "failed": reason(error)})
            console.print(f"failed: {case}: {reason(error)}", markup=False)
            error.__traceback__ = None
            forget()
        try:
            free()
            wait(bench_device)
        except RuntimeError as error:
            # after an illegal access nothing runs in this process any more
            lost = f"the GPU is lost to this process: {reason(error)}"
            left_out += [{"case": str(one), "skipped": lost} for one in cases[number + 1 :]]
            return


def run(cases: list, bench_device, sizes, watch, console: Console, keep_going: bool) -> dict:
    """Compile, check and time, as far as the time reaches."""
    from bench.gpu import parity as gpu_parity
    from bench.gpu.operands import bitsandbytes, forget
    from bench.gpu.timing import Clock, ceilings, free, reason

    checks = gpu_parity.Checks()
    # where one is missing, its variants say so
    with contextlib.suppress(ImportError):
        bitsandbytes()
        importlib.import_module("peft")
    # what the imports made is there to stay, and need not be walked through each time that memory is given back
    gc.freeze()
    found = {"compiled_ahead": None, "parity": None, "ceilings": None, "cases": [], "left_out": []}
    try:
        if not bench_device.rehearsal:
            try:
                ahead = compile_ahead(cases, bench_device, min(_COMPILING_S, watch.left() / 3))
            except TimeoutError:
                raise
            except Exception as error:
                ahead = {"failed": reason(error)}
            found["compiled_ahead"] = ahead
            console.print(f"compiled ahead: {ahead}", markup=False)
        began = time.perf_counter()
        gpu_parity.check(checks, bench_device, cases, sizes)
        checks.finished = True
        console.print(f"parity: {len(checks.rows)} checks in {time.perf_counter() - began:.0f} s, {len(checks.failures)} failed")
        if checks.failures and not keep_going:
            found["left_out"].append({"case": "all of them", "skipped": "a kernel is wrong, so nothing is timed"})
            return found
        free()
        gc.freeze()
        clock = Clock(bench_device.device)
        found["ceilings"] = ceilings(bench_device, clock)
        if not bench_device.rehearsal:
            console.print(f"ceilings: {found['ceilings']}", markup=False)
        run_cases(cases, bench_device, clock, found["ceilings"], watch, console, found["cases"], found["left_out"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        forget()
        free()
        found["ceilings_after"] = ceilings(bench_device, clock)
    except TimeoutError as error:
        found["left_out"].append({"case": "all that followed", "skipped": str(error)})
    except Exception as error:
        found["left_out"].append({"case": "all that followed", "failed": reason(error)})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        found["parity"] = checks.record()
    return found


def main() -> None:
    """The command."""
    config = parse(GpuConfig, "bench.gpu")
    device, folder = where(config)
    console = Console(width=180)
    from tli_kernels import launch

    from bench.gpu import cases as gpu_cases
    from bench.gpu import goals as gpu_goals
    from bench.gpu import operands as gpu_operands
    from bench.gpu import parity as gpu_parity
    from bench.gpu.timing import Stopwatch

    # other people's
    warnings.simplefilter("ignore", FutureWarning)
    if config.rehearse:
        bench_device = gpu_operands.BenchDevice(device, torch.float32, cold_bytes=20_000, rehearsal=True)
        cases, sizes = gpu_cases.rehearsed(), gpu_parity.Sizes(elements=1 << 10, eager=4, block=3)
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _CACHE_BYTES
        bench_device = gpu_operands.BenchDevice(device, torch.bfloat16, cold_bytes=3 * cache)
        cases, sizes = gpu_cases.chosen(config.all), gpu_parity.Sizes()
    # what tli.tune found here before must not pass for the table
    launch.use(launch.capability(device), None)
    watch = Stopwatch(config.seconds - _RESERVE_S)
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, watch.left()))
    content = {
        "rehearsal": "sizes are toys and times are an interpreter's: nothing here is a measurement" if config.rehearse else False,
        "setting": as_dict(config),
        "gpu": card(device),
        "sources_sha256": sources(),
        "legend": gpu_cases.LEGEND,
        **run(cases, bench_device, sizes, watch, console, config.keep_going),
    }
    if device.type == "cuda":
        content["gpu"]["after"] = state()
    limits, dispatch_rows = gpu_goals.dispatches(content["cases"], dataclasses.astuple(launch.dispatch(launch.capability(device))))
    reached = gpu_goals.goals(content["cases"], dispatch_rows)
    if config.rehearse:
        content, limits, dispatch_rows = without_numbers(content), {}, []
        reached = [{**row, "got": None, "met": None, "noise": None, "note": "a rehearsal"} for row in reached]
    content |= {"dispatch": {"limits": limits, "rows": dispatch_rows}, "goals": reached}
    kind = "gpu-rehearsal" if config.rehearse else "gpu-" + re.sub(r"[^a-z0-9]+", "-", content["gpu"]["name"].lower()).strip("-")
    path = record.write(kind, content, folder)
    gpu_goals.show_cases(console, content["cases"])
    gpu_goals.show_goals(console, limits, dispatch_rows, content["left_out"], reached)
    console.print(f"{'a rehearsal, nothing is measured' if config.rehearse else content['gpu']['name']}; written: {path}", markup=False)
    _leave(content["parity"])


def without_numbers(content: dict) -> dict:
    """A rehearsal's record: which variants ran, and nothing that could pass for a measurement, whoever copies it out of there."""
    for case in content["cases"]:
        case["rehearsal"] = True
        del case["prepared_s"]
        case["subjects"] = [each if "failed" in each else {"subject": each["subject"], "ran": True} for each in case["subjects"]]
    return {**content, "ceilings": None, "ceilings_after": None}


def _out_of_time(*_) -> None:
    raise TimeoutError("the time was up")


def _leave(parity: dict) -> None:
    """With exit code 1 where a kernel is wrong, or where not all of them were looked at."""
    for row in parity["failures"][:20]:
        print("wrong:", ", ".join(f"{key} {value}" for key, value in row.items() if key != "passed"), file=sys.stderr)
    if parity["failures"] or not parity["finished"]:
        end = "" if parity["finished"] else ", and the time was up before all were made"
        print(f"error: {len(parity['failures'])} of {parity['checks']} checks failed{end}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
