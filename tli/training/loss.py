"""Contrastive losses over word embeddings: symmetric InfoNCE, and the hinge with the hardest negative."""

import dataclasses

from torch import Tensor

from tli.runtime import ops
from tli.runtime.ops import Ops


@dataclasses.dataclass(frozen=True)
class Objective:
    """``infonce`` with its temperature, or ``hinge`` with its margin."""

    loss: str
    temperature: float
    margin: float
    ops: Ops = ops.REFERENCE

    def __call__(self, embeddings: Tensor, false_negatives: Tensor) -> Tensor:
        """The loss of a batch: unit embeddings, fp32 [2B, D], sources first, and the false negatives, int64 [E, 2]."""
        source, target = embeddings.chunk(2)
        if self.loss == "infonce":
            return self.ops.infonce(source, target, self.temperature, false_negatives)
        return self.ops.hinge(source, target, self.margin, false_negatives)
