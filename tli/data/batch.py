"""Packed words as tensors on the model's device."""

import dataclasses

import torch
from torch import Tensor, nn

from tli.data.packing import PackedWords
from tli.runtime import ops


@dataclasses.dataclass(frozen=True)
class Batch:
    """``PackedWords`` as the model takes them, on its device: T = bins·width nodes.

    input_ids     int64 [bins, width]
    position_ids  int64 [bins, width]
    mask          compute dtype [bins, 1, width, width], 0 where a node may look and the dtype's lowest value elsewhere
    indptr        int64 [words + 1]
    indices       int64 [entries]
    sinks         int64 [words]
    transposed    int64 [T + 1] and [entries], ``ops.transpose_paths`` of indptr and indices; None: made where it is needed
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    indptr: Tensor
    indices: Tensor
    sinks: Tensor
    transposed: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        return [self.input_ids, self.position_ids, self.mask, self.indptr, self.indices, self.sinks, *(self.transposed or ())]

    def clone(self) -> "Batch":
        """The same in memory of its own."""
        input_ids, position_ids, mask, indptr, indices, sinks, node_indptr, words = (tensor.clone() for tensor in self.tensors())
        return Batch(input_ids, position_ids, mask, indptr, indices, sinks, (node_indptr, words))

    def padded(self, step: int) -> "Batch":
        """The same, its entries filled up to a multiple of ``step`` with some behind the last word's, which the fused ops pass by."""
        # what pads has made it
        assert self.transposed is not None
        missing, (node_indptr, words) = -len(self.indices) % step, self.transposed
        words = nn.functional.pad(words, (0, missing))
        return dataclasses.replace(self, indices=nn.functional.pad(self.indices, (0, missing)), transposed=(node_indptr, words))


def to_batch(packed: PackedWords, dtype: torch.dtype, device: torch.device) -> Batch:
    """Move packed words to the model's device and turn what a node sees into an additive mask of its dtype."""
    move = {
        name: torch.from_numpy(getattr(packed, name)).to(device) for name in ("input_ids", "position_ids", "indptr", "indices", "sinks")
    }
    hidden = torch.from_numpy(~packed.attention_mask).to(device)[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
    paths = ops.transpose_paths(torch.from_numpy(packed.indptr), torch.from_numpy(packed.indices), packed.input_ids.size)
    return Batch(mask=mask, transposed=tuple(part.to(device) for part in paths), **move)
