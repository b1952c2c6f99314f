"""Token states -> word states."""

import dataclasses

import torch
from torch import Tensor

from tli.data.batch import Batch
from tli.model.checkpoint import Checkpoint
from tli.model.shape import Layer
from tli.runtime.ops import REFERENCE, Ops


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a word state comes of token states: a norm on each token, the mean over the word's nodes, unit length; in fp32.

    norm_weight:  fp32 [D], the weight of the token norm; None leaves token states as they are
    norm_eps:     its epsilon
    ops:          the implementation
    """

    norm_weight: Tensor | None
    norm_eps: float
    ops: Ops = REFERENCE

    @classmethod
    def from_checkpoint(cls, token_norm: str, checkpoint: Checkpoint, device: torch.device, ops: Ops = REFERENCE) -> "Pooling":
        """The pooling for a ``--token-norm``: ``final`` reads the model's final norm, ``rms`` has unit weights, ``none`` is none."""
        weight: Tensor | None
        weight, eps = None, checkpoint.norm_eps
        if token_norm == "final":
            weight, eps = checkpoint.final_norm()
        elif token_norm == "rms":
            weight = torch.ones(checkpoint.config.hidden_size)
        return cls(None if weight is None else weight.to(device), eps, ops)

    def __call__(self, states: Tensor, batch: Batch) -> Tensor:
        """Word states of packed words: token states [T, D] -> fp32 unit rows [words, D]."""
        return self.ops.pool_norm(states, batch.indptr, batch.indices, self.norm_weight, self.norm_eps, batch.transposed)

    def for_layer(self, layer: Layer) -> "Pooling":
        """The pooling of a layer's states: those of ``output`` are normalised already."""
        return self.without_norm() if layer == "output" else self

    def without_norm(self) -> "Pooling":
        """The same without a token norm."""
        return dataclasses.replace(self, norm_weight=None)


def resolve_token_norm(token_norm: str, checkpoint: Checkpoint) -> str:
    """What ``auto`` means for this checkpoint: ``final``, or ``rms`` where that is a LayerNorm, or in a folder without its shard."""
    if token_norm != "auto":
        return token_norm
    if checkpoint.family.layer_norm:
        return "rms"
    return "final" if checkpoint.folder is None or checkpoint.at_hand(checkpoint.norm) else "rms"
