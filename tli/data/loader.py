"""Data loader: an epoch's batches, sampled, packed one by one while the steps are taken, and prefetched to a GPU."""

import concurrent.futures
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tli.data.batch import Batch, to_batch
from tli.data.packing import TokenisedWords
from tli.data.pair_store import Pair, WordHashes, as_disk_backed
from tli.data.word_pairs import false_negative_edges
from tli.runtime.device import DeviceConfig
from tli.runtime.errors import TliError

# a batch in micro-batches, and its false negatives, int64 [E, 2]
Step = tuple[list[Batch], Tensor]


class BatchLoader:
    """Batches of random pairs, of nearly equal size; what a batch costs depends on the batch alone, not on the list.

    Args:
        words:          sources first (trained, then held out), then targets in the same order
        pairs:          the trained ones
        device_config:  where batches go, in which dtype
        batch:          pairs a batch, at most
        epochs:         passes over the pairs in the whole run
        micro_batch:    pairs a micro-batch, at most; None: the whole batch
        pool_bos:       pool the first position into every word
        seed:           of the order
        partners:       whose target each source is taught with, int64; None: its own

    Raises:
        TliError: a number that is too small.
    """

    def __init__(
        self,
        words: TokenisedWords,
        pairs: Sequence[Pair],
        device_config: DeviceConfig,
        *,
        batch: int,
        epochs: int = 1,
        micro_batch: int | None = None,
        pool_bos: bool = False,
        seed: int = 0,
        partners: np.ndarray | None = None,
    ):
        if micro_batch is not None and micro_batch < 1:
            raise TliError("--micro-batch", "a part of a batch must have at least 1 pair", micro_batch, "raise it, or leave it out")
        if batch < 2 or epochs < 1:
            got = f"batch {batch}, epochs {epochs}"
            raise TliError("--batch, --epochs", "a batch must have at least 2 pairs, and a run at least 1 epoch", got, "raise them")
        self.words, self.pairs, self.device_config = words, as_disk_backed(pairs), device_config
        self.micro_batch, self.pool_bos, self.seed = micro_batch, pool_bos, seed
        self.partners = np.arange(len(pairs)) if partners is None else partners
        self.per_epoch = -(-len(pairs) // batch)
        self.total = self.per_epoch * epochs

    def steps(self, first: int = 0) -> Iterator[Step]:
        """The batches of the whole run, from step ``first`` (0, 1, ...) on."""
        epoch, skip = divmod(first, self.per_epoch)
        while epoch * self.per_epoch < self.total:
            yield from self.epoch(epoch, skip)
            epoch, skip = epoch + 1, 0

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Step]:
        """The epoch's batches from the ``skip``-th on."""
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.partners))
        # as np.array_split, without a list of them all
        size, larger = divmod(len(order), self.per_epoch)
        for number in range(skip, self.per_epoch):
            start = number * size + min(number, larger)
            yield self._batch(order[start : start + size + (number < larger)])

    def bytes(self) -> int:
        """Memory of a packed batch, and of those of the tokenised words' arrays that are not mapped from a file."""
        tensors: list[Tensor | np.ndarray] = [*tensors_of(*next(self.epoch(0)))]
        held = [] if self.device_config.device.type == "cuda" else [self.words.indptr, self.words.starts, self.words.vocab_ids]
        return sum(tensor.nbytes for tensor in [*tensors, *held])

    def _batch(self, pairs: np.ndarray) -> Step:
        count = -(-len(pairs) // (self.micro_batch or len(pairs)))
        micro_batches = [self._micro_batch(numbers) for numbers in np.array_split(pairs, count)]
        sources, targets = self.pairs.keys(pairs), self.pairs.keys(self.partners[pairs])
        # row by row, as the fused losses walk them
        false_negatives = false_negative_edges(WordHashes(sources.sources, targets.indptr, targets.glosses))
        return micro_batches, torch.from_numpy(false_negatives).to(self.device_config.device)

    def _micro_batch(self, pairs: np.ndarray) -> Batch:
        targets = self.partners[pairs] + len(self.words) // 2
        packed = self.words.pack(np.concatenate([pairs, targets]), self.pool_bos, width_step=self.device_config.width_step)
        return to_batch(packed, self.device_config.dtype, self.device_config.device)


def prefetch(steps: Iterable[Step], device: torch.device) -> Iterator[Step]:
    """Prefetch: pack the next batch on another thread and CUDA stream while the current step runs.

    On a CPU, where both would compete for the same processors, a batch is packed when it is asked for.
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
            (micro_batches, false_negatives), event = result
            here = torch.cuda.current_stream(device)
            here.wait_event(event)
            for tensor in tensors_of(micro_batches, false_negatives):
                # its memory may be reused only when this stream is done with it
                tensor.record_stream(here)
            yield micro_batches, false_negatives


def tensors_of(micro_batches: list[Batch], false_negatives: Tensor) -> list[Tensor]:
    return [tensor for micro_batch in micro_batches for tensor in micro_batch.tensors()] + [false_negatives]
