"""The only door to ``tli_kernels``: picks the implementation of the ops, and says once which and why.

The reference ops are plain PyTorch and run everywhere, bit for bit as transformers' own layers do. On a CPU in float32 the
linear layers go through oneDNN instead, which is equal to rounding and faster. The fused Triton ops are not built yet;
asking for them explicitly is an error, never a silent fall-back.
"""

import torch
from tli_kernels import onednn, reference
from torch import Tensor

from tli.errors import TliError

pool_norm = reference.pool_norm
infonce = reference.infonce
hinge = reference.hinge

_linear_layers = reference


def choose(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    """Choose the ops for ``impl`` (auto, reference, fused) and return one line that says which were taken and why."""
    global _linear_layers
    if impl == "fused":
        raise TliError(
            "--impl", "the fused ops must be available", "a version that has only the reference ops", "use --impl auto or reference"
        )
    on_cpu = device.type == "cpu" and dtype == torch.float32 and onednn.available()
    if impl == "auto" and on_cpu:
        _linear_layers = onednn
        return "reference ops, linear layers by oneDNN (float32 on a CPU)"
    _linear_layers = reference
    return "reference ops (asked for)" if impl == "reference" else "reference ops (this version has no fused ones)"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x·Wᵀ + bias with frozen weights; see ``reference.linear``."""
    return _linear_layers.linear(x, weight, bias)


def nf4_lora(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ + bias; see ``reference.nf4_lora``."""
    return _linear_layers.nf4_lora(x, weight, lora_a, lora_b, scale, bias, dropout, seed)
