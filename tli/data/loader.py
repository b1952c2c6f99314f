"""An epoch's batches, packed one after the other while the steps are taken: what a batch costs depends on the batch alone."""

import concurrent.futures
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tli.config import TrainConfig
from tli.data.batch import Batch, to_batch
from tli.data.packing import TokenisedWords
from tli.data.pair_store import Pair, WordHashes, stored
from tli.data.word_pairs import false_negative_edges
from tli.runtime.device import Placement
from tli.runtime.errors import TliError

# a batch in the parts that --micro-batch makes, and its pairs that are no negatives
Step = tuple[list[Batch], Tensor]


class BatchLoader:
    """Each epoch's batches: random pairs in parts of nearly equal size.

    Words are numbered sources first (trained, then held out), then targets in the same order. ``partners`` says whose target each of
    the trained ``pairs`` is taught with.
    """

    def __init__(self, config: TrainConfig, words: TokenisedWords, partners: np.ndarray, pairs: Sequence[Pair], placement: Placement):
        if config.micro_batch is not None and config.micro_batch < 1:
            raise TliError("--micro-batch", "a part of a batch must have at least 1 pair", config.micro_batch, "raise it, or leave it out")
        if config.batch < 2 or config.epochs < 1:
            got = f"batch {config.batch}, epochs {config.epochs}"
            raise TliError("--batch, --epochs", "a batch must have at least 2 pairs, and a run at least 1 epoch", got, "raise them")
        self.config, self.words, self.partners, self.pairs, self.placement = config, words, partners, stored(pairs), placement
        self.per_epoch = -(-len(partners) // config.batch)
        self.total = self.per_epoch * config.epochs

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[list[Batch], torch.Tensor]]:
        """The epoch's batches from the ``skip``-th on, each in parts, with its pairs (i, j) that are no negatives: int64 [E, 2]."""
        order = np.random.default_rng([self.config.seed, 0, epoch]).permutation(len(self.partners))
        # as np.array_split, without a list of them all
        size, larger = divmod(len(order), self.per_epoch)
        for number in range(skip, self.per_epoch):
            start = number * size + min(number, larger)
            yield self._batch(order[start : start + size + (number < larger)])

    def bytes(self) -> int:
        """Of a packed batch, and of the tokenised words what is not in their file."""
        parts, same = next(self.epoch(0))
        tensors: list[torch.Tensor | np.ndarray] = [same, *(tensor for part in parts for tensor in part.tensors())]
        held = [] if self.placement.device.type == "cuda" else [self.words.indptr, self.words.starts, self.words.rows]
        return sum(tensor.nbytes for tensor in [*tensors, *held])

    def _batch(self, pairs: np.ndarray) -> tuple[list[Batch], torch.Tensor]:
        parts = [self._part(part) for part in np.array_split(pairs, -(-len(pairs) // (self.config.micro_batch or len(pairs))))]
        sources, targets = self.pairs.keys(pairs), self.pairs.keys(self.partners[pairs])
        # row by row, as the fused losses walk them
        same = false_negative_edges(WordHashes(sources.sources, targets.indptr, targets.glosses))
        return parts, torch.from_numpy(same).to(self.placement.device)

    def _part(self, pairs: np.ndarray) -> Batch:
        targets = self.partners[pairs] + len(self.words) // 2
        packed = self.words.pack(np.concatenate([pairs, targets]), self.config.pool_bos, width_step=self.placement.width_step)
        return to_batch(packed, self.placement.dtype, self.placement.device)


def prefetch(steps: Iterable[Step], device: torch.device) -> Iterator[Step]:
    """Prefetch: pack the next batch on another thread and CUDA stream while the current step runs.

    On a CPU, where both would want the same processors, they are made when they are asked for.
    """
    if device.type != "cuda":
        yield from steps
        return
    iterator, stream = iter(steps), torch.cuda.Stream(device)

    def make() -> tuple[Step, torch.cuda.Event] | None:
        with torch.cuda.stream(stream):
            step = next(iterator, None)
            return None if step is None else (step, stream.record_event())

    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        made = worker.submit(make)
        while (result := made.result()) is not None:
            made = worker.submit(make)
            (parts, same), event = result
            here = torch.cuda.current_stream(device)
            here.wait_event(event)
            for tensor in tensors_of(parts, same):
                # its memory may be used anew only when this stream is done with it
                tensor.record_stream(here)
            yield parts, same


def tensors_of(parts: list[Batch], same: Tensor) -> list[Tensor]:
    return [tensor for part in parts for tensor in part.tensors()] + [same]
