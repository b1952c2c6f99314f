"""Argument checks: raise a ``ValueError`` that says what an argument must be. Importing it imports no triton."""

from collections.abc import Callable

from torch import Tensor


def require(condition: bool, where: str, must: str, got: Callable[[], object], remedy: str) -> None:
    """Raise a ``ValueError`` that names what must hold, what was got and what to do, unless ``condition``."""
    if not condition:
        raise ValueError(f"{where}: {must}, got {got()}; {remedy}")


def require_device(where: str, *tensors: Tensor | None) -> None:
    """Raise unless all tensors are on one device that can run Triton kernels: a GPU, or the CPU under TRITON_INTERPRET=1."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    require(len(devices) == 1, where, "all tensors must be on one device", lambda: sorted(map(str, devices)), "move them together")
    (device,) = devices
    runs = device.type in ("cuda", "meta") or (device.type == "cpu" and interpreted())
    require(runs, where, "the tensors must be on a GPU, or the interpreter be on (TRITON_INTERPRET=1)", lambda: device, "use reference")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    import triton

    return triton.knobs.runtime.interpret
