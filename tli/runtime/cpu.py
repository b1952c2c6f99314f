"""What the processor is good at: as many threads as it may run, and its fastest ways to multiply and attend, tried and measured."""

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

# of what a container may use: version 2 of control groups, and version 1
_QUOTAS = (pathlib.Path("/sys/fs/cgroup/cpu.max"), pathlib.Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
# what the environment may tell oneDNN, MKL and torch of the instructions that they may use
_LIMITS = ("ATEN_CPU_CAPABILITY", "DNNL_MAX", "ONEDNN_MAX", "DNNL_DEFAULT", "ONEDNN_DEFAULT", "MKL_")
DTYPES = ("float32", "bfloat16", "float16")
# bf16 costs precision, and what lies between the products does not gain: it must be faster than by a little
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


def limit_onednn_cache() -> None:
    """Cap oneDNN's primitive cache at 256 (default 1,024): each distinct number of nodes compiles a new primitive, and they pile up.

    With half as many a step takes 8 % longer. To be called before the first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


@dataclasses.dataclass(frozen=True)
class Ways:
    """What was the fastest on this processor, of what runs on it and agrees with the reference.

    fastest     the dtype for training: bfloat16 where that is clearly faster than float32
    matmul      by dtype's name, the name of the ``Matmul`` that multiplies
    attention   by dtype's name, sdpa or eager
    """

    fastest: str
    matmul: dict[str, str]
    attention: dict[str, str]

    def matmul_for(self, dtype: torch.dtype) -> ops.Matmul:
        """What multiplies in this dtype."""
        return ops.Matmul.named(self.matmul[ops.name_of(dtype)])


_known: dict[str, Ways] = {}


def ways() -> Ways:
    """What to multiply and attend with on this processor.

    Measured once for whatever the answer depends on (``key``) and kept in the cache folder, since a run that goes on tomorrow must
    multiply as it did today. A kept answer is tried before it is believed; one that is damaged or wrong is measured anew.
    """
    this = key()
    if this not in _known:
        file = cache_folder() / "processor.json"
        try:
            kept = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            kept = {}
        with _one_thread():
            found = _read(kept.get(this))
            known = found is not None
            found = found or measure()
        if not known:
            # where the cache cannot be written, the next run measures again
            with contextlib.suppress(TliError, OSError):
                write_text(file, json.dumps({**kept, this: dataclasses.asdict(found)}, indent=1) + "\n")
        _known[this] = found
    return _known[this]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Threads wait for one another where something else runs, for as long as the system pleases; which way is faster, one can tell."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def key() -> str:
    """What the fastest way depends on: the instructions that torch and oneDNN see, what limits them, torch's build, the threads.

    The processor's name alone would not do: virtual machines call many kinds alike, and a home folder may be on several.
    """
    flags: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    seen = ",".join(sorted(flag for flag, there in flags.items() if there is True))
    limits = ",".join(f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(_LIMITS))
    support = [str(int(ask())) for ask in (torch.ops.mkldnn._is_mkldnn_bf16_supported, torch.ops.mkldnn._is_mkldnn_fp16_supported)]
    build = hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:8]
    parts = (name(), instructions(), hashlib.sha256(seen.encode()).hexdigest()[:8], f"oneDNN {''.join(support)}", limits)
    return "; ".join(filter(None, (*parts, f"torch {torch.__version__} {build}", f"{torch.get_num_threads()} threads")))


def instructions() -> str:
    """The instruction set that torch computes with, and below it what oneDNN was told to stop at: ``AVX512, oneDNN AVX2``."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    off = "" if torch.backends.mkldnn.enabled else ", oneDNN off"
    return torch.backends.cpu.get_cpu_capability() + (off or (f", oneDNN {limit.upper()}" if limit else ""))


def _read(kept: Any) -> Ways | None:
    """A kept answer, if it is one and what it says runs and agrees here; else None."""
    try:
        found = Ways(kept["fastest"], dict(kept["matmul"]), dict(kept["attention"]))
        whole = found.fastest in DTYPES and found.matmul.keys() == found.attention.keys() == set(DTYPES)
        attend = all(attends(way, dtype) for dtype, way in found.attention.items())
        return found if whole and attend and all(runs(ops.Matmul.named(name), dtype) for dtype, name in found.matmul.items()) else None
    except (KeyError, TypeError, ValueError):
        return None


def runs(matmul: ops.Matmul, dtype: str) -> bool:
    """Whether a product and its gradient run here and agree with fp64, to the rounding of ``dtype``."""
    # whatever a library that was built for another processor may raise
    try:
        x, weight, dy = _operands(getattr(torch, dtype), *_SMALL)
        exact = x.double() @ weight.double().t(), dy.double() @ weight.double()
        room = torch.finfo(x.dtype).eps + x.shape[1] ** 0.5 * torch.finfo(torch.float32).eps
        return _within(room, _product(matmul, x, weight, dy), exact)
    except Exception:
        return False


def _within(room: float, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> bool:
    # not > so that a NaN is no agreement
    return all(bool((got.double() - truth).norm() <= room * truth.norm()) for got, truth in zip(found, exact))


def _operands(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> list[Tensor]:
    """x, W and dy."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in ((rows, inputs), (outputs, inputs), (rows, outputs))]


def _product(matmul: ops.Matmul, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """x·Wᵀ and dy·W by the op that training would take."""
    x = x.detach().requires_grad_()
    y = ops.on_cpu(matmul).linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def measure() -> Ways:
    """Time each way of a product and of attention, forward and backward, that runs and agrees."""
    products, attentions = {}, {}
    for dtype in DTYPES:
        kind = getattr(torch, dtype)
        operands = _operands(kind, *_TIMED)
        for matmul in [
            ops.Matmul(library, wide) for wide in ((False,) if dtype == "float32" else (False, True)) for library in ops.LIBRARIES
        ]:
            # fp32's plain product is what all else is held against
            if (matmul == ops.PLAIN and dtype == "float32") or runs(matmul, dtype):
                products[dtype, matmul.name] = functools.partial(_product, matmul, *operands)
        operands = _attention_operands(kind, *_ATTENDED)
        for way in ATTENTION:
            if way == "eager" or attends(way, dtype):
                attentions[dtype, way] = functools.partial(_attended, ATTENTION[way], *operands)
    seconds, attention_s = least_seconds(products), least_seconds(attentions)
    matmul = {dtype: _first_unless(seconds, dtype, _CLEARLY_FASTER) for dtype in DTYPES}
    attention = {dtype: _first_unless(attention_s, dtype, _WORTH_IT) for dtype in DTYPES}
    faster = seconds["float32", matmul["float32"]] >= _FASTER * seconds["bfloat16", matmul["bfloat16"]]
    return Ways("bfloat16" if faster else "float32", matmul, attention)


def least_seconds(tasks: Mapping[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], float]:
    """The least time of each task over interleaved rounds, so that whatever else the machine does falls on all alike.

    What takes many times as long as the fastest of its group, its key's first part, or long enough to be known well, is left out.
    """
    least, spent = dict.fromkeys(tasks, math.inf), dict.fromkeys(tasks, 0.0)
    for turn in range(_ROUNDS):
        for key, task in tasks.items():
            best = min(seconds for other, seconds in least.items() if other[0] == key[0])
            # the first run makes oneDNN's program, and is the only one where it takes too long
            if spent[key] < _PATIENCE_S and (turn < 2 or least[key] <= _MANY_TIMES * best):
                began = time.perf_counter()
                try:
                    task()
                except Exception:
                    # what ran on small operands may still want memory that is not there
                    spent[key] = math.inf
                    continue
                seconds = time.perf_counter() - began
                least[key], spent[key] = min(least[key], seconds), spent[key] + seconds
    return least


def _first_unless(seconds: dict[tuple[str, str], float], dtype: str, times: float) -> str:
    """The first way of a dtype, unless another is so many times as fast: two that are alike must not change places with the noise."""
    own = {way: value for (of, way), value in seconds.items() if of == dtype}
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
    """q, k, v, the causal mask to be added, and dy."""
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
