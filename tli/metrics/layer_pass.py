"""The one pass over a model's layers that measures word pairs: training, evaluation and the protocol by ``measure_layers``, scans by
``scan_layers``.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from tli.data import word_pairs
from tli.data.batch import Batch, to_batch
from tli.data.packing import DEFAULT_WIDTH, TokenisedWords, tokenise
from tli.data.pair_store import Pair
from tli.metrics.alignment import Alignment, measure
from tli.metrics.clipscore import ref_clip_scores
from tli.metrics.layers import LayerScan, scan_layer
from tli.metrics.sink import sink_share
from tli.model.checkpoint import Checkpoint, context_length
from tli.model.hidden_states import stream_layers
from tli.model.linear_map import Sides
from tli.model.lora import Adapter
from tli.model.pooling import Pooling
from tli.model.shape import Layer
from tli.runtime.device import DeviceConfig
from tli.runtime.errors import TliError

Streams = Mapping[Any, Adapter | None]
# stream, layer, and the word states of sources and targets, fp32 [B, D] each
SeeWords = Callable[[Any, Layer, Tensor, Tensor], None]
_Found = TypeVar("_Found")


def _see_nothing(stream: Any, layer: Layer, source: Tensor, target: Tensor) -> None:
    """The word states are not wanted."""


def measure_layers(
    checkpoint: Checkpoint,
    splits: Mapping[str, Sequence[Pair]],
    pooling: Pooling,
    device_config: DeviceConfig,
    streams: Streams,
    prefix: str,
    pool_bos: bool = False,
    layers: Sequence[Layer] | None = None,
    references: bool = False,
    done: Callable[[], None] = lambda: None,
    see_words: SeeWords = _see_nothing,
) -> tuple[dict[tuple[str, Any, Layer], Alignment], str | None]:
    """Measure every split's pairs for each stream at these layers; blocks above the last of them are not read.

    Args:
        checkpoint:     an open checkpoint
        splits:         pairs by the name of their list; each list is measured by itself
        pooling:        token states -> word states; at ``output``, where states are normalised already, without its norm
        device_config:  dtype, device and rounding of the weights
        streams:        adapters by name, None for the base
        prefix:         text before each word
        pool_bos:       pool the sink, too
        layers:         ascending, from 0..N and ``output``; None: all
        references:     measure RefCLIPScore of the pairs that have further accepted glosses
        done:           called after each layer, measured or not
        see_words:      called with each stream's word states in each layer that is measured, fp32 [B, D] of sources and of targets, the
                        splits' pairs one behind the other

    Returns:
        The alignments by (split, stream, layer), and why the pass ended before ``output``, or None.
    """
    pairs = [pair for part in splits.values() for pair in part]
    owners = np.repeat(np.arange(len(pairs)), [len(pair.synonyms) * references for pair in pairs])
    glosses = [gloss for pair in pairs for gloss in pair.synonyms] * references
    texts = word_pairs.words_of(pairs) + glosses
    words = tokenise(checkpoint.tokenizer(), texts, context_length(checkpoint), prefix)
    batch = to_batch(words.pack(np.arange(len(texts)), pool_bos), device_config.dtype, device_config.device)
    ends = list(itertools.accumulate(map(len, splits.values()), initial=0))
    by_split = list(map(word_pairs.false_negative_pairs, splits.values()))

    def measure_splits(stream: Any, layer: Layer, nodes: Tensor) -> dict[str, Alignment]:
        source, target, further = pooling.for_layer(layer)(nodes, batch).tensor_split([len(pairs), 2 * len(pairs)])
        see_words(stream, layer, source, target)
        share = sink_share(nodes, batch)[: 2 * len(pairs)].view(2, -1).mean(0).cpu().numpy()
        found = {}
        for split, begin, end, false_negatives in zip(splits, ends, ends[1:], by_split):
            vectors, own = (source[begin:end], target[begin:end]), (owners >= begin) & (owners < end)
            referenced = ref_clip_scores(*vectors, further[own], owners[own] - begin, false_negatives) if own.any() else None
            found[split] = measure(*vectors, false_negatives, share[begin:end], referenced)
        return found

    measured, reason = _each_layer(checkpoint, batch, words.vocab_ids, device_config, streams, measure_splits, layers, done)
    return {(split, *key): alignment for key, by_split in measured.items() for split, alignment in by_split.items()}, reason


def scan_layers(
    checkpoint: Checkpoint,
    words: TokenisedWords,
    false_negatives: np.ndarray,
    pooling: Pooling,
    device_config: DeviceConfig,
    streams: Mapping[str, Adapter | None],
    done: Callable[[], None] = lambda: None,
    width: int = DEFAULT_WIDTH,
    see_words: SeeWords = _see_nothing,
) -> tuple[dict[tuple[str, Layer], LayerScan], str | None]:
    """Measure all that a scan shows at all layers 0..N and ``output``, for each stream.

    Args:
        checkpoint:       an open checkpoint
        words:            all words, sources of all pairs first, then targets
        false_negatives:  ``false_negative_pairs`` of the pairs
        pooling:          token states -> word states, for ``word`` and ``word_bos``
        device_config:    dtype, device and rounding of the weights
        streams:          name -> adapter, or None for the base
        done:             called when a layer is measured
        width:            of the bins that words are packed in; changes nothing but the time
        see_words:        called with each stream's word states in each layer, fp32 [B, D] of sources and of targets

    Returns:
        The measurements by (stream, layer), and why the pass ended before ``output``, or None.

    Raises:
        TliError: an adapter that does not fit the model, a pair without another of different meaning, states that are not finite.
    """
    numbers = np.arange(len(words))
    packed = (words.pack(numbers, pool_bos, width) for pool_bos in (False, True))
    batch, with_bos = (to_batch(bins, device_config.dtype, device_config.device) for bins in packed)

    def scan(stream: str, layer: Layer, nodes: Tensor) -> LayerScan:
        see_words(stream, layer, *pooling.for_layer(layer)(nodes, batch).chunk(2))
        return scan_layer(nodes, batch, with_bos, pooling.for_layer(layer), false_negatives)

    scans, reason = _each_layer(checkpoint, batch, words.vocab_ids, device_config, streams, scan, None, done)
    if not scans:
        raise TliError(checkpoint.name, "at least the first block must be there", reason, "download the missing file")
    return scans, reason


def see_layers(
    checkpoint: Checkpoint,
    pairs: Sequence[Pair],
    pooling: Pooling,
    device_config: DeviceConfig,
    prefix: str,
    layers: Sequence[Layer] | None,
    see_words: SeeWords,
    done: Callable[[], None] = lambda: None,
    pool_bos: bool = False,
    streams: Streams = MappingProxyType({"before": None}),
) -> str | None:
    """Hand each stream's word states in each of these layers to ``see_words``, and measure nothing; arguments as for ``measure_layers``.

    Returns:
        Why the pass ended before ``output``, or None.
    """
    words = tokenise_pairs(checkpoint, prefix, pairs)
    batch = to_batch(words.pack(np.arange(len(words)), pool_bos), device_config.dtype, device_config.device)

    def look(stream: str, layer: Layer, nodes: Tensor) -> None:
        see_words(stream, layer, *pooling.for_layer(layer)(nodes, batch).chunk(2))

    return _each_layer(checkpoint, batch, words.vocab_ids, device_config, streams, look, layers, done)[1]


def tokenise_pairs(checkpoint: Checkpoint, prefix: str, pairs: Sequence[Pair]) -> TokenisedWords:
    """All sources, then all targets, as this model reads them."""
    return tokenise(checkpoint.tokenizer(), word_pairs.words_of(pairs), context_length(checkpoint), prefix)


def keep_words(states: dict[tuple[Any, Layer], Sides], layers: Collection[Layer]) -> SeeWords:
    """What ``measure_layers`` takes as ``see_words`` to put the word states of these layers into ``states``."""

    def keep(stream: Any, layer: Layer, source: Tensor, target: Tensor) -> None:
        if layer in layers:
            states[stream, layer] = source.cpu().numpy(), target.cpu().numpy()

    return keep


class _LastLayer(Exception):
    """The last layer that was asked for is measured."""


def _each_layer(
    checkpoint: Checkpoint,
    batch: Batch,
    rows: np.ndarray | None,
    device_config: DeviceConfig,
    streams: Streams,
    look: Callable[[Any, Layer, Tensor], _Found],
    layers: Sequence[Layer] | None,
    done: Callable[[], None],
) -> tuple[dict[tuple[Any, Layer], _Found], str | None]:
    """``look(stream, layer, states [T, D])`` of each stream at these layers, by (stream, layer); and why layers are missing, or None."""
    found: dict[tuple[Any, Layer], _Found] = {}

    def visit(layer: Layer, states: Sequence[Tensor]) -> None:
        if layers is None or layer in layers:
            found.update({(stream, layer): look(stream, layer, nodes) for stream, nodes in zip(streams, states, strict=True)})
        done()
        if layers is not None and layer == layers[-1]:
            raise _LastLayer

    try:
        return found, stream_layers(checkpoint, batch, rows, device_config, list(streams.values()), visit)
    except _LastLayer:
        return found, None
