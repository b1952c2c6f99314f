"""The CPU: its thread count, and its fastest matmul and attention, each checked against fp64 and timed."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tli.runtime import ops
from tli.runtime.errors import TliError
from tli.runtime.files import cache_folder, write_text

# a container's CPU quota: cgroup v2, cgroup v1
_QUOTAS = (pathlib.Path("/sys/fs/cgroup/cpu.max"), pathlib.Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
# environment variables that limit the instruction sets of oneDNN, MKL and torch
_LIMITS = ("ATEN_CPU_CAPABILITY", "DNNL_MAX", "ONEDNN_MAX", "DNNL_DEFAULT", "ONEDNN_DEFAULT", "MKL_")
DTYPES = ("float32", "bfloat16", "float16")
# bf16 costs precision, and only the matmuls gain by it: it must be clearly faster
_FASTER = 1.4
# so many times as fast must another library be, and so many times eager attention, which holds the bins' probabilities
_CLEARLY_FASTER, _WORTH_IT = 1.3, 1.25
# rows, in- and out-features: what is tried at each start, and what is timed
_SMALL, _TIMED = (24, 96, 40), (256, 512, 512)
# bins, heads, width, head width: what is tried at each start (from 64 keys on torch packs them, by other instructions), and what is
# timed, of the starter's batches
_TRIED_ATTENDED, _ATTENDED = ((2, 2, 20, 16), (1, 1, 70, 16)), (4, 8, 112, 64)
# rounds of timing, and when to leave one out: a processor without the instructions for a dtype takes a thousand times as long
_ROUNDS, _MANY_TIMES, _PATIENCE_S = 20, 3, 0.2


def name() -> str:
    """The processor's name."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def set_cpu_threads() -> int:
    """Cap torch's threads at the container's CPU quota; returns how many it has.

    Twenty threads on two CPUs wait for one another. Without a quota torch's default, one for each core, is right; OMP_NUM_THREADS
    is respected.
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


def limit_onednn_cache() -> None:
    """Cap oneDNN's primitive cache at 256 (default 1,024): each distinct number of nodes compiles a new primitive, and they pile up.

    With half as many a step takes 8 % longer. Call it before the first matmul.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


@dataclasses.dataclass(frozen=True)
class Ways:
    """The fastest dtype, matmul and attention on this CPU, among those that run on it and agree with fp64.

    fastest     the dtype for training: bfloat16 where it is clearly faster than float32
    matmul      dtype's name -> name of the ``Matmul``
    attention   dtype's name -> sdpa or eager
    """

    fastest: str
    matmul: dict[str, str]
    attention: dict[str, str]

    def matmul_for(self, dtype: torch.dtype) -> ops.Matmul:
        """The fastest matmul in this dtype."""
        return ops.Matmul.named(self.matmul[ops.name_of(dtype)])


_known: dict[str, Ways] = {}


def ways() -> Ways:
    """The fastest matmul and attention on this CPU.

    Measured once for each ``key`` and kept in the cache folder, because a resumed run must multiply as it did before. A kept
    measurement is checked before it is used; one that is damaged, or does not run or agree here, is measured again.
    """
    this = key()
    if this not in _known:
        file, kept = cache_folder() / "processor.json", {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            kept = dict(json.loads(file.read_text(encoding="utf-8")))
        with _one_thread():
            known = _read(kept.get(this))
            _known[this] = known or measure()
        if known is None:
            # where the cache cannot be written, the next run measures again
            with contextlib.suppress(TliError, OSError):
                write_text(file, json.dumps({**kept, this: dataclasses.asdict(_known[this])}, indent=1) + "\n")
    return _known[this]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: several wait for one another on a busy machine, and one shows as well which candidate is faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def key() -> str:
    """The cache key of a measurement: CPU, instruction sets that torch and oneDNN see, their limits, torch's build, thread count.

    The CPU's name alone would not do: virtual machines give many kinds one name, and machines may share a home folder.
    """
    flags: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    seen = ",".join(sorted(flag for flag, there in flags.items() if there is True))
    limits = ",".join(f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(_LIMITS))
    support = [str(int(ask())) for ask in (torch.ops.mkldnn._is_mkldnn_bf16_supported, torch.ops.mkldnn._is_mkldnn_fp16_supported)]
    build = hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:8]
    parts = (name(), instructions(), hashlib.sha256(seen.encode()).hexdigest()[:8], f"oneDNN {''.join(support)}", limits)
    return "; ".join(filter(None, (*parts, f"torch {torch.__version__} {build}", f"{torch.get_num_threads()} threads")))


def instructions() -> str:
    """The instruction set that torch uses, and oneDNN's limit where one is set: ``AVX512, oneDNN AVX2``."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    off = "" if torch.backends.mkldnn.enabled else ", oneDNN off"
    return torch.backends.cpu.get_cpu_capability() + (off or (f", oneDNN {limit.upper()}" if limit else ""))


def _read(kept: Any) -> Ways | None:
    """A kept measurement, if it is complete and all it names runs and agrees here; else None."""
    try:
        found = Ways(kept["fastest"], dict(kept["matmul"]), dict(kept["attention"]))
        complete = found.fastest in DTYPES and found.matmul.keys() == found.attention.keys() == set(DTYPES)
        attend = all(attends(attention, dtype) for dtype, attention in found.attention.items())
        multiply = all(runs(ops.Matmul.named(matmul), dtype) for dtype, matmul in found.matmul.items())
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return found if complete and attend and multiply else None


def runs(matmul: ops.Matmul, dtype: str) -> bool:
    """Whether a matmul and its gradient run here and agree with fp64, to the rounding of ``dtype``."""
    # a library built for another CPU may raise anything
    try:
        x, weight, dy = _operands(getattr(torch, dtype), *_SMALL)
        exact = x.double() @ weight.double().t(), dy.double() @ weight.double()
        room = torch.finfo(x.dtype).eps + x.shape[1] ** 0.5 * torch.finfo(torch.float32).eps
        return _within(room, _product(matmul, x, weight, dy), exact)
    except Exception:
        return False


def _within(room: float, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> bool:
    # <= is false for NaN
    return all(bool((got.double() - truth).norm() <= room * truth.norm()) for got, truth in zip(found, exact))


def _operands(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> list[Tensor]:
    """x, W and dy."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in ((rows, inputs), (outputs, inputs), (rows, outputs))]


def _product(matmul: ops.Matmul, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """x·Wᵀ and dy·W by the op that training uses."""
    x = x.detach().requires_grad_()
    y = ops.on_cpu(matmul).linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def measure() -> Ways:
    """Time every matmul and attention that runs and agrees, forward and backward, and choose the fastest."""
    matmuls, attentions = {}, {}
    for dtype in DTYPES:
        operands = _operands(getattr(torch, dtype), *_TIMED)
        for wide in (False,) if dtype == "float32" else (False, True):
            for matmul in (ops.Matmul(library, wide) for library in ops.LIBRARIES):
                # every torch has the plain fp32 matmul
                if (matmul == ops.PLAIN and dtype == "float32") or runs(matmul, dtype):
                    matmuls[dtype, matmul.name] = functools.partial(_product, matmul, *operands)
        operands = _attention_operands(getattr(torch, dtype), *_ATTENDED)
        for name, attention in ATTENTION.items():
            if name == "eager" or attends(name, dtype):
                attentions[dtype, name] = functools.partial(_attended, attention, *operands)
    matmul_s, attention_s = least_seconds(matmuls), least_seconds(attentions)
    fastest = {dtype: _first_unless(matmul_s, dtype, _CLEARLY_FASTER) for dtype in DTYPES}
    float32_s, bfloat16_s = (matmul_s[dtype, fastest[dtype]] for dtype in ("float32", "bfloat16"))
    return Ways(
        "bfloat16" if float32_s >= _FASTER * bfloat16_s else "float32",
        fastest,
        {dtype: _first_unless(attention_s, dtype, _WORTH_IT) for dtype in DTYPES},
    )


def least_seconds(tasks: Mapping[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], float]:
    """The minimum time of each task over interleaved rounds, so that other load on the machine hits all tasks alike.

    A task leaves the rounds once it is many times slower than the fastest of its group (its key's first part), or has run long
    enough to be known well.
    """
    least, spent = dict.fromkeys(tasks, math.inf), dict.fromkeys(tasks, 0.0)
    for turn in range(_ROUNDS):
        for key, task in tasks.items():
            best = min(seconds for other, seconds in least.items() if other[0] == key[0])
            # two runs at least: the first one compiles oneDNN's primitive
            if spent[key] < _PATIENCE_S and (turn < 2 or least[key] <= _MANY_TIMES * best):
                began = time.perf_counter()
                try:
                    task()
                except Exception:
                    # it ran on small operands, but these may not fit in memory
                    spent[key] = math.inf
                    continue
                seconds = time.perf_counter() - began
                least[key], spent[key] = min(least[key], seconds), spent[key] + seconds
    return least


def _first_unless(seconds: dict[tuple[str, str], float], dtype: str, times: float) -> str:
    """A dtype's first candidate, unless another is ``times`` as fast: noise must not swap two that are equally fast."""
    own = {name: value for (of, name), value in seconds.items() if of == dtype}
    first, fastest = next(iter(own)), min(own, key=own.__getitem__)
    return fastest if own[first] >= times * own[fastest] else first


def attends(way: str, dtype: str) -> bool:
    """Whether attention and its gradients run here in this way and agree with fp64, to the rounding of ``dtype``."""
    # as ``runs``
    try:
        for sizes in _TRIED_ATTENDED:
            operands = _attention_operands(getattr(torch, dtype), *sizes)
            exact = _attended(_eager, *(part.double() for part in operands))
            if not _within(8 * torch.finfo(operands[0].dtype).eps, _attended(ATTENTION[way], *operands), exact):
                return False
        return True
    except Exception:
        return False


def _attention_operands(dtype: torch.dtype, bins: int, heads: int, width: int, head_width: int) -> list[Tensor]:
    """q, k, v, the additive causal mask, and dy."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(bins, heads, width, head_width, generator=generator).to(dtype) for _ in range(4))
    hidden = torch.ones(bins, 1, width, width, dtype=torch.bool).triu(1)
    return [q, k, v, torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min), dy]


def _attended(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [part.detach().requires_grad_() for part in (q, k, v)]
    y = attention(*leaves, mask)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As transformers' eager attention: the softmax in fp32."""
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return scores.softmax(dim=-1, dtype=wide).to(q.dtype) @ v


ATTENTION = {"sdpa": _sdpa, "eager": _eager}
