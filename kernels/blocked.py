"""Both losses by blocks of rows in plain PyTorch, for batches whose B × B cosines do not fit in memory.

    infonce     S = U·Vᵀ/τ;    l_i = log Σ_j exp(S_ij - S_ii),    m_j = log Σ_i exp(S_ij - S_jj);    loss = mean(l + m) / 2
                dS_ij = (exp(S_ij - S_ii - l_i) + exp(S_ij - S_jj - m_j) - 2·[i = j]) / 2B
                dU = dS·V/τ,    dV = dSᵀ·U/τ,    dτ = -Σ dS∘S / τ
    hinge       h_i the first of the hardest negatives, a_i whether it costs anything;    dU_i = a_i·(V_h - V_i) / B,  dV likewise

B × B is never in memory: a block of rows is computed, used and dropped; the backward pass of infonce recomputes it. Small batches go to
``reference`` and give its results bit for bit. Sums are relative to S_ii, and the diagonal of dS is computed by expm1: otherwise a small
loss and its gradient would be lost in rounding. Source of the method: online softmax (arXiv 1805.02867), as in ``infonce.py``.
Letters: B batch, D width.
"""

import torch
from tli_kernels import reference
from torch import Tensor
from torch.autograd.function import once_differentiable

# cosines in one block: 64 MB in fp32; a batch of one block goes to the reference
BLOCK_NUMBERS = 1 << 24


def _blocks(pairs: int) -> list[slice]:
    rows = max(1, BLOCK_NUMBERS // pairs)
    return [slice(start, min(start + rows, pairs)) for start in range(0, pairs, rows)]


def _products(source: Tensor, target: Tensor, false_negatives: Tensor, own: Tensor | float, rows: slice) -> Tensor:
    """Cosines of these rows with all columns, [rows, B]; ``own`` on the diagonal, minus infinity for false negatives."""
    cosines = source[rows] @ target.t()
    cosines.diagonal(rows.start)[: rows.stop - rows.start] = own if isinstance(own, float) else own[rows]
    here = (false_negatives[:, 0] >= rows.start) & (false_negatives[:, 0] < rows.stop)
    cosines[false_negatives[here, 0] - rows.start, false_negatives[here, 1]] = float("-inf")
    return cosines


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source: Tensor, target: Tensor, temperature: Tensor, false_negatives: Tensor) -> Tensor:
        pairs, cosine = len(source), (source.double() * target).sum(1).float()
        own = cosine / temperature
        row, column = source.new_empty(pairs), source.new_full((pairs,), float("-inf"))
        for rows in _blocks(pairs):
            # bit for bit the numbers in ``own``: a small loss consists of their differences
            logits = _products(source, target, false_negatives, cosine, rows) / temperature
            row[rows] = (logits - own[rows, None]).logsumexp(1)
            column = torch.logaddexp(column, (logits - own).logsumexp(0))
        ctx.save_for_backward(source, target, temperature, false_negatives, cosine, row, column)
        return (row.double() + column).mean().float() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        source, target, temperature, false_negatives, cosine, row, column = ctx.saved_tensors
        pairs, own = len(source), cosine / temperature
        d_source, d_target = torch.empty_like(source), torch.zeros_like(target)
        d_temperature = torch.zeros((), dtype=torch.float64, device=source.device)
        for rows in _blocks(pairs):
            logits = _products(source, target, false_negatives, cosine, rows) / temperature
            d_logits = (logits - own[rows, None] - row[rows, None]).exp_() + (logits - own - column).exp_()
            d_logits.diagonal(rows.start)[: rows.stop - rows.start] = torch.expm1(-row[rows]) + torch.expm1(-column[rows])
            if ctx.needs_input_grad[2]:
                # 0 · -inf at false negatives
                d_temperature -= (d_logits * logits).nan_to_num_(0.0).sum(dtype=torch.float64)
            d_source[rows] = d_logits @ target
            d_target.addmm_(d_logits.t(), source[rows])
        scale = gradient / (2 * pairs)
        return d_source * (scale / temperature), d_target * (scale / temperature), (d_temperature * scale / temperature).float(), None


class _Hinge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source: Tensor, target: Tensor, margin: float, false_negatives: Tensor) -> Tensor:
        pairs = len(source)
        hardest, index = source.new_empty(pairs), false_negatives.new_empty(pairs)
        columns = torch.arange(pairs, device=source.device)
        for rows in _blocks(pairs):
            cosines = _products(source, target, false_negatives, float("-inf"), rows)
            hardest[rows] = cosines.amax(1)
            index[rows] = torch.where(cosines == hardest[rows, None], columns, pairs - 1).amin(1)
        costs = margin - (source * target).sum(1) + hardest
        ctx.save_for_backward(source, target, index, costs > 0)
        return costs.relu().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        source, target, index, active = ctx.saved_tensors
        weight = (active.to(source.dtype) * (gradient / len(source)))[:, None]
        d_target = (-weight * source).index_add_(0, index, weight * source)
        return weight * (target[index] - target), d_target, None, None


def infonce(source: Tensor, target: Tensor, temperature: float | Tensor, false_negatives: Tensor) -> Tensor:
    """``reference.infonce``; a batch above ``BLOCK_NUMBERS`` cosines goes block by block, with gradients equal to rounding."""
    if len(source) ** 2 <= BLOCK_NUMBERS:
        return reference.infonce(source, target, temperature, false_negatives)
    return _InfoNCE.apply(
        source.float(), target.float(), torch.as_tensor(temperature, dtype=torch.float32, device=source.device), false_negatives
    )


def hinge(source: Tensor, target: Tensor, margin: float, false_negatives: Tensor) -> Tensor:
    """``reference.hinge``; a batch above ``BLOCK_NUMBERS`` cosines goes block by block, with gradients equal to rounding."""
    if len(source) ** 2 <= BLOCK_NUMBERS:
        return reference.hinge(source, target, margin, false_negatives)
    return _Hinge.apply(source.float(), target.float(), margin, false_negatives)
