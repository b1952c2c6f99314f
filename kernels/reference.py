"""Reference implementation of every op in plain PyTorch: the specification that the kernels are tested against.

    linear      y = x·Wᵀ + bias
    dequantise  W = code[q] · scale
    lora_linear y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ + bias
    pool_norm   u_b = normalise(mean over the nodes t of word b of norm(h_t))
    infonce     ½ Σ over both directions of mean_i [ log Σ_{j allowed} exp(u_i·v_j / τ) - u_i·v_i / τ ]
    hinge       mean_i max(0, margin - u_i·v_i + max_{j allowed, j ≠ i} u_i·v_j)

Letters: B batch, T nodes, M rows, K in-features, N out-features, R rank, D width, E edges.
Norms, cosines and losses are computed in fp32 for any input dtype; only ``linear`` and ``lora_linear`` work in the dtype of their input.
"""

import torch
import torch.nn.functional as F
from tli_kernels.nf4_weight import BLOCKSIZE, NESTED_BLOCKSIZE, NF4Weight
from tli_kernels.token_table import TokenTable
from torch import Tensor

# F.normalize's own guard, named because the kernels must use the same
UNIT_EPS = 1e-12

_UINT32 = 0xFFFFFFFF
# multipliers of the 32-bit integer mixer "lowbias32" (C. Wellons, hash-prospector, public domain)
_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B
# 512 KiB of keys
_KEYS_AT_ONCE = 1 << 17
# separates column counters from row counters; the first 32 bits of the golden ratio
_COLUMN_SALT = 0x9E3779B9


def keep_mask(
    seed: Tensor | int, rows: int, columns: int, dropout: float, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool
) -> Tensor:
    """Dropout mask of a [rows, columns] input: a pure function of (seed, row, column).

    Counter-based, so that the backward pass regenerates it and no mask is stored. Each row and each column has a 32-bit key
    by lowbias32; their sum goes through its two multiplications again, and an element is kept if the result, as a signed
    number, is at least dropout·2³² - 2³¹. The seed is a number or int64 [1].

    Returns:
        [rows, columns] in ``dtype``; True, or 1, with probability 1 - dropout.
    """
    row_keys = _mix(_mix(torch.arange(rows, device=device) ^ (seed & _UINT32)) ^ ((seed >> 32) & _UINT32))
    column_keys = _mix(torch.arange(columns, device=device) ^ _COLUMN_SALT)
    row_keys, column_keys, least = _as_signed(row_keys)[:, None], _as_signed(column_keys), int(dropout * 2.0**32) - (1 << 31)
    kept = torch.empty(rows, columns, dtype=dtype, device=device)
    # some rows at a time, so that every pass over them hits the CPU's cache
    step = max(1, _KEYS_AT_ONCE // max(1, columns))
    x, shifted = torch.empty(2, min(step, rows), columns, dtype=torch.int32, device=device)
    for first in range(0, rows, step):
        keys = row_keys[first : first + step]
        x, shifted = x[: len(keys)], shifted[: len(keys)]
        # wrapping 32-bit arithmetic, in place
        torch.add(keys, column_keys, out=x)
        x ^= torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF)
        x *= _MIX_1
        x ^= torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF)
        x *= _MIX_2 - (1 << 32)
        torch.ge(x, least, out=kept[first : first + step])
    return kept


def _mix(x: Tensor) -> Tensor:
    """lowbias32 of numbers below 2³², held in 64 bits."""
    x = ((x ^ (x >> 16)) * _MIX_1) & _UINT32
    x = ((x ^ (x >> 15)) * _MIX_2) & _UINT32
    return x ^ (x >> 16)


def _as_signed(x: Tensor) -> Tensor:
    return torch.where(x < 1 << 31, x, x - (1 << 32)).to(torch.int32)


def dequantise(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """W_nk = code[q_nk] · scale_b, b = (n·K + k) // 64; nested, scale_b = nested_code[absmax_b] · nested_absmax_{b // 256} + offset.

    Args:
        weight:  the packed weight [N, K]
        dtype:   of the result

    Returns:
        [N, K] in ``dtype``, computed in fp32 and rounded once. Source: QLoRA (arXiv 2305.14314).
    """
    scales = block_scales(weight)
    numbers = torch.stack([weight.codes >> 4, weight.codes & 15], dim=1)
    values = weight.code[numbers.int()].view(-1, BLOCKSIZE) * scales[:, None]
    return values.to(dtype).view(weight.shape)


def block_scales(weight: NF4Weight) -> Tensor:
    """scale_b of each block of 64: fp32 [N·K / 64]."""
    if not weight.nested:
        return weight.absmax
    units = weight.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: len(weight.absmax)]
    return weight.nested_code[weight.absmax.int()] * units + weight.offset


def linear(x: Tensor, weight: Tensor | NF4Weight | TokenTable, bias: Tensor | None = None) -> Tensor:
    """y = x·Wᵀ + bias with frozen weights.

    Args:
        x:       [..., K] in the compute dtype
        weight:  [N, K] frozen: a tensor in x's dtype, an ``NF4Weight``, dequantised to x's dtype, or a ``TokenTable`` of its products
        bias:    [N] frozen, or None

    Returns:
        [..., N] in x's dtype. Gradient to x alone; none where the weight is a ``TokenTable``.
    """
    if isinstance(weight, TokenTable):
        return weight.lookup(x.reshape(-1, x.shape[-1])).to(x.dtype).view(*x.shape[:-1], weight.shape[0])
    if isinstance(weight, NF4Weight):
        weight = dequantise(weight, x.dtype)
    return F.linear(x, weight, bias)


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight | TokenTable,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | int = 0,
) -> Tensor:
    """y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ + bias.

    Args:
        x:        [..., K] in the compute dtype
        weight:   [N, K] frozen, as for ``linear``
        lora_a:   [R, K] cast to x's dtype
        lora_b:   [N, R] cast to x's dtype
        scale:    s, alpha/R or alpha/sqrt(R)
        bias:     [N] or None
        dropout:  probability that an element of x is dropped from the low-rank path; the rest is scaled up
        seed:     of ``keep_mask``, one per call and step

    Returns:
        [..., N] in x's dtype. Gradients to x, lora_a and lora_b; none to weight and bias.
    """
    rows = x.reshape(-1, x.shape[-1])
    kept = rows * keep_mask(seed, *rows.shape, dropout, x.device) if dropout > 0.0 else rows
    low_rank = F.linear(kept, lora_a.to(x.dtype))
    y = torch.addmm(linear(rows, weight, bias), low_rank, lora_b.to(x.dtype).t(), alpha=scale / (1.0 - dropout))
    return y.view(*x.shape[:-1], weight.shape[0])


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
        states:       [T, D] token states of the packed nodes
        indptr:       int64 [B+1] where each word's nodes begin
        indices:      int64 [E] the nodes of each word; nodes may be shared between words
        norm_weight:  [D] or None; with it, norm(h) = h / sqrt(mean(h²) + norm_eps) · norm_weight, else norm(h) = h
        norm_eps:     of that norm
        transposed:   ``transpose_paths(indptr, indices, T)`` or None; not needed here

    Returns:
        fp32 [B, D] unit rows; zeros for a word without nodes. Gradient to states.
    """
    tokens = states.float()
    if norm_weight is not None:
        tokens = F.rms_norm(tokens, tokens.shape[-1:], norm_weight.float(), norm_eps)
    means = F.embedding_bag(indices, tokens, indptr, mode="mean", include_last_offset=True)
    return F.normalize(means, dim=-1, eps=UNIT_EPS)


def transpose_paths(indptr: Tensor, indices: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Transpose the paths (CSR to CSC): for each node the words that contain it, in order, as ``pool_norm``'s gradient reads them.

    Args:
        indptr:   int64 [B+1] where each word's nodes begin
        indices:  int64 [E] the nodes of each word
        nodes:    T

    Returns:
        int64 [T+1] where each node's words begin, and int64 [E] the words; a word occurs as often as it contains the node. No
        synchronisation with a GPU. An index that is no node is in no node's list; one outside every word gives the word -1 or B.
    """
    nodes_in_order, entries = torch.sort(indices, stable=True)
    node_indptr = torch.searchsorted(nodes_in_order, torch.arange(nodes + 1, device=indices.device))
    words = torch.searchsorted(indptr, entries, right=True) - 1
    return node_indptr, words


def infonce(source: Tensor, target: Tensor, temperature: float | Tensor, false_negatives: Tensor) -> Tensor:
    """Symmetric InfoNCE over a batch of unit vectors, without false negatives.

    Args:
        source:           fp32 [B, D] unit rows
        target:           fp32 [B, D] unit rows; row i belongs to source row i
        temperature:      τ
        false_negatives:  int64 [E, 2] ordered (i, j), i ≠ j: left out of the negatives

    Returns:
        fp32 scalar; ln(B) if all vectors are equal. Gradients to source, target and a tensor temperature.
        Source: van den Oord et al. 2018 (arXiv 1807.03748); symmetric as in CLIP (arXiv 2103.00020).
    """
    logits = source.float() @ target.float().t() / temperature
    logits = logits.index_put((false_negatives[:, 0], false_negatives[:, 1]), logits.new_tensor(float("-inf")))
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def hinge(source: Tensor, target: Tensor, margin: float, false_negatives: Tensor) -> Tensor:
    """mean_i max(0, margin - u_i·v_i + max_{j allowed, j ≠ i} u_i·v_j): the hardest negative, source to target only.

    Args:
        source:           fp32 [B, D] unit rows
        target:           fp32 [B, D] unit rows
        margin:           the paper's 0.4
        false_negatives:  int64 [E, 2] ordered (i, j), i ≠ j

    Returns:
        fp32 scalar; a row without any negative adds 0. Among equally hard negatives the gradient goes to the first.
        Source: TLI (arXiv 2506.15415).
    """
    cosines = source.float() @ target.float().t()
    own = torch.arange(len(cosines), device=cosines.device)
    negatives = cosines.index_put(
        (torch.cat([false_negatives[:, 0], own]), torch.cat([false_negatives[:, 1], own])), cosines.new_tensor(float("-inf"))
    )
    # argmax may return any of several equal columns; in a row with NaN none is equal, and any will do
    equal = negatives == negatives.amax(dim=1, keepdim=True)
    first = torch.where(equal, own, len(own) - 1).amin(dim=1, keepdim=True)
    return F.relu(margin - cosines.diagonal() + negatives.gather(1, first).squeeze(1)).mean()
