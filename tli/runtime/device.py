"""Device and dtype of a run, from the options' words: where and how weights are held."""

import contextlib
import dataclasses
import functools

import torch

from tli.runtime import cpu, ops
from tli.runtime.errors import TliError
from tli.runtime.ops import Ops


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """Where and how weights are held, and what computes from them.

    dtype      of weights and activations
    device     where they are
    weights    "full", or "nf4": linear weights rounded to NF4
    ops        the implementation of the ops
    attention  "sdpa", or "eager": two products and a softmax
    """

    dtype: torch.dtype
    device: torch.device
    weights: str = "full"
    ops: Ops = ops.REFERENCE
    attention: str = "sdpa"

    @property
    def facts(self) -> dict[str, str]:
        """What decides a run's bytes beside its options and its seed: plain values, by name."""
        facts = {"dtype": ops.name_of(self.dtype)}
        if self.ops.matmul is None:
            return facts
        return facts | {"matmul": self.ops.matmul.name, "attention": self.attention}

    @property
    def width_step(self) -> int:
        """What a bin's width is a multiple of: on a GPU few distinct widths, for each of which a CUDA graph is recorded."""
        return 16 if self.device.type == "cuda" else 1


def resolve_device(
    device: str, dtype: str, weights: str = "full", impl: str = "reference", begun: dict[str, str] | None = None
) -> DeviceConfig:
    """A ``DeviceConfig`` from the options' words, and on a CPU the threads that this process may have.

    Args:
        device:   cpu, cuda, cuda:N, or auto: the GPU if there is one
        dtype:    float32, bfloat16, float16; auto: float32 on a CPU, bfloat16 on a GPU; fastest: what the CPU multiplies fastest
        weights:  full or nf4
        impl:     auto, reference or fused
        begun:    ``DeviceConfig.facts`` of a run that is to go on: what it multiplied and attended with is taken where it runs here

    Raises:
        TliError: a device that is not on this machine, fused ops that cannot run on it, NF4 weights without what makes them.
    """
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise TliError("--device", "the device must be on this machine", device, "use --device cpu") from error
    # torch knows devices that hold no numbers, or that nothing here was tried on
    if chosen.type != "cuda" and str(chosen) not in ("cpu", "cpu:0"):
        raise TliError("--device", "the device must be cpu, cuda or cuda:N", device, "use --device cpu")
    if chosen.type == "cpu":
        cpu.set_cpu_threads()
        cpu.limit_onednn_cache()
    else:
        # graphs, streams and kernels without a tensor are on the current device
        if chosen.index is not None:
            torch.cuda.set_device(chosen)
        # cuDNN's attention is not deterministic, and gives NaN gradients under some masks (PyTorch issue 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype in ("auto", "fastest"):
        on_cpu = cpu.ways().fastest if dtype == "fastest" and chosen.type == "cpu" else "float32"
        dtype = on_cpu if chosen.type == "cpu" else "bfloat16"
    begun, compute = begun or {}, getattr(torch, dtype)
    resolved = ops.resolve(impl, compute, chosen, functools.partial(_matmul, dtype, begun.get("matmul")), weights)
    attention = "sdpa"
    if resolved.kind == "cpu":
        kept = begun.get("attention")
        attention = kept if kept is not None and cpu.attends(kept, dtype) else cpu.ways().attention[dtype]
    return DeviceConfig(compute, chosen, weights, resolved, attention)


def _matmul(dtype: str, begun: str | None) -> ops.Matmul:
    """What multiplies on this CPU: as the run that is to go on did, where that runs here, else the fastest."""
    if begun is not None:
        with contextlib.suppress(ValueError):
            if cpu.runs(kept := ops.Matmul.named(begun), dtype):
                return kept
    return cpu.ways().matmul_for(getattr(torch, dtype))
