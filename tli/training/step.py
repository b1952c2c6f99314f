"""One optimiser step: eager on a CPU; on a GPU captured once for each shape of batch as a CUDA graph and replayed.

    loss = objective(pool(states))  ->  gradients  ->  clipped  ->  AdamW

A step depends on its batch, its learning rate and its dropout seeds alone; all of these lie in memory that a CUDA graph reads when it
is replayed, so each replay drops other elements. Nothing in a GPU's step waits for the GPU: batches are made and moved by another
thread on another stream, losses are read when they have arrived, and a loss that is not finite is seen by the GPU itself, which from
then on changes no adapter. The first steps run as they are written, so that kernels are compiled and AdamW's moments are there
before the first recording; a shape that is new later is recorded then, and beyond a number of shapes a step runs as it is written.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from tli.config import TrainConfig
from tli.data.batch import Batch
from tli.data.loader import Step, tensors_of
from tli.model import lora
from tli.runtime.device import Placement
from tli.runtime.errors import TliError
from tli.training import grad_cache
from tli.training.loss import Objective
from tli.training.memory.profile import FORWARD, LOSS, OPTIMISER

_STEPS_BEFORE_RECORDING = 3
# entries and pairs are filled up to multiples of these
_ENTRIES_STEP, _SAME_STEP = 256, 16
_MOST_SHAPES = 32
# so that a stop, or a loss that is not finite, is noticed soon
_MOST_AHEAD = 16


@dataclasses.dataclass
class CapturedStep:
    """A CUDA graph of one step, the batch that it reads, and where it leaves the loss."""

    graph: torch.cuda.CUDAGraph
    parts: list[Batch]
    same: Tensor
    loss: Tensor


class TrainStep:
    """Takes the steps of one run.

    Args:
        config:      the run's options
        decoder:     the model, with adapters
        vectors_of:  packed words -> their vectors, fp32 [2b, D]
        total:       steps of the whole run
        placement:   where, and with which ops: fused ones take a padded batch, so on a GPU steps are recorded and replayed
    """

    def __init__(self, config: TrainConfig, decoder: nn.Module, vectors_of: Callable[[Batch], Tensor], total: int, placement: Placement):
        self.config, self.decoder, self.vectors_of, self.total = config, decoder, vectors_of, total
        self.record = placement.device.type == "cuda" and placement.ops.kind == "fused"
        self.objective = Objective(config.loss, config.temperature, config.margin, placement.ops)
        self.adapters, self.parameters = lora.adapters(decoder), lora.trainable(decoder)
        self.device = self.parameters[0].device
        self.on_gpu = self.device.type == "cuda"
        self.seeds = torch.zeros(len(self.adapters), dtype=torch.int64, device=self.device)
        for adapter, seed in zip(self.adapters.values(), self.seeds.split(1), strict=True):
            adapter.seed = seed
        # 1 as soon as a loss was not finite: fused AdamW then leaves everything as it is
        self.found_inf = torch.zeros((), device=self.device)
        in_memory: dict[str, Any] = {"lr": torch.zeros((), device=self.device), "fused": True, "capturable": True} if self.on_gpu else {}
        self.optimiser = torch.optim.AdamW(self.parameters, weight_decay=config.weight_decay, **in_memory)
        if self.on_gpu:
            # fused AdamW reads it by getattr, as torch.amp's scaler sets it; the class does not declare it
            self.optimiser.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.taken = 0
        self.recordings: dict[tuple, CapturedStep] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.record else None
        self.pending_losses: collections.deque[tuple[Tensor, torch.cuda.Event | None]] = collections.deque()

    def take(self, position: int, parts: list[Batch], same: Tensor) -> None:
        """Take step ``position`` (0, 1, ...) of the run; its loss comes out of ``finished``.

        Args:
            position:  of the step in the run
            parts:     the batch, in the parts that ``--micro-batch`` makes
            same:      int64 [E, 2], its pairs that are no negatives

        Raises:
            TliError: in the run's first two steps, an adapter without a gradient; on a CPU, a loss that is not finite.
        """
        self._set(position)
        if self.record:
            parts, same = _padded(parts, same)
        shape = tuple(tensor.shape for tensor in tensors_of(parts, same))
        early = self.taken < _STEPS_BEFORE_RECORDING or position < 2
        if self.record and not early and (shape in self.recordings or len(self.recordings) < _MOST_SHAPES):
            loss = self._replay(shape, parts, same)
        else:
            loss = self._gradients(parts, same)
            if not self.on_gpu:
                require_finite(position, loss.item())
            if position < 2:
                lora.check_gradients(self.decoder, position)
            self._update(loss)
        self._send(loss)
        self.taken += 1

    def finished(self, wait: bool = False) -> Iterator[float]:
        """The losses, in the order of the steps, that have arrived since the last call; all of them if ``wait``."""
        while self.pending_losses:
            loss, event = self.pending_losses[0]
            if event is not None and not event.query():
                if not wait and len(self.pending_losses) < _MOST_AHEAD:
                    return
                event.synchronize()
            self.pending_losses.popleft()
            yield loss.item()

    def _set(self, position: int) -> None:
        """Hand the step its learning rate and each adapter's seed for dropout; a GPU is not waited for."""
        lr = self.config.lr * rate(position, self.total, self.config.warmup, self.config.schedule)
        for group in self.optimiser.param_groups:
            if self.on_gpu:
                group["lr"].copy_(torch.tensor(lr).pin_memory(), non_blocking=True)
            else:
                group["lr"] = lr
        if self.config.dropout > 0:
            sequences = (np.random.SeedSequence([self.config.seed, 2, position, index]) for index in range(len(self.seeds)))
            seeds = torch.tensor([int(sequence.generate_state(1, np.uint64)[0] >> 1) for sequence in sequences])
            self.seeds.copy_(seeds.pin_memory() if self.on_gpu else seeds, non_blocking=True)

    def _gradients(self, parts: list[Batch], same: Tensor) -> Tensor:
        self.optimiser.zero_grad()
        return grad_cache.backward(parts, self._vectors, lambda vectors: self._loss(vectors, same))

    def _vectors(self, part: Batch) -> Tensor:
        with record_function(FORWARD):
            return self.vectors_of(part)

    def _loss(self, vectors: Tensor, same: Tensor) -> Tensor:
        with record_function(LOSS):
            return self.objective(vectors, same)

    def _update(self, loss: Tensor) -> None:
        if self.on_gpu:
            self.found_inf.copy_(torch.maximum(self.found_inf, 1 - torch.isfinite(loss).float()))
        with record_function(OPTIMISER):
            if self.config.clip > 0:
                nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
            self.optimiser.step()

    def _replay(self, shape: tuple, parts: list[Batch], same: Tensor) -> Tensor:
        if shape not in self.recordings:
            self.recordings[shape] = self._recorded(parts, same)
        recording = self.recordings[shape]
        for memory, fresh in zip(tensors_of(recording.parts, recording.same), tensors_of(parts, same), strict=True):
            memory.copy_(fresh)
        recording.graph.replay()
        return recording.loss

    def _recorded(self, parts: list[Batch], same: Tensor) -> CapturedStep:
        graph, parts, same = torch.cuda.CUDAGraph(), [part.clone() for part in parts], same.clone()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self._gradients(parts, same)
            self._update(loss)
        # the gradients are the graph's own
        self.optimiser.zero_grad()
        return CapturedStep(graph, parts, same, loss)

    def _send(self, loss: Tensor) -> None:
        """Let a loss go to the CPU, without waiting for it."""
        if not self.on_gpu:
            self.pending_losses.append((loss, None))
            return
        arrived, event = torch.empty((), pin_memory=True), torch.cuda.Event()
        arrived.copy_(loss, non_blocking=True)
        event.record()
        self.pending_losses.append((arrived, event))


def rate(step: int, total: int, warmup: int, schedule: str) -> float:
    """The learning rate at step 0, 1, ... as a share of its peak: linear warm-up, then linear or cosine decay towards 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    left = (total - step) / max(1, total - warmup)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def require_finite(position: int, loss: float) -> None:
    """Raise ``TliError`` for a loss of step ``position`` that is infinite or no number."""
    if not math.isfinite(loss):
        raise TliError(f"step {position + 1}", "the loss must be finite", loss, "lower --lr, or check the model's weights")


def _padded(parts: list[Batch], same: Tensor) -> Step:
    """The same batch in one of few shapes. A pair that is no negative may stand there more than once."""
    missing = -len(same) % _SAME_STEP
    return [part.padded(_ENTRIES_STEP) for part in parts], torch.cat([same, same[-1:].expand(missing, 2)]) if missing else same
