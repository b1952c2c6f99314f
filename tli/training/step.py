"""One training step: forward, loss, backward, gradient clipping, AdamW; on a GPU replayed as a CUDA graph, one for each shape of batch.

A step depends on its batch, its learning rate and its dropout seeds alone. All of these lie in memory that a CUDA graph reads when it
is replayed, so each replay has its own dropout. Nothing in a GPU's step waits for the GPU: batches are made and moved by another
thread on another stream, losses are read once they have arrived, and a loss or gradient that is not finite is seen by the GPU itself,
which from then on changes no adapter. The first steps run eagerly, so that AdamW's moments exist before the first capture; and so does
each shape when it first comes, so that its kernels are built and loaded and its libraries have made their plans before it is captured.
Beyond a number of shapes a step runs eagerly.
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

from tli.data.batch import Batch
from tli.data.loader import Step, tensors_of
from tli.model import lora
from tli.runtime.errors import TliError
from tli.training import collapse, grad_cache
from tli.training.kept_text import KeptText
from tli.training.loss import Objective
from tli.training.memory.profile import FORWARD, LOSS, OPTIMISER

_STEPS_BEFORE_CAPTURE = 3
# entries and false negatives are padded to multiples of these
_ENTRIES_STEP, _FALSE_NEGATIVES_STEP = 256, 16
_MOST_SHAPES = 32
# so that a stop, or a loss that is not finite, is noticed soon
_MOST_AHEAD = 16


@dataclasses.dataclass(frozen=True)
class OptimiserSettings:
    """AdamW, its learning-rate schedule, and gradient clipping.

    lr            peak learning rate
    weight_decay  decoupled weight decay
    clip          largest gradient norm; 0 turns clipping off
    warmup        steps of linear warm-up
    schedule      "linear" or "cosine" decay towards 0 at ``total`` steps, or "constant"
    total         steps of the whole run
    """

    lr: float
    weight_decay: float = 0.01
    clip: float = 0.0
    warmup: int = 0
    schedule: str = "constant"
    total: int = 1


@dataclasses.dataclass(frozen=True)
class StepResult:
    """A step's loss, its learning rate, the norm of its gradients before clipping, the term for kept text, 0 without one, and how far the
    batch's words are apart (``collapse.spread``)."""

    loss: float
    lr: float
    grad_norm: float
    keep: float
    mismatched: float
    effective_rank: float


@dataclasses.dataclass
class CapturedStep:
    """A CUDA graph of one step, the batch that it reads, and where it leaves what was measured, fp32 [5]."""

    graph: torch.cuda.CUDAGraph
    micro_batches: list[Batch]
    false_negatives: Tensor
    measured: Tensor


class TrainStep:
    """Takes the optimiser steps of one run.

    Args:
        decoder:          the model, with adapters
        embed:            packed words -> their embeddings, fp32 [2b, D]
        objective:        the loss; with fused ops, which take a padded batch, steps on a GPU are captured and replayed
        optimiser:        settings of AdamW, its schedule and the clipping
        seed:             of dropout
        check_gradients:  stop in the run's first two steps if an adapter gets no gradient
        keep:             the term for running text that must stay where it was
    """

    def __init__(
        self,
        decoder: nn.Module,
        embed: Callable[[Batch], Tensor],
        objective: Objective,
        optimiser: OptimiserSettings,
        seed: int = 0,
        check_gradients: bool = True,
        keep: KeptText | None = None,
    ):
        self.decoder, self.embed, self.objective, self.settings, self.keep = decoder, embed, objective, optimiser, keep
        self.seed, self.check_gradients = seed, check_gradients
        self.adapters, self.parameters = lora.adapters(decoder), lora.trainable(decoder)
        self.device = self.parameters[0].device
        self.on_gpu = self.device.type == "cuda"
        self.use_cuda_graphs = self.on_gpu and objective.ops.kind == "fused"
        self.dropout = any(adapter.dropout > 0 for adapter in self.adapters.values())
        self.seeds = torch.zeros(len(self.adapters), dtype=torch.int64, device=self.device)
        for adapter, own_seed in zip(self.adapters.values(), self.seeds.split(1), strict=True):
            adapter.seed = own_seed
        # 1 as soon as a loss or a gradient was not finite: fused AdamW then leaves everything as it is
        self.found_inf = torch.zeros((), device=self.device)
        in_memory: dict[str, Any] = {"lr": torch.zeros((), device=self.device), "fused": True, "capturable": True} if self.on_gpu else {}
        self.optimiser = torch.optim.AdamW(self.parameters, weight_decay=optimiser.weight_decay, **in_memory)
        if self.on_gpu:
            # fused AdamW reads it by getattr, as torch.amp's scaler sets it; the class does not declare it
            self.optimiser.found_inf = self.found_inf  # type: ignore[attr-defined]
        # of the step's batch, left by its loss
        self.spread = torch.zeros(2, device=self.device)
        self.taken = 0
        self.graphs: dict[tuple, CapturedStep] = {}
        self.shapes_met: set[tuple] = set()
        self.graph_pool = torch.cuda.graph_pool_handle() if self.use_cuda_graphs else None
        self.pending_results: collections.deque[tuple[float, Tensor, torch.cuda.Event | None]] = collections.deque()

    def __call__(self, position: int, micro_batches: list[Batch], false_negatives: Tensor) -> None:
        """Take step ``position`` (0, 1, ...) of the run; its result comes out of ``pop_results``.

        Args:
            position:         of the step in the run
            micro_batches:    of the batch
            false_negatives:  int64 [E, 2], the batch's false negatives: pairs that mean the same

        Raises:
            TliError: in the run's first two steps, an adapter without a gradient; on a CPU, a loss or a gradient that is not finite.
        """
        lr = self._prepare(position)
        if self.use_cuda_graphs:
            micro_batches, false_negatives = _padded(micro_batches, false_negatives)
        shape = tuple(tensor.shape for tensor in tensors_of(micro_batches, false_negatives))
        early = self.taken < _STEPS_BEFORE_CAPTURE or position < 2 or shape not in self.shapes_met
        self.shapes_met.add(shape)
        if self.use_cuda_graphs and not early and (shape in self.graphs or len(self.graphs) < _MOST_SHAPES):
            measured = self._replay(shape, micro_batches, false_negatives)
        else:
            losses = self._gradients(micro_batches, false_negatives)
            if not self.on_gpu:
                require_finite(position, losses.sum().item())
            if position < 2 and self.check_gradients:
                lora.check_gradients(self.decoder, position)
            measured = self._update(losses, position)
        self._send(lr, measured)
        self.taken += 1

    def pop_results(self, wait: bool = False) -> Iterator[StepResult]:
        """The results, in the order of the steps, that have arrived since the last call; all of them if ``wait``."""
        while self.pending_results:
            lr, measured, event = self.pending_results[0]
            if event is not None and not event.query():
                if not wait and len(self.pending_results) < _MOST_AHEAD:
                    return
                event.synchronize()
            self.pending_results.popleft()
            loss, keep, grad_norm, *spread = measured.tolist()
            yield StepResult(loss, lr, grad_norm, keep, *spread)

    def _prepare(self, position: int) -> float:
        """Set the step's learning rate and each adapter's dropout seed, without waiting for a GPU; returns the learning rate."""
        settings = self.settings
        lr = settings.lr * lr_multiplier(position, settings.total, settings.warmup, settings.schedule)
        for group in self.optimiser.param_groups:
            if self.on_gpu:
                group["lr"].copy_(torch.tensor(lr).pin_memory(), non_blocking=True)
            else:
                group["lr"] = lr
        if self.dropout:
            sequences = (np.random.SeedSequence([self.seed, 2, position, index]) for index in range(len(self.seeds)))
            seeds = torch.tensor([int(sequence.generate_state(1, np.uint64)[0] >> 1) for sequence in sequences])
            self.seeds.copy_(seeds.pin_memory() if self.on_gpu else seeds, non_blocking=True)
        if self.keep is not None:
            self.keep.choose(position)
        return lr

    def _gradients(self, micro_batches: list[Batch], false_negatives: Tensor) -> Tensor:
        """Backpropagate; returns the loss of the words and the term for kept text, fp32 [2]."""
        self.optimiser.zero_grad()
        loss = grad_cache.backward(micro_batches, self._embed, lambda embeddings: self._loss(embeddings, false_negatives))
        if self.keep is None:
            return torch.stack([loss, torch.zeros_like(loss)])
        # behind the words' backward pass: neither holds its activations while the other runs
        with record_function(FORWARD):
            kept = self.keep()
        kept.backward()
        return torch.stack([loss, kept.detach()])

    def _embed(self, micro_batch: Batch) -> Tensor:
        with record_function(FORWARD):
            return self.embed(micro_batch)

    def _loss(self, embeddings: Tensor, false_negatives: Tensor) -> Tensor:
        with record_function(LOSS):
            self.spread = collapse.spread(embeddings)
            return self.objective(embeddings, false_negatives)

    def _update(self, losses: Tensor, position: int = 0) -> Tensor:
        """Clip the gradients and let AdamW step; returns the loss, the term for kept text, the gradient norm and the spread, fp32 [5]."""
        with record_function(OPTIMISER):
            grad_norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            if self.on_gpu:
                finite = torch.isfinite(losses.sum() + grad_norm)
                self.found_inf.copy_(torch.maximum(self.found_inf, 1 - finite.float()))
            else:
                require_finite(position, grad_norm.item(), "gradient norm")
            if self.settings.clip > 0:
                nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, grad_norm)
            self.optimiser.step()
            return torch.cat([losses, grad_norm[None], self.spread])

    def _replay(self, shape: tuple, micro_batches: list[Batch], false_negatives: Tensor) -> Tensor:
        if shape not in self.graphs:
            self.graphs[shape] = self._capture(micro_batches, false_negatives)
        captured = self.graphs[shape]
        inputs = tensors_of(captured.micro_batches, captured.false_negatives)
        for memory, fresh in zip(inputs, tensors_of(micro_batches, false_negatives), strict=True):
            memory.copy_(fresh)
        captured.graph.replay()
        return captured.measured

    def _capture(self, micro_batches: list[Batch], false_negatives: Tensor) -> CapturedStep:
        # the graph's own inputs, which each replay's batch is copied into
        micro_batches, false_negatives = [micro_batch.clone() for micro_batch in micro_batches], false_negatives.clone()
        graph = torch.cuda.CUDAGraph()
        # the thread that makes batches pins and copies meanwhile, which a capture in "global" mode forbids to all threads
        with torch.cuda.graph(graph, pool=self.graph_pool, capture_error_mode="thread_local"):
            measured = self._update(self._gradients(micro_batches, false_negatives))
        # the gradients are the graph's own
        self.optimiser.zero_grad()
        return CapturedStep(graph, micro_batches, false_negatives, measured)

    def _send(self, lr: float, measured: Tensor) -> None:
        """Queue a step's result; from a GPU its copy to the CPU is not waited for."""
        if not self.on_gpu:
            self.pending_results.append((lr, measured, None))
            return
        arrived, event = torch.empty(len(measured), pin_memory=True), torch.cuda.Event()
        arrived.copy_(measured, non_blocking=True)
        event.record()
        self.pending_results.append((lr, arrived, event))


def lr_multiplier(step: int, total: int, warmup: int, schedule: str) -> float:
    """The learning-rate schedule: the share of the peak at step 0, 1, ...; linear warm-up, then linear or cosine decay towards 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    left = (total - step) / max(1, total - warmup)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def require_finite(position: int, value: float, what: str = "loss") -> None:
    """Raise ``TliError`` for a loss, or a gradient norm, of step ``position`` that is infinite or no number."""
    if not math.isfinite(value):
        raise TliError(f"step {position + 1}", f"the {what} must be finite", value, "lower --lr, or check the model's weights")


def _padded(micro_batches: list[Batch], false_negatives: Tensor) -> Step:
    """The same batch in one of few shapes. A false negative may be listed more than once."""
    missing = -len(false_negatives) % _FALSE_NEGATIVES_STEP
    if missing:
        false_negatives = torch.cat([false_negatives, false_negatives[-1:].expand(missing, 2)])
    return [micro_batch.padded(_ENTRIES_STEP) for micro_batch in micro_batches], false_negatives
