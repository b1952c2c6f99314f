"""The table of measures: names, labels, per-pair values, chance, and which of them are tested. Every report takes them from here.

A new measure of word pairs is one entry; it then stands in the records, the tables and the tests whose columns it sets.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable

import numpy as np

from tli.metrics.retrieval import Retrieval

if typing.TYPE_CHECKING:
    from tli.metrics.alignment import Alignment

SPLITS = {"trained": "trained", "held_out": "held out"}
# the split of a test that compares the two
DIFFERENCE = "trained - held_out"
# from this share on a pooled word is mostly sink
SINK_ABOVE = 0.5
# of CLIPScore: Hessel et al. 2021 (arXiv 2104.08718)
CLIP_WEIGHT = 2.5


@dataclasses.dataclass(frozen=True, slots=True)
class Measure:
    """One measure of word pairs in one layer.

    name        its key in records
    label       in tables and figures
    column      the head of a narrow column, where it differs
    digits      decimals in a table
    per_pair    float64 [B], whose mean is the value; None: not measured, or not of single pairs in an ``Alignment``
    chance      its value if ranks were drawn by lot, from the exact numbers of candidates; None of a mean of cosines
    recorded    stands in the records of training and evaluation
    headline    stands in the tables of a run, which have room for few
    tested      the change by an adapter is tested
    between     trained and held-out gains are compared; ranks among lists of different lengths are not comparable
    judged      ranks and arms of a study are judged by it
    """

    name: str
    label: str
    column: str = ""
    digits: int = 3
    per_pair: Callable[[Alignment], np.ndarray | None] = lambda alignment: None
    chance: Callable[[Alignment], float] | None = None
    recorded: bool = True
    headline: bool = False
    tested: bool = False
    between: bool = False
    judged: bool = False


def _retrieval(name: str, label: str, values: Callable[[Retrieval], np.ndarray], chance: Callable[[Retrieval], np.ndarray], **columns):
    """A measure of ranks: the mean of both directions, and each alone."""

    def measure(ending: str, *ways: str, **own) -> Measure:
        def mean(of: Callable[[Retrieval], np.ndarray], alignment: Alignment) -> np.ndarray:
            return np.mean([of(getattr(alignment, way)) for way in ways], axis=0)

        return Measure(
            name + ending,
            label,
            digits=4,
            per_pair=lambda alignment: mean(values, alignment),
            chance=lambda alignment: float(mean(chance, alignment).mean()),
            **own,
        )

    recorded = columns.get("recorded", True)
    yield measure("", "forward", "backward", **columns)
    yield measure("_forward", "forward", recorded=recorded)
    yield measure("_backward", "backward", recorded=recorded)


def _mutual_nearest(alignment: Alignment) -> np.ndarray:
    """1 where the pair beats all others in its row and in its column."""
    return np.all([way.above + way.tied == 0 for way in (alignment.forward, alignment.backward)], axis=0).astype(float)


def _mutual_nearest_chance(alignment: Alignment) -> float:
    # the pair itself is in its row and in its column
    return float((1 / (alignment.forward.candidates + alignment.backward.candidates - 1)).mean())


def _clipscore(alignment: Alignment) -> np.ndarray:
    return CLIP_WEIGHT * np.maximum(alignment.cosine, 0)


def _referenced(name: str, alignment: Alignment) -> np.ndarray | None:
    return None if alignment.referenced is None else getattr(alignment.referenced, name)


# in the order of tables
_TABLE = (
    Measure("gap", "gap", per_pair=lambda a: a.gap, headline=True, tested=True, between=True, judged=True),
    *_retrieval("p_at_1", "P@1", lambda r: r.hits_at(1), lambda r: r.hits_at_chance(1), headline=True, tested=True, judged=True),
    *_retrieval("p_at_5", "P@5", lambda r: r.hits_at(5), lambda r: r.hits_at_chance(5), recorded=False),
    *_retrieval("mrr", "MRR", lambda r: r.reciprocal_rank, lambda r: r.reciprocal_rank_chance, headline=True, tested=True, judged=True),
    Measure("cosine", "cosine, true", per_pair=lambda a: a.cosine, headline=True, tested=True, between=True),
    Measure("mismatched", "cosine, mismatched", "mism.", per_pair=lambda a: a.mismatched, headline=True, tested=True),
    # a rescaled cosine: never without its value for mismatched pairs
    Measure("clipscore", "CLIPScore", "CLIP-S,\ntrue", per_pair=_clipscore, tested=True),
    Measure("clipscore_mismatched", "CLIPScore, mismatched", "CLIP-S,\nmism.", per_pair=lambda a: CLIP_WEIGHT * a.clipped, tested=True),
    Measure("clipscore_gap", "CLIPScore, gap", per_pair=lambda a: _clipscore(a) - CLIP_WEIGHT * a.clipped, tested=True, judged=True),
    # of the pairs that have references alone
    *(
        Measure(f"ref_clipscore{ending}", f"RefCLIPScore{label}", per_pair=functools.partial(_referenced, name), tested=True)
        for name, ending, label in (("score", "", ""), ("mismatched", "_mismatched", ", mismatched"), ("gap", "_gap", ", gap"))
    ),
    Measure("sink_share", "sink share", "sink\nshare", per_pair=lambda a: a.sink_share, headline=True),
    # a scan's alone
    Measure("auc", "AUC", per_pair=lambda a: a.auc, chance=lambda a: 0.5, recorded=False),
    # Kargaran et al. 2024 (arXiv 2410.05873)
    Measure("mexa", "MEXA", digits=4, per_pair=_mutual_nearest, chance=_mutual_nearest_chance, recorded=False),
    Measure("csls_p_at_1", "P@1 by CSLS", "CSLS\nP@1", 4, recorded=False),
    Measure("cka", "CKA", recorded=False),
    Measure("centred_gap", "gap, centred", "cent.\ngap", recorded=False),
    Measure("standardised_gap", "gap, standardised", "stand.\ngap", recorded=False),
    Measure("iso_score", "IsoScore", "Iso-\nScore", recorded=False),
    Measure("random_cosine", "cosine, random", "rand.\ncos", recorded=False),
)
MEASURES = {measure.name: measure for measure in _TABLE}


def names(column: str) -> tuple[str, ...]:
    """The measures for which a column of the table is set, as ``names("tested")``, in its order."""
    return tuple(measure.name for measure in _TABLE if getattr(measure, column))
