"""u_b = m_b / max(‖m_b‖, 1e-12), m_b = mean over the nodes t of word b of norm(h_t), and the gradient to h; words share nodes.

    forward    inv_t = 1/sqrt(mean(h_t²) + ε),  m_b = w·Σ_t inv_t·h_t / n_b                 (inv and w are 1 without the norm)
    backward   dm_b  = (du_b - (du_b·u_b)·u_b) / ‖m_b‖,  du_b / 1e-12 where ‖m_b‖ < 1e-12    (as F.normalize)
               g_t   = w·Σ_b dm_b / n_b over the words b that hold t
               dh_t  = inv_t·(g_t - inv_t·h_t·mean(g_t·inv_t·h_t))

Never in memory: the states in fp32, the normalised tokens, the means and the gradients to both. One pass each way: a forward program
reads one word's nodes; a backward program reads the unit rows and gradients of the words that contain one node. It gathers along the
transposed paths instead of scattering, so there are no atomics, and the sum has one order. Each row of the result is written once.
Saved: the states (with the norm only), the unit rows, which are the output, and the lengths [B].
Source: Zhang and Sennrich 2019 (arXiv 1910.07467) for the norm; torch.nn.functional.normalize for the guard and its gradient.

Letters: B batch (words), T nodes, E edges (entries of the paths), D width.
"""

import torch
import triton
import triton.language as tl
from tli_kernels import checks, launch
from tli_kernels.reference import UNIT_EPS, transpose_paths
from torch import Tensor
from torch.autograd.function import once_differentiable

_UNIT_EPS = tl.constexpr(UNIT_EPS)


@triton.jit(do_not_specialize=["T", "E"])
def _forward_kernel(
    states_ptr, indptr_ptr, indices_ptr, weight_ptr, units_ptr, lengths_ptr, T, E, stride_t, norm_eps,
    NORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # Each program computes one word: its unit row and its length, BLOCK_E nodes at a time
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    begin, end = tl.load(indptr_ptr + b), tl.load(indptr_ptr + b + 1)
    # nothing outside the paths is read
    broken = (begin < 0) | (end > E) | (end < begin)
    end = tl.where(broken, begin, end)
    if NORM:
        # loaded early, to overlap with the loads of the indices
        weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        mask_e = offs_e < end
        t = tl.load(indices_ptr + offs_e, mask=mask_e, other=0)
        inside = mask_e & (t >= 0) & (t < T)
        h = tl.load(states_ptr + t[:, None] * stride_t + offs_d[None, :], mask=inside[:, None] & mask_d[None, :], other=0.0)
        h = h.to(tl.float32)  # [BLOCK_E, BLOCK_D]
        if NORM:
            scale = tl.rsqrt(tl.sum(h * h, axis=1) / D + norm_eps)
        else:
            scale = tl.full((BLOCK_E,), 1.0, tl.float32)
        # a node out of range gives NaN; padding after the word's last node adds nothing
        scale = tl.where(inside, scale, tl.where(mask_e, float("nan"), 0.0))
        mean += tl.sum(h * scale[:, None], axis=0)
    mean *= 1.0 / tl.maximum(end - begin, 1).to(tl.float32)
    if NORM:
        mean *= weight
    length = tl.where(broken, float("nan"), tl.sqrt_rn(tl.sum(mean * mean, axis=0)))
    # a comparison, because a maximum would hide NaN
    unit = mean * (1.0 / tl.where(length < _UNIT_EPS, _UNIT_EPS, length))
    tl.store(units_ptr + b * D + offs_d, unit, mask=mask_d)
    tl.store(lengths_ptr + b, length)


@triton.jit(do_not_specialize=["B", "E"])
def _backward_kernel(
    dunits_ptr, units_ptr, lengths_ptr, indptr_ptr, node_indptr_ptr, words_ptr, states_ptr, weight_ptr, dstates_ptr,
    B, E, stride_t, norm_eps,
    NORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # Each program computes one node's row of dstates from the words that hold it, BLOCK_E words at a time, in the order of the paths
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    begin = tl.maximum(tl.load(node_indptr_ptr + t), 0)
    end = tl.minimum(tl.load(node_indptr_ptr + t + 1), E)
    if NORM:
        # loaded early, to overlap with the loads of the indices
        h = tl.load(states_ptr + t * stride_t + offs_d, mask=mask_d & (begin < end), other=0.0)
    g = tl.zeros((BLOCK_D,), tl.float32)
    offs_e = begin + tl.arange(0, BLOCK_E)
    b_next = tl.load(words_ptr + offs_e, mask=offs_e < end, other=-1)
    for _ in range(begin, end, BLOCK_E):
        b = b_next
        offs_e += BLOCK_E
        b_next = tl.load(words_ptr + offs_e, mask=offs_e < end, other=-1)
        inside = (b >= 0) & (b < B)
        mask = inside[:, None] & mask_d[None, :]
        dunit = tl.load(dunits_ptr + b[:, None] * D + offs_d[None, :], mask=mask, other=0.0)  # [BLOCK_E, BLOCK_D]
        unit = tl.load(units_ptr + b[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        length = tl.load(lengths_ptr + b, mask=inside, other=1.0)
        nodes = tl.load(indptr_ptr + b + 1, mask=inside, other=1) - tl.load(indptr_ptr + b, mask=inside, other=0)
        short = length < _UNIT_EPS
        along = tl.where(short, 0.0, tl.sum(dunit * unit, axis=1))
        scale = 1.0 / (tl.where(short, _UNIT_EPS, length) * nodes.to(tl.float32))
        g += tl.sum((dunit - along[:, None] * unit) * scale[:, None], axis=0)
    if NORM:
        h = h.to(tl.float32)
        inv = tl.rsqrt(tl.sum(h * h, axis=0) / D + norm_eps)
        h *= inv
        g *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        # a node in no word has gradient zero, even if its state is NaN
        g = tl.where(begin < end, inv * (g - h * (tl.sum(g * h, axis=0) / D)), 0.0)
    tl.store(dstates_ptr + t * D + offs_d, g.to(dstates_ptr.dtype.element_ty), mask=mask_d)


def _forward(states: Tensor, indptr: Tensor, indices: Tensor, norm_weight: Tensor | None, norm_eps: float) -> tuple[Tensor, Tensor]:
    """Unit rows [B, D] and lengths [B], both fp32."""
    (nodes, width), words = states.shape, len(indptr) - 1
    units = torch.empty(words, width, dtype=torch.float32, device=states.device)
    lengths = torch.empty(words, dtype=torch.float32, device=states.device)
    plan = launch.pool_norm(width)
    launch.run(
        _forward_kernel, (words,),
        states, indptr, indices, norm_weight, units, lengths, nodes, len(indices), states.stride(0), norm_eps,
        NORM=norm_weight is not None, D=width, BLOCK_D=plan.columns, BLOCK_E=plan.nodes, num_warps=plan.warps,
    )  # fmt: skip
    return units, lengths


def _backward(
    dunits: Tensor, units: Tensor, lengths: Tensor, indptr: Tensor, transposed: tuple[Tensor, Tensor],
    states: Tensor | None, norm_weight: Tensor | None, norm_eps: float, dstates: Tensor,
) -> None:  # fmt: skip
    """Write the gradient to the states, [T, D], into ``dstates``."""
    (nodes, width), (node_indptr, words) = dstates.shape, transposed
    plan = launch.pool_norm(width)
    launch.run(
        _backward_kernel, (nodes,),
        dunits, units, lengths, indptr, node_indptr, words, states, norm_weight, dstates,
        len(units), len(words), width if states is None else states.stride(0), norm_eps,
        NORM=norm_weight is not None, D=width, BLOCK_D=plan.columns, BLOCK_E=plan.words, num_warps=plan.warps,
    )  # fmt: skip


def _check(states: Tensor, indptr: Tensor, indices: Tensor, norm_weight: Tensor | None, transposed: tuple[Tensor, Tensor] | None) -> None:
    checks.require_device("pool_norm", states, indptr, indices, norm_weight, *(transposed or ()))
    floats = states.ndim == 2 and states.dtype in (torch.float32, torch.bfloat16, torch.float16)
    _require(floats, "states must be fp32, bf16 or fp16 [T, D]", states, "pass one row per node")
    _require(1 <= states.shape[1] <= 8192, "states must be 1 to 8192 wide", states, "use reference")
    if norm_weight is not None:
        fits = norm_weight.shape == states.shape[1:] and norm_weight.is_floating_point()
        _require(fits, "norm_weight must be floats, one for each column of states", norm_weight, "pass the weight of these states' norm")
    _check_paths("indptr and indices", indptr, indices, states.shape[0])
    if transposed is not None:
        _check_paths("transposed", *transposed, indptr.shape[0] - 1)
        fits = transposed[0].shape[0] == states.shape[0] + 1 and transposed[1].shape == indices.shape
        _require(fits, "transposed must be of these nodes and paths", transposed[0], "use transpose_paths")


def _check_paths(names: str, indptr: Tensor, indices: Tensor, limit: int) -> None:
    for path in (indptr, indices):
        _require(path.dtype == torch.int64 and path.ndim == 1, f"{names} must be int64 with one dimension", path, "cast them")
    _require(indptr.shape[0] > 0, f"{names}: the first must have at least the element 0", indptr, "begin it with 0")
    # on a GPU reading the values would synchronise: there the kernels handle indices out of range
    if indptr.device.type == "cpu":
        rising = indptr[0] == 0 and indptr[-1] <= len(indices) and (indptr.diff() >= 0).all()
        must = f"{names}: the first must rise from 0 to at most {len(indices)}"
        checks.require(bool(rising), "pool_norm", must, indptr.tolist, "build the paths anew")
        outside = indices[(indices < 0) | (indices >= limit)].tolist()
        must = f"{names}: the second must lie in 0..{limit - 1}"
        checks.require(not outside, "pool_norm", must, lambda: outside[0], "build the paths anew")


def _require(condition: bool, must: str, tensor: Tensor, remedy: str) -> None:
    checks.require(condition, "pool_norm", must, lambda: f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch."), remedy)


class _PoolNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, indptr, indices, norm_weight, norm_eps, node_indptr, words):
        units, lengths = _forward(states, indptr, indices, norm_weight, norm_eps)
        # without the norm the gradient does not depend on the states
        ctx.save_for_backward(units, lengths, indptr, indices, node_indptr, words, norm_weight, None if norm_weight is None else states)
        ctx.shape, ctx.dtype, ctx.norm_eps = states.shape, states.dtype, norm_eps
        return units

    @staticmethod
    @once_differentiable
    def backward(ctx, dunits):
        units, lengths, indptr, indices, node_indptr, words, norm_weight, states = ctx.saved_tensors
        transposed = transpose_paths(indptr, indices, ctx.shape[0]) if words is None else (node_indptr, words)
        dstates = torch.empty(ctx.shape, dtype=ctx.dtype, device=units.device)
        _backward(dunits.contiguous(), units, lengths, indptr, transposed, states, norm_weight, ctx.norm_eps, dstates)
        return dstates, None, None, None, None, None, None


def pool_norm(
    states: Tensor,
    indptr: Tensor,
    indices: Tensor,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    transposed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """u_b = m_b / max(‖m_b‖, 1e-12), m_b = mean over t in indices[indptr[b]:indptr[b+1]] of norm(h_t).

    Args:
        states:       [T, D] token states of the packed nodes, fp32, bf16 or fp16, D up to 8192; rows of any stride
        indptr:       int64 [B+1] where each word's nodes begin
        indices:      int64 [E] the nodes of each word; a node may be in many words, and more than once in one
        norm_weight:  [D] frozen, or None; with it, norm(h) = h / sqrt(mean(h²) + norm_eps) · norm_weight, else norm(h) = h
        norm_eps:     of that norm
        transposed:   ``transpose_paths(indptr, indices, T)``, computed once per batch; None: computed in each backward pass

    Returns:
        fp32 [B, D] unit rows; zeros for a word without nodes. Gradient to states alone, in their dtype, zero for a node in no word.

    Every sum is in fp32 and has one order: the same bits each time. NaN in a state gives NaN in the words that contain it and in no other.

    Raises:
        ValueError: wrong device, dtype or shape; on the CPU (the interpreter) also a path out of range. On a GPU reading the
            paths would synchronise: there a word with a node out of range is NaN, and nothing outside the tensors is read.
    """
    _check(states, indptr, indices, norm_weight, transposed)
    if states.stride(1) != 1:
        states = states.contiguous()
    node_indptr, words = (None, None) if transposed is None else (path.contiguous() for path in transposed)
    norm_weight = None if norm_weight is None else norm_weight.detach().contiguous()
    return _PoolNorm.apply(states, indptr.contiguous(), indices.contiguous(), norm_weight, norm_eps, node_indptr, words)
