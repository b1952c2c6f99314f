"""One pass over a model's layers that measures word pairs at each: what training reports, a scan shows, and adapters change."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from tli.data import word_pairs
from tli.data.batch import to_batch
from tli.data.packing import DEFAULT_WIDTH, TokenisedWords, tokenise
from tli.data.pair_store import Pair
from tli.metrics.alignment import Alignment, measure
from tli.metrics.clipscore import REF_CLIPSCORE, Scores, ref_clip_scores
from tli.metrics.layers import LayerScan, scan_layer
from tli.metrics.sink import sink_share
from tli.model.checkpoint import Checkpoint, sight
from tli.model.hidden_states import stream_layers
from tli.model.lora import Adapter
from tli.model.pooling import Pooling
from tli.model.shape import Layer
from tli.runtime.device import Placement
from tli.runtime.errors import TliError


def align_layers(
    checkpoint: Checkpoint,
    words: TokenisedWords,
    splits: dict[str, tuple[np.ndarray, np.ndarray]],
    pooling: Pooling,
    placement: Placement,
    streams: dict[str, Adapter | None],
    pool_bos: bool = False,
    done: Callable[[], None] = lambda: None,
) -> tuple[dict[tuple[str, str, int | str], Alignment], str | None]:
    """Measure the alignment of word pairs at every layer, for each split of the pairs and each stream, in one pass.

    Args:
        checkpoint:  an open checkpoint
        words:       all words, sources of all pairs first, then targets
        splits:      name -> (int64 pair numbers, their ``false_negative_pairs``); words of no other pair are looked at
        pooling:     token states -> word states; at ``output``, where states are normalised already, without its norm
        placement:   as for ``load_truncated_decoder``
        streams:     name -> adapter, or None for the base
        pool_bos:    pool the sink, too
        done:        called when a layer is measured

    Returns:
        The alignment by (split, stream, layer), and why the pass ended before ``output``, or None.
    """
    measured = np.concatenate([pairs for pairs, _ in splits.values()])
    packed = words.pack(np.concatenate([measured, measured + len(words) // 2]), pool_bos)
    batch = to_batch(packed, placement.dtype, placement.device)
    ends = list(itertools.accumulate((len(pairs) for pairs, _ in splits.values()), initial=0))
    alignments = {}

    def visit(layer: int | str, states: Sequence[Tensor]) -> None:
        for stream, nodes in zip(streams, states, strict=True):
            source, target = pooling.at(layer)(nodes, batch).chunk(2)
            share = sink_share(nodes, batch).view(2, -1).mean(0).cpu().numpy()
            for (split, (_, same)), *part in zip(splits.items(), ends, ends[1:]):
                own = slice(*part)
                alignments[split, stream, layer] = measure(source[own], target[own], same, share[own])
        done()

    return alignments, stream_layers(checkpoint, batch, words.rows, placement, list(streams.values()), visit)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One stream's pairs in one layer; ``referenced`` is None where no pair has a further accepted gloss."""

    alignment: Alignment
    referenced: Scores | None

    def per_pair(self) -> dict[str, np.ndarray]:
        """float64 [B] by metric, of all pairs."""
        return {metric: self.alignment.per_pair(metric) for metric in self.alignment.metrics}

    def per_referenced_pair(self) -> dict[str, np.ndarray]:
        """float64 [M] by metric, of the pairs that have references."""
        # asked only where there are some
        assert self.referenced is not None
        return dict(zip(REF_CLIPSCORE, (self.referenced.score, self.referenced.mismatched, self.referenced.gap)))


class _Enough(Exception):
    """The last layer that was asked for is measured."""


def measure_layers(
    checkpoint: Checkpoint,
    splits: Mapping[str, Sequence[Pair]],
    layers: Sequence[Layer],
    pooling: Pooling,
    placement: Placement,
    streams: dict[str | None, Adapter | None],
    prefix: str,
    pool_bos: bool = False,
    done: Callable[[], None] = lambda: None,
) -> tuple[dict[tuple[str, str | None, Layer], Measured], str | None]:
    """Measure every split's pairs for each stream at these layers; blocks above the last of them are not read.

    Args:
        checkpoint:  an open checkpoint
        splits:      pairs by the name of their list; each list is measured by itself
        layers:      0..N and ``output``
        pooling:     token states -> word states; at ``output``, where states are normalised already, without its norm
        placement:   dtype, device and rounding of the weights
        streams:     adapters by name; None is the base
        prefix:      text before each word
        pool_bos:    pool the sink, too
        done:        called after each layer, measured or not

    Returns:
        What was measured, by (split, stream, layer), and why layers are missing, or None.
    """
    pairs = [pair for part in splits.values() for pair in part]
    owners = np.repeat(np.arange(len(pairs)), [len(pair.synonyms) for pair in pairs])
    texts = [pair.source for pair in pairs] + [pair.target for pair in pairs] + [gloss for pair in pairs for gloss in pair.synonyms]
    words = tokenise(checkpoint.tokenizer(), texts, sight(checkpoint), prefix)
    batch = to_batch(words.pack(np.arange(len(texts)), pool_bos), placement.dtype, placement.device)
    ends = list(itertools.accumulate(map(len, splits.values()), initial=0))
    parts = {split: (slice(*ends[i : i + 2]), word_pairs.false_negative_pairs(part)) for i, (split, part) in enumerate(splits.items())}
    found = {}

    def visit(layer: Layer, states: Sequence[Tensor]) -> None:
        if layer in layers:
            for stream, nodes in zip(streams, states, strict=True):
                source, target, references = pooling.at(layer)(nodes, batch).tensor_split([len(pairs), 2 * len(pairs)])
                share = sink_share(nodes, batch)[: 2 * len(pairs)].view(2, -1).mean(0).cpu().numpy()
                for split, (own, same) in parts.items():
                    of_split = (owners >= own.start) & (owners < own.stop)
                    words_of = source[own], target[own]
                    referenced = None
                    if of_split.any():
                        referenced = ref_clip_scores(*words_of, references[of_split], owners[of_split] - own.start, same)
                    found[split, stream, layer] = Measured(measure(*words_of, same, share[own]), referenced)
        done()
        if layer == layers[-1]:
            raise _Enough

    try:
        reason = stream_layers(checkpoint, batch, words.rows, placement, list(streams.values()), visit)
    except _Enough:
        reason = None
    return found, reason


def scan_layers(
    checkpoint: Checkpoint,
    words: TokenisedWords,
    same: np.ndarray,
    pooling: Pooling,
    placement: Placement,
    streams: Mapping[str, Adapter | None],
    done: Callable[[], None] = lambda: None,
    width: int = DEFAULT_WIDTH,
) -> tuple[dict[tuple[str, Layer], LayerScan], str | None]:
    """Measure all layers 0..N and ``output`` for each stream in one pass, with one block in memory at a time.

    Args:
        checkpoint:  an open checkpoint
        words:       all words, sources of all pairs first, then targets
        same:        ``false_negative_pairs`` of the pairs
        pooling:     token states -> word states, for ``word`` and ``word_bos``
        placement:   as for ``load_truncated_decoder``
        streams:     name -> adapter, or None for the base
        done:        called when a layer is measured
        width:       of the bins that words are packed in; changes nothing but the time

    Returns:
        The measurements by (stream, layer), and why the pass ended before ``output``, or None.

    Raises:
        TliError: an adapter that does not fit the model, a pair without a stranger, states that are not finite.
    """
    numbers = np.arange(len(words))
    batch, with_bos = (to_batch(words.pack(numbers, pool_bos, width), placement.dtype, placement.device) for pool_bos in (False, True))
    scans: dict[tuple[str, Layer], LayerScan] = {}

    def visit(layer: Layer, states: Sequence[Tensor]) -> None:
        for stream, nodes in zip(streams, states, strict=True):
            scans[stream, layer] = scan_layer(nodes, batch, with_bos, pooling.at(layer), same)
        done()

    reason = stream_layers(checkpoint, batch, words.rows, placement, list(streams.values()), visit)
    if not scans:
        raise TliError(checkpoint.name, "at least the first block must be there", reason, "download the missing file")
    return scans, reason
