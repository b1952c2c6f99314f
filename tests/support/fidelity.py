"""The fidelity rule: a fused op may be twice as far from the truth (fp64) as plain PyTorch in the same dtype is, plus rounding.

Tests that import this run on a GPU where there is one, and else on the CPU in Triton's interpreter (conftest.py).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assert_faithful(fused: Tensor, eager: Tensor, truth: Tensor, terms: int, what: str = "") -> None:
    """max |fused - truth| <= 2 max |eager - truth| + eps·sqrt(terms)·max |truth|, eps of fp32, in which sums are made.

    Args:
        fused:  what the kernels gave
        eager:  what the reference gave in the same dtype
        truth:  the same in fp64
        terms:  how many products each element sums
    """
    assert fused.shape == truth.shape, f"{what}: shape {tuple(fused.shape)}, expected {tuple(truth.shape)}"
    assert fused.dtype == eager.dtype, f"{what}: {fused.dtype}, expected {eager.dtype}"
    if fused.numel() == 0:
        return
    fused, eager, truth = (tensor.detach().double().cpu() for tensor in (fused, eager, truth))
    error, allowed = (fused - truth).abs().max(), (eager - truth).abs().max()
    rounding = torch.finfo(torch.float32).eps * max(1, terms) ** 0.5 * truth.abs().max()
    assert error <= 2 * allowed + rounding, f"{what}: error {error:.3g}, eager's {allowed:.3g}, rounding {rounding:.3g}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every new buffer starts as NaN (torch's own switch), so that an element that nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
