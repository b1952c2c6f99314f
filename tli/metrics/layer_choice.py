"""Which layer to align: the rule by the gap, the paper's rule by the cosine, and where a cosine is the sink's."""

from collections.abc import Mapping

import numpy as np

from tli.metrics.baselines import Choice
from tli.metrics.layers import LayerScan
from tli.metrics.measures import SINK_ABOVE
from tli.model.shape import Layer
from tli.stats.bootstrap import bootstrap_interval

# a mismatched cosine of at least this part of the true one is as high
AS_HIGH = 0.95


def choose_layer(gaps: Mapping[Layer, np.ndarray], clusters: np.ndarray, seed: int) -> int:
    """The layer to train at: that whose mean gap is surely the largest, by the lower end of its 95 % interval.

    gaps       layer -> float64 [B], each pair's gap with the first position left out, of the base model on the pairs to choose by
    clusters   int64 [B], ``word_clusters`` of these pairs
    seed       of the bootstrap

    Only layers 1..N can be trained at; among equals the first, which costs least. The lower end rather than the mean, so that a
    layer where a few pairs have a large gap does not win. Choose by trained pairs alone where held-out ones are to judge the result.
    """
    layers = sorted(layer for layer in gaps if isinstance(layer, int) and layer > 0)
    values = np.stack([gaps[layer] for layer in layers])
    low, _ = bootstrap_interval(values, seed, clusters=clusters)
    return layers[int(low.argmax())]


def choose_layer_by_cosine(cosine: Mapping[Layer, np.ndarray]) -> int:
    """The paper's rule: the layer 1..N with the highest mean cosine of true pairs, of ``raw_bos`` vectors; no control asked for."""
    return max(sorted(layer for layer in cosine if isinstance(layer, int) and layer > 0), key=lambda layer: cosine[layer].mean())


def choose_layer_by_maps(choices: Mapping[Layer, Choice]) -> Layer:
    """The first layer whose map is within a standard error of the best one's MRR: a part of a list can't tell layers apart any better.

    choices   layer -> the best map there, in the order of the layers

    Source: the one-standard-error rule of Breiman et al. 1984, "Classification and regression trees"; the first layer costs least.
    """
    best = max(choices.values(), key=lambda choice: choice.mrr)
    return next(layer for layer, choice in choices.items() if choice.mrr >= best.mrr - best.error)


def sink_layers(scans: Mapping[tuple[str, Layer], LayerScan], stream: str) -> list[Layer]:
    """Where the mean cosine with the first position pooled is the sink's: it is most of a word, lifts mismatched pairs as high.

    That is: over half of a pooled word's states by length; a mismatched cosine of at least .95 of the true one, and above the one
    that the same words have without it.
    """
    found = []
    for (of, layer), scan in scans.items():
        mean = {key: values.mean() for key, values in scan.per_pair.items()}
        as_high = mean["raw_bos", "mismatched"] >= AS_HIGH * mean["raw_bos", "cosine"]
        lifted = mean["raw_bos", "mismatched"] > mean["raw", "mismatched"]
        if of == stream and mean["raw_bos", "sink_share"] > SINK_ABOVE and as_high and lifted:
            found.append(layer)
    return found
