"""A study's numbers: every value over seeds with its interval, trends over ranks, the arms against each other, out of the cells' reports.

The unit is a run. Beside what stands in each layer's measurements, where an arm's loss was it is asked what cannot be won by class or by
spelling, and what a map of the trained states finds; and of each text what training cost the language model.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator

import numpy as np

from tli.metrics.baseline_records import AFTER, ALL, BEFORE, BEHIND_MAP, PLAIN, WITH_MAPS
from tli.metrics.baselines import BASELINES
from tli.metrics.measures import names
from tli.model.shape import Layer
from tli.reports.wording import aligned_layer, find_value
from tli.runtime import cpu
from tli.runtime.files import SCHEMA
from tli.stats.across_runs import compare_arms, rank_trend, seed_interval
from tli.stats.tests import add_holm

if typing.TYPE_CHECKING:
    from tli.commands.grid import Cell

# where an arm's loss was: layer L or the output
ALIGNED = "aligned"
# what cells record of each layer; a study's list has no references
METRICS = tuple(name for name in names("tested") if not name.startswith("ref_"))


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the held-out pairs where an arm's loss was, beside their plain MRR: an MRR, too, as a baseline's record has it.

    label        of a column
    named        in a sentence
    way          of the trained states
    candidates   among which the partner is sought
    groups       of pairs: the first that the cells' reports know
    rivals       ways of equal information that need no training; None: all but the frozen cosine and oracles
    """

    label: str
    named: str
    way: str
    candidates: str = "split"
    groups: tuple[str, ...] = (ALL,)
    rivals: tuple[str, ...] | None = None


QUESTIONS = {
    "mrr": Question("cosine", "by cosine", PLAIN),
    "mrr_own_class": Question(
        "own class,\nno loans", "among words of the same class, loans left out", PLAIN, "class", ("no loan words", "not spelt alike")
    ),
    "mrr_behind_map": Question("behind\na map", "behind a map fitted afterwards", BEHIND_MAP, rivals=WITH_MAPS[BEHIND_MAP]),
    "mrr_with_spelling": Question(
        "map with\nn-grams", "with such a map of states and n-grams", "cca_spelling", rivals=WITH_MAPS["cca_spelling"]
    ),
}


def search_record(rate: float, reports: list[dict]) -> dict:
    """How well a learning rate did: the MRR of the pairs that the grid never sees, at the layer of the loss, in the worst of its runs, and
    in each of them.
    """
    runs = [find_value(report, "held_out", "after", aligned_layer(report), "mrr") for report in reports]
    worst = min(runs, key=lambda found: found["value"])
    return {"rate": rate, **{key: worst[key] for key in ("value", "low", "high", "n")}, "runs": [found["value"] for found in runs]}


def assemble(config: dict, search: dict[str, dict], reports: list[tuple[Cell, dict]]) -> dict:
    """``results.json``: plain JSON values.

    config    the study's options
    search    by arm: the ``chosen`` rate and what was ``tried``
    reports   every cell of the grid with its report
    """
    first = reports[0][1]
    blocks = first["model"]["blocks"]
    wanted = dict.fromkeys([config["layer"], blocks // 2, "output"])
    places = [place for place in wanted if all(find_value(report, "held_out", "after", place, "mrr") for _, report in reports)]
    runs = {(c.options["arm"], c.options["rank"], c.options["shuffle_pairs"], c.options["seed"]): report for c, report in reports}
    cells = list(dict.fromkeys(key[:3] for key in runs))
    seeds = sorted({key[3] for key in runs})

    def over_seeds(cell: tuple, split: str, when: str, place: Layer, metric: str) -> list[float]:
        of_seed = [runs[*cell, seed] for seed in seeds]
        return [find_value(r, split, when, aligned_layer(r) if place == ALIGNED else place, metric)["value"] for r in of_seed]

    values = [
        {
            "arm": arm,
            "rank": rank,
            "shuffled": shuffled,
            "split": split,
            "when": when,
            "layer": place,
            "metric": metric,
            **seed_interval(by_seed),
            "by_seed": by_seed,
            "chance": find_value(runs[arm, rank, shuffled, seeds[0]], split, when, place, metric)["chance"],
        }
        for arm, rank, shuffled in cells
        for split in ("trained", "held_out")
        # all cells of a seed begin with the same model and words
        for when in ("before", "after")
        if when == "after" or (arm, rank, shuffled) == cells[0]
        for place in places
        for metric in METRICS
        for by_seed in [over_seeds((arm, rank, shuffled), split, when, place, metric)]
    ]
    arms, ranks = list(search), sorted({rank for _, rank, shuffled in cells if not shuffled})

    def by_rank(arm: str, split: str, place: Layer, metric: str) -> np.ndarray:
        return np.array([over_seeds((arm, rank, False), split, "after", place, metric) for rank in ranks]).T

    held_out = {
        (arm, place, metric): by_rank(arm, "held_out", place, metric)
        for arm in arms
        for place in (*places, ALIGNED)
        for metric in names("judged")
    }
    memory = {(arm, ALIGNED, "mrr"): by_rank(arm, "trained", ALIGNED, "mrr") for arm in arms}
    trends = [
        {"arm": arm, "layer": place, "metric": metric, "split": split, **rank_trend(of_runs, ranks)}
        for split, found in (("held_out", held_out), ("trained", memory))
        for (arm, place, metric), of_runs in found.items()
    ]
    free = _without_training([runs[*cells[0], seed] for seed in seeds], places)
    answers, harm = _answers(runs, cells, seeds), _harm(runs, cells, seeds)
    return {
        "schema": SCHEMA,
        "config": config,
        "model": first["model"],
        "pairs": {
            **{key: first["pairs"][key] for key in ("trained", "held_out", "split")},
            "with_relative": max(report["pairs"]["with_relative"] for _, report in reports),
        },
        "steps": first["training"]["steps"],
        "layers": places,
        "ranks": ranks,
        "search": search,
        "values": values,
        "trends": trends,
        "without_training": free,
        "answers": answers,
        "bought": _bought(answers, free, ranks, config["layer"]),
        "harm": harm,
        "harm_trends": [
            {"arm": arm, "text": text, **rank_trend(np.log(of_runs), ranks)}
            for (arm, text), of_runs in _by_rank(harm, ("arm", "text"), ranks).items()
        ],
        "comparisons": _compare(held_out, arms, ranks, (*places, ALIGNED)),
        "controls": _control(runs, arms, seeds, config["search_rank"], over_seeds, (*places, ALIGNED)),
        "costs": [_cost(arm, rank, [runs[arm, rank, shuffled, seed] for seed in seeds]) for arm, rank, shuffled in cells if not shuffled],
        "versions": first["versions"],
        "machine": first["machine"] | {"processor": cpu.name()},
    }


def _answers(runs: dict, cells: list[tuple], seeds: list[int]) -> list[dict]:
    """What each of ``QUESTIONS`` found after training where the arm's loss was, over seeds; left out where a cell does not know it."""
    found = []
    for name, question in QUESTIONS.items():
        for arm, rank, shuffled in cells:
            of_seed = [_answer(runs[arm, rank, shuffled, seed], name, question) for seed in seeds]
            known = [record for record in of_seed if record is not None]
            if len(known) == len(seeds):
                by_seed, chance = [record["value"] for record in known], float(np.mean([record["chance"] for record in known]))
                told = {"question": name, "arm": arm, "rank": rank, "shuffled": shuffled, **seed_interval(by_seed)}
                found.append({**told, "by_seed": by_seed, "chance": chance})
    return found


def _answer(report: dict, name: str, question: Question) -> dict | None:
    place = aligned_layer(report)
    if name == "mrr":
        return find_value(report, "held_out", "after", place, name)
    wanted = question.way, AFTER, place
    return next((one for one in _asked(report, question) if (one["way"], one["stream"], one["layer"]) == wanted), None)


def _asked(report: dict, question: Question) -> list[dict]:
    """The records that answer the question, of all ways, streams and layers."""
    records = (report.get("baselines") or {}).get("records", [])
    groups = {record["group"] for record in records}
    group = next((group for group in question.groups if group in groups), None)
    wanted = question.candidates, group, "mrr"
    return [record for record in records if (record["candidates"], record["group"], record["metric"]) == wanted]


def _without_training(reports: list[dict], places: list[Layer]) -> list[dict]:
    """For each question and layer the best of what needs no training, over seeds. Any cell of a seed knows it."""
    found = []
    for name, question in QUESTIONS.items():
        for place in places:
            by_way: dict[str, list[float]] = {}
            for report in reports:
                for record in _asked(report, question):
                    is_free = record["stream"] in (BEFORE, None) and record["layer"] in (place, None) and record["way"] != PLAIN
                    if is_free and (record["way"] in question.rivals if question.rivals else not BASELINES[record["way"]].oracle):
                        by_way.setdefault(record["way"], []).append(record["value"])
            if by_way:
                best = max(by_way, key=lambda way: float(np.mean(by_way[way])))
                found.append({"question": name, "layer": place, "way": best, **seed_interval(by_way[best]), "by_seed": by_way[best]})
    return found


def _by_rank(records: list[dict], keys: tuple[str, ...], ranks: list[int]) -> dict[tuple, np.ndarray]:
    """By these keys of the records, those on true pairs: what each seed found at each rank, [seeds, ranks]."""
    found: dict[tuple, dict[int, list[float]]] = {}
    for record in records:
        if not record["shuffled"]:
            found.setdefault(tuple(record[key] for key in keys), {})[record["rank"]] = record["by_seed"]
    return {key: np.array([of_rank[rank] for rank in ranks]).T for key, of_rank in found.items() if len(of_rank) == len(ranks)}


def _bought(answers: list[dict], free: list[dict], ranks: list[int], layer: int) -> list[dict]:
    """Each answer at each rank minus the best without training where the arm's loss was; Holm's correction over the ranks."""
    found = []
    for (arm, question), of_runs in _by_rank(answers, ("arm", "question"), ranks).items():
        place: Layer = "output" if arm == "full" else layer
        for best in (one for one in free if (one["question"], one["layer"]) == (question, place)):
            family = [
                {"arm": arm, "question": question, "rank": rank, **compare_arms(column, best["by_seed"])}
                for rank, column in zip(ranks, of_runs.T)
            ]
            add_holm(family, ("p",))
            found += family
    return found


def _compare(held_out: dict, arms: list[str], ranks: list[int], places: tuple) -> list[dict]:
    """The early arm minus the full one, rank by rank; Holm's correction over the ranks."""
    if len(arms) < 2:
        return []
    found = []
    for place in places:
        for metric in names("judged"):
            columns = zip(held_out["early", place, metric].T, held_out["full", place, metric].T)
            family = [
                {"rank": rank, "layer": place, "metric": metric, **compare_arms(early, full)} for rank, (early, full) in zip(ranks, columns)
            ]
            add_holm(family, ("p",))
            found += family
    return found


def _control(runs: dict, arms: list[str], seeds: list[int], rank: int, over_seeds, places: tuple) -> list[dict]:
    """Training on true pairs minus training on shuffled ones, at the rank at which both were run."""
    return [
        {
            "arm": arm,
            "rank": rank,
            "layer": place,
            "metric": metric,
            **compare_arms(*(over_seeds((arm, rank, shuffled), "held_out", "after", place, metric) for shuffled in (False, True))),
        }
        for arm in arms
        if (arm, rank, False, seeds[0]) in runs
        for place in places
        for metric in names("judged")
    ]


def _cost(arm: str, rank: int, reports: list[dict]) -> dict:
    """What a run of the arm at this rank took, and how far its loss came: medians over seeds."""
    return {
        "arm": arm,
        "rank": rank,
        "parameters": reports[0]["adapter"]["parameters"],
        "adapter_bytes": reports[0]["adapter"]["bytes"],
        "training_seconds": float(np.median([report["training"]["seconds"] for report in reports])),
        "peak_bytes": int(np.median([report["training"]["peak_bytes"] for report in reports])),
        "loss_last": float(np.median([report["training"]["loss_last"] for report in reports])),
        "loss_chance": reports[0]["training"]["chance_loss"],
    }


def _harm(runs: dict, cells: list[tuple], seeds: list[int]) -> list[dict]:
    """How many times the base's perplexity a cell's is, text by text: geometric means over seeds, their interval that of the logarithm."""
    found = []
    for arm, rank, shuffled in cells:
        by_text: dict[str, list[float]] = {}
        for seed in seeds:
            for one in runs[arm, rank, shuffled, seed].get("harm") or []:
                by_text.setdefault(one["text"]["name"], []).append(one["after"][0]["perplexity_ratio"]["value"])
        for text, ratios in by_text.items():
            of_log = seed_interval(np.log(ratios))
            ends = {key: None if of_log[key] is None else float(np.exp(of_log[key])) for key in ("value", "low", "high")}
            found.append({"arm": arm, "rank": rank, "shuffled": shuffled, "text": text, **ends, "n": of_log["n"], "by_seed": ratios})
    return found


def find(results: dict, arm: str, rank: int, layer: Layer, metric: str, split: str = "held_out", shuffled: bool = False) -> dict:
    """The value after training with these keys; ``ALIGNED`` is where the arm's loss was."""
    layer = place_of(results, arm, layer)
    return _only(results["values"], arm=arm, rank=rank, shuffled=shuffled, split=split, when="after", layer=layer, metric=metric)


def find_before(results: dict, layer: Layer, metric: str, split: str = "held_out") -> dict:
    """The value before training."""
    return _only(results["values"], split=split, when="before", layer=layer, metric=metric)


def find_harm(results: dict, arm: str, rank: int, text: str, shuffled: bool = False) -> dict:
    """How many times the base's perplexity the cell's is on a text."""
    return _only(results["harm"], arm=arm, rank=rank, text=text, shuffled=shuffled)


def find_answer(results: dict, arm: str, rank: int, question: str, shuffled: bool = False) -> dict | None:
    """What was found of one of ``QUESTIONS`` after training, or None where no cell knows it."""
    return next(_matching(results["answers"], arm=arm, rank=rank, question=question, shuffled=shuffled), None)


def find_free(results: dict, layer: Layer, question: str) -> dict | None:
    """The best that needs no training at this layer, or None where none was measured."""
    return next(_matching(results["without_training"], layer=layer, question=question), None)


def place_of(results: dict, arm: str, layer: Layer) -> Layer:
    if layer != ALIGNED:
        return layer
    return "output" if arm == "full" else results["config"]["layer"]


def _only(records: list[dict], **wanted) -> dict:
    return next(_matching(records, **wanted))


def _matching(records: list[dict], **wanted) -> Iterator[dict]:
    return (record for record in records if wanted.items() <= record.items())
