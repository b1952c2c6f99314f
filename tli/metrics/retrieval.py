"""One direction of retrieval: expected ranks, hits and reciprocal ranks with exact chance. Imports no torch."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Retrieval:
    """One direction of retrieval: where each word's true partner stands among the candidates.

    above        int64 [B]   candidates nearer than the partner
    tied         int64 [B]   candidates exactly as near; the partner itself is not counted
    candidates   int64 [B]   all of them, partner included

    Ties are broken at random, in expectation: with all vectors equal, hits and reciprocal ranks are exactly at chance.
    """

    above: np.ndarray
    tied: np.ndarray
    candidates: np.ndarray

    @property
    def rank(self) -> np.ndarray:
        """Expected rank of the partner, from 1."""
        return self.above + 1 + self.tied / 2

    def hits_at(self, k: int) -> np.ndarray:
        """Probability that the partner is among the first ``k``."""
        return np.clip((k - self.above) / (self.tied + 1), 0.0, 1.0)

    @property
    def reciprocal_rank(self) -> np.ndarray:
        """Expected 1/rank: the mean of 1/r over the ranks that the tie leaves open."""
        harmonic = _harmonic(self.candidates.max())
        return (harmonic[self.above + self.tied + 1] - harmonic[self.above]) / (self.tied + 1)

    def hits_at_chance(self, k: int) -> np.ndarray:
        return np.minimum(k / self.candidates, 1.0)

    @property
    def reciprocal_rank_chance(self) -> np.ndarray:
        """``H_c / c``: the mean of 1/r when each rank r = 1..c is as likely."""
        return _harmonic(self.candidates.max())[self.candidates] / self.candidates


def _harmonic(largest: int) -> np.ndarray:
    """``H_0 .. H_largest``, H_c = 1 + 1/2 + ... + 1/c."""
    return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, largest + 1))])
