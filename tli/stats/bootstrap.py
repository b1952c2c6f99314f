"""Resampling by word: bootstrap intervals, and the sign-flip test.

Every function takes plain arrays with one number per word pair. Pairs that share a word are not independent: given their
``clusters``, such pairs are drawn, or flipped, together.
"""

import functools
from collections.abc import Sequence

import numpy as np

from tli.runtime.errors import TliError

_RESAMPLES = 2000
_FLIPS = 19_999
# up to so many clusters all 2^k flips are gone through
_EXACT_CLUSTERS = 16
_SIGNS_AT_ONCE = 1 << 21
# a standard deviation below this share of the values' size is their rounding, not their spread
ROUNDING = 1e-13


def word_clusters(pairs: int, false_negatives: np.ndarray) -> np.ndarray:
    """int64 [pairs]: the number of each pair's cluster, from 0; pairs that share a word, or are linked by pairs that do, are one.

    false_negatives   int64 [E, 2] from ``word_pairs.false_negative_pairs``
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    ends = np.asarray(false_negatives, np.int64).reshape(-1, 2).T
    links = csr_array((np.ones(ends.shape[1], np.int8), tuple(ends)), shape=(pairs, pairs))
    return connected_components(links, directed=False)[1].astype(np.int64)


def bootstrap_interval(
    values: np.ndarray, seed: int, level: float = 0.95, clusters: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Where the mean would lie if other words had been drawn: the bias-corrected and accelerated (BCa) bootstrap interval.

    values      [..., n], n >= 2
    clusters    int64 [n]   values of one number are drawn together, or not at all; at least 2 of them. None: each value alone
    low, high   [...]

    The 2,000 resamples depend on n (or the number of clusters) and seed alone: all metrics of one list are resampled alike, in
    one matrix product. With clusters the order of the values changes nothing. Without spread the interval is the mean itself.
    That is what resampling can say, not that the mean is certain: a list without one hit does not prove that hits are impossible.
    Sources: Efron 1987, "Better bootstrap confidence intervals"; Field and Welsh 2007 for drawing whole clusters.
    """
    from scipy.special import ndtr, ndtri

    values = finite(values)
    mean, n = values.mean(-1, keepdims=True), values.shape[-1]
    spread = sample_std(values)[..., None] * np.sqrt((n - 1) / n)
    standard = np.divide(values - mean, spread, out=np.zeros_like(values), where=spread > 0)
    # standardised values lose nothing in fp32; resampled means within 1e-6 of the mean are equal to it up to rounding
    if clusters is None:
        means = np.asarray(standard.astype(np.float32) @ _resample_weights(n, seed).T, np.float64)
        # the jackknife's acceleration has a closed form for a mean: sum(z^3) / (6 sum(z^2)^1.5)
        acceleration = (standard**3).sum(-1) / (6 * n**1.5)
    else:
        means, acceleration = _clustered_means(standard, clusters, seed)
    below = ((means < -1e-6).mean(-1) + (means <= 1e-6).mean(-1)) / 2
    bias = ndtri(np.clip(below, 1 / _RESAMPLES, 1 - 1 / _RESAMPLES))
    ends = []
    for z in ndtri([(1 - level) / 2, (1 + level) / 2]):
        share = ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
        quantile = [np.quantile(row, q) for row, q in zip(means.reshape(-1, _RESAMPLES), share.reshape(-1))]
        ends.append(mean[..., 0] + spread[..., 0] * np.reshape(quantile, share.shape))
    return ends[0], ends[1]


def means_with_intervals(values: np.ndarray, seed: int, clusters: np.ndarray) -> list[dict]:
    """Each row's mean with its 95 % interval as a record: value, low, high, n, clusters; low and high are None of a single cluster.

    values     [m, n], n >= 1
    clusters   int64 [n], as for ``bootstrap_interval``
    """
    n, number = values.shape[1], len(np.unique(clusters))
    ends = np.stack(bootstrap_interval(values, seed, clusters=clusters), axis=1).tolist() if number > 1 else [(None, None)] * len(values)
    return [{"value": float(mean), "low": low, "high": high, "n": n, "clusters": number} for mean, (low, high) in zip(values.mean(1), ends)]


def sign_flip(gains: np.ndarray, seed: int, clusters: np.ndarray | None = None) -> np.ndarray:
    """Two-sided p of the sign-flip permutation test: how often a gain as large would come up if each were as likely a loss.

    gains      [..., n]
    clusters   int64 [n]   gains of one number flip together; None: each alone
    p          [...]

    With up to 16 clusters that gained or lost anything, all flips are gone through and p is exact; else 19,999 are drawn, and
    p = (1 + those as large) / 20,000, which is valid, too. The order of the gains changes nothing.
    Sources: Fisher 1935; Phipson and Smyth 2010 for the 1 + .
    """
    gains = np.asarray(gains, np.float64)
    if not np.isfinite(gains).all():
        raise TliError("significance", "the values must be finite", "NaN or infinity", "look for the step that made them")
    rows = gains.reshape(-1, gains.shape[-1])
    sums = rows if clusters is None else _cluster_sums(rows, clusters)
    # a cluster's own sign plays no part, and in order of size all lists are drawn alike
    sizes = np.sort(np.abs(sums), axis=1)[:, ::-1]
    # sums of the same numbers in another order differ by their rounding
    observed = np.abs(sums.sum(1)) - 1e-12 * sizes.sum(1)
    p = np.empty(len(rows))
    few = (sizes > 0).sum(1) <= _EXACT_CLUSTERS
    for row in np.flatnonzero(few):
        # one sign may be fixed: the other half of the flips mirrors this one
        totals = sizes[row, :1]
        for size in sizes[row, 1 : max(1, np.count_nonzero(sizes[row]))]:
            totals = np.concatenate([totals + size, totals - size])
        p[row] = (np.abs(totals) >= observed[row]).mean()
    if not few.all():
        hits, generator = 0, np.random.default_rng([seed, sizes.shape[1]])
        step = max(1, _SIGNS_AT_ONCE // sizes.shape[1])
        for start in range(0, _FLIPS, step):
            signs = generator.integers(0, 2, (min(step, _FLIPS - start), sizes.shape[1]), np.int8) * 2.0 - 1.0
            hits = hits + (np.abs(sizes[~few] @ signs.T) >= observed[~few, None]).sum(1)
        p[~few] = (1 + hits) / (1 + _FLIPS)
    return p.reshape(gains.shape[:-1])


def sample_std(values: np.ndarray) -> np.ndarray:
    """Standard deviation (n - 1) along the last axis; exactly zero where the values differ by no more than their rounding."""
    differ = np.ptp(values, axis=-1) > ROUNDING * np.abs(values).max(-1)
    return np.where(differ, values.std(-1, ddof=1), 0.0)


def finite(values: np.ndarray | Sequence[float]) -> np.ndarray:
    """The values as fp64, if there are two and none is NaN or infinite; else a ``TliError``."""
    values = np.asarray(values, dtype=np.float64)
    if values.shape[-1] < 2:
        raise TliError("significance", "a test needs at least two values", values.shape[-1], "measure more pairs")
    if not np.isfinite(values).all():
        raise TliError("significance", "the values must be finite", "NaN or infinity", "look for the step that made them")
    return values


def _clustered_means(standard: np.ndarray, clusters: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Means [..., resamples] of standardised values when whole clusters are drawn, and the jackknife's acceleration [...]."""
    rows = standard.reshape(-1, standard.shape[-1])
    sums = _cluster_sums(rows, clusters)
    sizes = np.broadcast_to(np.unique(clusters, return_counts=True)[1].astype(float), sums.shape)
    if sums.shape[1] < 2:
        raise TliError("significance", "an interval needs at least two clusters", sums.shape[1], "measure more pairs")
    # any order does that is not the words' own, in which sums also differ by their rounding
    order = np.lexsort((np.round(sums, 9), sizes))
    sums, sizes = (np.take_along_axis(values, order, 1) for values in (sums, sizes))
    weights = _resample_weights(sums.shape[1], seed).T
    means = np.asarray((sums.astype(np.float32) @ weights) / (sizes.astype(np.float32) @ weights), np.float64)
    # the mean of all is 0, so without one cluster it is -sum / (n - size)
    left_out = -sums / (sizes.sum(1, keepdims=True) - sizes)
    moves = left_out.mean(1, keepdims=True) - left_out
    scale = 6 * (moves**2).sum(1) ** 1.5
    acceleration = np.divide((moves**3).sum(1), scale, out=np.zeros(len(rows)), where=scale > 0)
    return means.reshape(*standard.shape[:-1], -1), acceleration.reshape(standard.shape[:-1])


def _cluster_sums(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """values [m, n] summed by cluster: [m, number of clusters]."""
    _, numbers = np.unique(clusters, return_inverse=True)
    sums = np.zeros((numbers.max() + 1, len(values)))
    np.add.at(sums, numbers, values.T)
    return sums.T


@functools.lru_cache(maxsize=4)
def _resample_weights(n: int, seed: int) -> np.ndarray:
    """How often each of n values is drawn in each resample, over n: fp32 [resamples, n].

    Four are kept: of both splits, and of those of their pairs that have references.
    """
    generator = np.random.default_rng([seed, n])
    weights = np.empty((_RESAMPLES, n), np.float32)
    for row in weights:
        row[:] = np.bincount(generator.integers(0, n, n), minlength=n)
    return weights / n
