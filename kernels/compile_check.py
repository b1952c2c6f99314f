"""Compile every kernel for every GPU generation, without a GPU, and check the machine code: python -m tli_kernels.compile_check

The real ops are called for the named shapes on meta tensors, while ``launch.recording`` collects their launches. Each launch becomes
the specialisation that Triton's own launcher would compile; each distinct one is compiled once per compute capability, and its
machine code is read:

    registers   of a thread
    spilled     bytes of a thread's stack frame, which holds only spilled registers
    shared      bytes of shared memory of a block, against the chip's maximum
    tensor      tensor-core instructions: HMMA; on 9.0 HGMMA is the Hopper form (wgmma), on 10.0 UTCHMMA the Blackwell form

It fails on a spill, on too much shared (or tensor) memory, on a matrix kernel (one that multiplies by ``tl.dot``) without
tensor-core instructions, on a failed compilation, and on a kernel that no op launched. Two exceptions, shown as FMA:

    7.5    Triton 3.3 and later generates no tensor-core instructions for it (triton-lang/triton pull request 5066)
    fp32   lora_linear on fp32 activations multiplies in full fp32, which tensor cores cannot

Results are kept in the cache folder, keyed by source, options and Triton version.
"""

import argparse
import ast
import bisect
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import pkgutil
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

try:
    import triton
    from tli_kernels import checks, launch, shapes
    from tli_kernels.cache_folder import cache_folder
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature
except ImportError as missing:
    sys.exit(f"compile_check: triton must be installed to compile kernels, got '{missing}'; pip install triton on Linux")

_KIB = 1024
# the most shared memory that a block may ask for. Source: CUDA C++ Programming Guide, technical specifications
SHARED_LIMIT = {75: 64 * _KIB, 80: 163 * _KIB, 86: 99 * _KIB, 89: 99 * _KIB, 90: 227 * _KIB, 100: 227 * _KIB, 120: 99 * _KIB}
# columns of a multiprocessor's memory for tensor-core results, where it has one
_TENSOR_MEMORY_LIMIT = 512
# increase it with every change to what is read from the machine code: it invalidates older results
_READER = 2
_NOTE = (
    "FMA: products without tensor cores. For 75 Triton 3.3 and later makes no others (its pull request 5066);"
    " on 80 it is lora_linear on fp32 activations."
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One specialisation to compile, as plain data that another process can take.

    ``exact``: it multiplies in full fp32, for which there are no tensor cores; ``key`` names what is compiled, and by what.
    """

    name: str
    capability: int
    signature: dict[str, str]
    constants: dict[tuple, object]
    attributes: dict[tuple, list]
    options: dict
    exact: bool
    key: str

    def __str__(self) -> str:
        names, said = list(self.signature), [kind for kind in self.signature.values() if kind.startswith("*")]
        multiples = [names[place] for (place, *_), known in self.attributes.items() if known]
        said += [f"{name}%16=0" for name in multiples if not self.signature[name].startswith("*")]
        said += [f"{names[place]}={value}" for (place, *_), value in self.constants.items()]
        said += [f"{name}={self.options[name]}" for name in ("num_warps", "num_stages", "enable_fp_fusion")]
        return f"{self.name} on {self.capability} with {' '.join(said)}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What the compiler produced for a job; ``tensor`` counts instructions by name, ``product`` says whether tl.dot was called."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_memory: int = 0
    product: bool = False
    tensor: dict[str, int] = dataclasses.field(default_factory=dict)
    error: str = ""


def _empty(*size: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta", requires_grad=grad)


def _nf4_weight(size: tuple[int, int], nested: bool):
    from tli_kernels.nf4_weight import NF4Weight

    blocks = size[0] * size[1] // 64
    absmax = _empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    second = (_empty(-(-blocks // 256)), _empty(256), _empty()) if nested else ()
    return NF4Weight(_empty(blocks * 32, dtype=torch.uint8), absmax, _empty(16), size, torch.bfloat16, *second)


def _call_nf4(dtype: torch.dtype) -> None:
    from tli_kernels import nf4

    for size, nested in itertools.product(set(shapes.weights().values()), (False, True)):
        nf4.dequantise(_nf4_weight(size, nested), dtype)


def _call_nf4_lora(dtype: torch.dtype, thorough: bool) -> None:
    from tli_kernels import nf4_lora

    def both_ways(rows, size, kind, rank=16, dropout=0.05, bias=False):
        weight = _empty(*size, dtype=dtype) if kind == "resident" else _nf4_weight(size, kind == "nested")
        x, bias = _empty(rows, size[1], dtype=dtype, grad=True), _empty(size[0], dtype=dtype) if bias else None
        lora_a, lora_b = _empty(rank, size[1], grad=True), _empty(size[0], rank, grad=True)
        for y in (nf4_lora.lora_linear(x, weight, lora_a, lora_b, 2.0, bias, dropout, 1 << 40), nf4_lora.linear(x, weight, bias)):
            y.backward(torch.empty_like(y))

    # a batch's trie has any number of nodes, not only multiples of 16
    for rows in (*shapes.ROWS, 275) if thorough else (16, 275):
        for size, kind in itertools.product(set(shapes.weights().values()) if thorough else (), ("nested", "resident")):
            both_ways(rows, size, kind)
        for kind, rank, dropout in itertools.product(("single", "nested", "resident"), (1, 8, 256) if thorough else (16,), (0.0, 0.05)):
            both_ways(rows, (4096, 4096), kind, rank, dropout)
        both_ways(rows, (4096, 4096), "nested", bias=True)


def _call_pool_norm(dtype: torch.dtype) -> None:
    from tli_kernels import pool_norm

    for model, norm in itertools.product(shapes.MODELS.values(), (False, True)):
        states, indptr, indices = _empty(275, model.width, dtype=dtype, grad=True), *(_empty(n, dtype=torch.int64) for n in (129, 640))
        units = pool_norm.pool_norm(states, indptr, indices, _empty(model.width, dtype=dtype) if norm else None)
        units.backward(torch.empty_like(units))


def _call_losses() -> None:
    from tli_kernels import hinge, infonce

    widths = {model.width for model in shapes.MODELS.values()} | {768}
    for batch, width in itertools.product((1, 8, 63, 64, 256, 1024, 4096, 8191, 65536), widths):
        source, target, false_negatives = _empty(batch, width, grad=True), _empty(batch, width, grad=True), _empty(12, 2, dtype=torch.int64)
        for temperature in (0.07, _empty(grad=True)):
            infonce.infonce(source, target, temperature, false_negatives).backward()
        hinge.hinge(source, target, 0.4, false_negatives).backward()


def calls(capability: int) -> Iterator[tuple[Callable[[], None], bool]]:
    """Each op to call, and whether it multiplies in full fp32.

    In the 16-bit dtype that the chip has; in the others on one generation for all, for they change little but instructions' names.
    """
    half = torch.bfloat16 if capability >= 80 else torch.float16
    for dtype in (half, torch.float16, torch.float32) if capability == 80 else (half,):
        yield functools.partial(_call_nf4, dtype), False
        yield functools.partial(_call_pool_norm, dtype), False
        yield functools.partial(_call_nf4_lora, dtype, dtype == half), dtype == torch.float32
    yield _call_losses, False


def jobs(capability: int) -> list[Job]:
    """Every distinct specialisation that the ops launch for the named shapes on a GPU of this capability."""
    distinct = {}
    for call, exact in calls(capability):
        with launch.recording(capability) as launches:
            call()
        for job in (specialise(one, capability, exact) for one in launches if 0 not in one.grid):
            distinct[job.key] = job
    return list(distinct.values())


def _name(kernel: JITFunction) -> str:
    return f"{kernel.__module__.removeprefix('tli_kernels.')}.{kernel.__name__}"


@functools.cache
def _binder(kernel: JITFunction, capability: int) -> tuple:
    backend = make_backend(GPUTarget("cuda", capability, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


_known: dict[tuple, Job] = {}


def specialise(one: launch.Launch, capability: int, exact: bool = False) -> Job:
    """What Triton would compile for a launch: ``JITFunction.run`` up to the compiler, for an absent GPU."""
    kernel, asked = one.kernel, {**one.options, "debug": False}
    backend, bind = _binder(kernel, capability)
    arguments, specialisation, rest = bind(*one.args, **asked)
    place = (kernel, capability, exact, str(specialisation), str(asked))
    if place not in _known:
        options, signature, constants, attributes = kernel._pack_args(backend, asked, arguments, specialisation, rest)
        source = ASTSource(kernel, signature, constants, attributes)
        key = hashlib.sha256(f"{_READER} {triton.__version__} {capability} {source.hash()} {options.hash()}".encode()).hexdigest()
        _known[place] = Job(_name(kernel), capability, signature, constants, attributes, vars(options), exact, key)
    return _known[place]


def compiled(batch: list[Job]) -> list[Result]:
    """Compile jobs of one capability and read their machine code in one call, because the disassembler starts slowly."""
    results, codes = [], []
    for job in batch:
        module, kernel = job.name.split(".")
        kernel = getattr(importlib.import_module(f"tli_kernels.{module}"), kernel)
        source = ASTSource(kernel, job.signature, job.constants, job.attributes)
        try:
            made = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=job.options)
        # any compiler error is a finding, not the end of the run
        except Exception as failure:
            results.append(Result(error=f"does not compile: {type(failure).__name__}: {str(failure).strip().splitlines()[-1]}"))
            codes.append(b"")
            continue
        product, cubin = "tt.dot" in made.asm["ttir"], made.asm["cubin"]
        used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", cubin, "-res-usage"))}
        memory = made.metadata.shared, getattr(made.metadata, "tmem_size", None) or 0
        results.append(Result(used["REG"], used["STACK"] + used["LOCAL"], *memory, product))
        codes.append(_machine_code(cubin) if product else b"")
    counts = _tensor_instructions(batch[0].capability, codes)
    return [dataclasses.replace(result, tensor=dict(count)) for result, count in zip(results, counts)]


def _tool(name: str, file: bytes, *arguments: str) -> str:
    """The output of one of Triton's bundled programs for a file."""
    program = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile() as temporary:
        temporary.write(file)
        temporary.flush()
        return subprocess.run([program, *arguments, temporary.name], capture_output=True, text=True, check=True).stdout


def _machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin's one kernel: the section .text.<kernel> of an ELF file of 64 bits."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + place * size) for place in range(count)]
    strings = sections[names][4]
    (code,) = (cubin[start : start + length] for name, *_, start, length in sections if cubin.startswith(b".text.", strings + name))
    return code


def _tensor_instructions(capability: int, codes: list[bytes]) -> list[Counter]:
    """Tensor-core instructions by name in each piece of machine code."""
    counts = [Counter() for _ in codes]
    ends = list(itertools.accumulate(map(len, codes)))
    listing = _tool("nvdisasm", b"".join(codes), "--binary", f"SM{capability}") if any(codes) else ""
    for address, name in re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z]*MMA)\b", listing, re.MULTILINE):
        counts[bisect.bisect_right(ends, int(address, 16))][name] += 1
    return counts


def faults(job: Job, result: Result) -> list[str]:
    """What is wrong with a build, in words."""
    if result.error:
        return [result.error]
    found = []
    if result.spilled:
        found.append(f"spills {result.spilled} bytes")
    if result.shared > SHARED_LIMIT[job.capability]:
        found.append(f"needs {result.shared} bytes of shared memory, the chip gives {SHARED_LIMIT[job.capability]}")
    if result.tensor_memory > _TENSOR_MEMORY_LIMIT:
        found.append(f"needs {result.tensor_memory} columns of tensor memory, the chip has {_TENSOR_MEMORY_LIMIT}")
    if result.product and not result.tensor and job.capability > 75 and not job.exact:
        found.append("multiplies without tensor-core instructions")
    return found


def kernels() -> set[str]:
    """Every kernel of the package: functions with a pointer that no other Triton function calls."""
    found, names = set(), [info.name for info in pkgutil.iter_modules(importlib.import_module("tli_kernels").__path__)]
    for module in (importlib.import_module(f"tli_kernels.{name}") for name in names if name != "compile_check"):
        found |= {value for value in vars(module).values() if isinstance(value, JITFunction)}
    calls = [node.func for function in found for node in ast.walk(function.parse()) if isinstance(node, ast.Call)]
    called = {node.id for node in calls if isinstance(node, ast.Name)} | {node.attr for node in calls if isinstance(node, ast.Attribute)}
    starts = (function for function in found if any(name.endswith("_ptr") for name in function.arg_names))
    return {_name(function) for function in starts if function.__name__ not in called}


def run(capabilities: list[int], use_cache: bool = True) -> list[tuple[Job, Result]]:
    """Every job with its result, from the cache or compiled in parallel, one process a CPU."""
    folder = cache_folder() / "compile_check"
    folder.mkdir(parents=True, exist_ok=True)
    # forked before anything runs: children need not find tli_kernels again, and no autograd thread is lost
    fork, processes = multiprocessing.get_context("fork"), min(len(os.sched_getaffinity(0)), 16)
    with concurrent.futures.ProcessPoolExecutor(processes, fork) as pool:
        found = [job for some in pool.map(jobs, capabilities) for job in some]
        kept = {job.key: folder / f"{job.key}.json" for job in found}
        fresh = [job for job in found if not (use_cache and kept[job.key].is_file())]
        groups = [list(group) for _, group in itertools.groupby(fresh, lambda job: job.capability)]
        print(f"{len(found)} builds, {len(fresh)} of them to compile", file=sys.stderr)
        batches = [group[first : first + 8] for group in groups for first in range(0, len(group), 8)]
        for batch, results in zip(batches, pool.map(compiled, batches)):
            for job, result in zip(batch, results):
                temporary = folder / f"{job.key}.{os.getpid()}"
                temporary.write_text(json.dumps(vars(result)))
                temporary.replace(kept[job.key])
    return [(job, Result(**json.loads(kept[job.key].read_text()))) for job in found]


def table(results: list[tuple[Job, Result]]) -> Iterator[str]:
    """One line per kernel and capability, with the ranges over its builds."""
    groups = defaultdict(list)
    for job, result in results:
        groups[job.name, job.capability].append(result)
    yield f"{'kernel':<30}{'cc':>4}{'builds':>8}{'registers':>11}{'spilled':>9}{'shared KiB':>15}  tensor-core instructions"
    for name, capability in sorted(itertools.product(kernels() | {name for name, _ in groups}, {cc for _, cc in groups})):
        built = [result for result in groups[name, capability] if not result.error]
        line = f"{name:<30}{capability:>4}{len(groups[name, capability]):>8}"
        if built:
            shared = f"{max(result.shared for result in built) / _KIB:.1f} of {SHARED_LIMIT[capability] // _KIB}"
            spilled = max(result.spilled for result in built)
            line += f"{_range(result.registers for result in built):>11}{spilled:>9}{shared:>15}  {_instructions(built)}"
        yield line + (" (does not compile)" if len(built) < len(groups[name, capability]) else "" if built else "  not launched here")


def _instructions(built: list[Result]) -> str:
    counts = defaultdict(list)
    for result in built:
        for name, count in (result.tensor or {"FMA": 0} if result.product else {"-": 0}).items():
            counts[name].append(count)
    forms = {"HGMMA": " (Hopper form)", "UTCHMMA": " (Blackwell form)"}
    said = (name + (f" x{_range(of)}" if any(of) else "") + forms.get(name, "") for name, of in counts.items())
    return ", ".join(f"{text} in {len(of)}" if len(counts) > 1 else text for text, of in zip(said, counts.values()))


def _range(numbers: Iterable[int]) -> str:
    least, *_, most = sorted([*numbers] * 2)
    return str(least) if least == most else f"{least}-{most}"


def main() -> int:
    """Print the table and every fault; the exit code is 1 where there is one."""
    parser = argparse.ArgumentParser(prog="python -m tli_kernels.compile_check", description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, action="append", choices=launch.CAPABILITIES, help="only this one; may be repeated")
    parser.add_argument("--no-cache", action="store_true", help="compile all of it again")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every result, too")
    options = parser.parse_args()
    if checks.interpreted():
        parser.error("TRITON_INTERPRET must not be set, got 1; unset it, so that Triton compiles")
    began = time.perf_counter()
    results = run(options.capability or launch.CAPABILITIES, not options.no_cache)
    found = [f"{job}: {fault}" for job, result in results for fault in faults(job, result)]
    launched = {job.name for job, _ in results}
    if not options.capability:
        found += [f"{name}: no op launched it, so nothing is known of it" for name in sorted(kernels() - launched)]
    print(*table(results), _NOTE, *found, sep="\n")
    print(f"{len(results)} builds of {len(launched)} kernels, {len(found)} faults, {time.perf_counter() - began:.0f} s")
    if options.json:
        builds = [{"kernel": job.name, "capability": job.capability, "build": str(job), **vars(result)} for job, result in results]
        options.json.write_text(json.dumps({"triton": triton.__version__, "faults": found, "builds": builds}, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
