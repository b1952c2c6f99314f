"""A linear map as the head behind the pooling: word states of two languages into the space where translations are near."""

import dataclasses

import torch
from torch import Tensor

from tli.model.linear_map import LinearMap


@dataclasses.dataclass(frozen=True)
class MapHead:
    """``normalise((u - mean) @ matrix)``, of each language by its own mean and matrix; fp32, on the model's device.

    source_mean, target_mean      fp32 [D]
    source_matrix, target_matrix  fp32 [D, K]
    """

    source_mean: Tensor
    target_mean: Tensor
    source_matrix: Tensor
    target_matrix: Tensor

    @classmethod
    def from_linear(cls, linear: LinearMap, device: torch.device) -> "MapHead":
        return cls(**{field.name: torch.from_numpy(getattr(linear, field.name)).float().to(device) for field in dataclasses.fields(cls)})

    def __call__(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Word states of sources and of targets, fp32 [B, D] each -> their unit rows in the common space, fp32 [B, K]."""
        return self.of_source(source), self.of_target(target)

    def of_source(self, states: Tensor) -> Tensor:
        return torch.nn.functional.normalize((states - self.source_mean) @ self.source_matrix, dim=1)

    def of_target(self, states: Tensor) -> Tensor:
        return torch.nn.functional.normalize((states - self.target_mean) @ self.target_matrix, dim=1)
