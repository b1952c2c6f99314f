"""The verdict: what a report's numbers show, in words.

Each sentence is a rule about numbers in the tables, and says nothing that they do not; the rules are the functions below.
"""

from __future__ import annotations

from tli.metrics.measures import DIFFERENCE, SINK_ABOVE, SPLITS
from tli.model.shape import Layer
from tli.reports.baselines import bought, bought_with_maps
from tli.reports.harm import cost
from tli.reports.wording import (
    compared_layers,
    find_gain,
    find_value,
    interval,
    is_shift,
    number,
    p_value,
    place_name,
    side,
    side_of_chance,
    signed_gain,
)

_FEW_PAIRS = 30
_LOSS_AT_CHANCE = 0.99
# if surely fewer translations than this are right
_KNOWS_NOTHING = 0.1


def verdict(report: dict) -> str:
    """What the numbers show, in words: a paragraph for layer L and one for ``output``."""
    layer, *deeper = compared_layers(report, report["measurements"])
    first = [
        _control(report),
        bought(report, layer),
        cost(report),
        bought_with_maps(report, layer),
        _knows(report),
        _collapse(report),
        _loss(report),
        *_at_layer(report, layer),
        _sink(report, layer),
    ]
    last = (
        [bought(report, deeper[0]), *_at_layer(report, deeper[0])]
        if deeper
        else [f"The output was not measured: {report['missing_output']}."]
    )
    return "\n\n".join(" ".join(sentence for sentence in paragraph if sentence) for paragraph in (first, last))


def _at_layer(report: dict, layer: Layer) -> list[str]:
    shifts = [_shift(report, layer, split) for split in SPLITS]
    return [_carries_over(report, layer), _by_heart(report, layer), *shifts, *(_retrieval(report, layer, split) for split in SPLITS)]


def _control(report: dict) -> str:
    if not report["shuffled"]:
        return ""
    return "This is the control run: it was trained on shuffled pairs, so whatever rises here is not alignment."


def _knows(report: dict) -> str:
    """Whether the base model can translate these words at all, when asked."""
    found = report.get("probe")
    if not found:
        return ""
    said = f"Asked for {found['asked']} held-out translations after {found['shots']} examples, the base model gives {found['right']} right"
    if found["high"] < _KNOWS_NOTHING:
        return f"{said} {interval(found)}: it hardly knows these words, and vectors of what it does not know can only be aligned by rote."
    return f"{said}, {found['value']:.0%} {interval(found)}."


def _collapse(report: dict) -> str:
    """What the run itself said while it trained."""
    alarm = report["training"].get("alarm")
    return f"While it trained, {alarm}." if alarm else ""


def _loss(report: dict) -> str:
    last, chance = report["training"]["loss_last"], report["training"]["chance_loss"]
    if chance is None or last < _LOSS_AT_CHANCE * chance:
        return ""
    return f"Training learnt nothing: the loss ended at {last:.3f}, and chance is {chance:.3f}, the logarithm of the batch size."


def _carries_over(report: dict, layer: Layer) -> str:
    gap, mrr = (find_gain(report, layer, metric, "held_out") for metric in ("gap", "mrr"))
    where = f"At {place_name(layer)}"
    if gap is None:
        return f"{where}, no pairs were held out: nothing here shows whether words outside the training list were aligned."
    few = f" Only {gap['n']} pairs are held out, so these intervals are rough." if gap["n"] < _FEW_PAIRS else ""
    moved = f"{signed_gain(gap)} to {number(find_value(report, 'held_out', 'after', layer, 'gap')['value'])}"
    gap_side, mrr_side = side(gap), side(mrr)
    if gap_side == mrr_side == "above":
        rank = find_value(report, "held_out", "after", layer, "mrr")
        reach = "the alignment reaches words that training never saw"
        if side_of_chance(rank) != "above":
            reach = "too little to lift retrieval above chance"
        elif report["shuffled"]:
            reach = "without one true pair to learn from"
        return f"{where}, the held-out gap rose by {moved} and the held-out MRR by {signed_gain(mrr)}: {reach}.{few}"
    if gap_side == "above":
        why = "words moved apart, but true partners were not found more easily. A gap that grows alone is a change of scale"
        return f"{where}, the held-out gap rose by {moved}, but the held-out MRR did not rise ({signed_gain(mrr)}): {why}.{few}"
    if gap_side == "below":
        return f"{where}, the held-out gap fell by {moved}: training did harm to words that it never saw.{few}"
    change = (
        f"the change of the held-out gap, {signed_gain(gap)}, may be zero"
        if gap["low"] is None or gap["low"] < gap["high"]
        else "the held-out gap did not change"
    )
    if mrr_side == "above":
        return f"{where}, {change}, though the held-out MRR rose by {signed_gain(mrr)}.{few}"
    return f"{where}, {change}: nothing is shown to reach words that training never saw.{few}"


def _by_heart(report: dict, layer: Layer) -> str:
    between, trained, held_out = (find_gain(report, layer, "gap", split) for split in (DIFFERENCE, *SPLITS))
    if between is None or "above" not in (side(trained), side(held_out)):
        return ""
    gains = f"Trained pairs' gap changed by {signed_gain(trained)}, held-out pairs' by {signed_gain(held_out)}"
    difference = f"{signed_gain(between)} (Welch's p {p_value(between['p_holm'])})"
    if side(between) == "above":
        return f"{gains}: the difference, {difference}, was learnt by heart and stays with the trained words."
    if side(between) == "below":
        return f"{gains}: held-out pairs gained more than trained ones, by {difference}."
    return f"{gains}: the difference, {difference}, may be zero, so trained words have no lead over new ones."


def _shift(report: dict, layer: Layer, split: str) -> str:
    cosine, mismatched, gap = (find_gain(report, layer, metric, split) for metric in ("cosine", "mismatched", "gap"))
    if cosine is None or not is_shift(cosine, gap):
        return ""
    kind = "mostly a global shift" if side(gap) == "above" else "a global shift, not alignment"
    return (
        f"The mean cosine of {SPLITS[split].replace(' ', '-')} true pairs rose by {signed_gain(cosine)}, "
        f"and so did that of mismatched pairs, by {signed_gain(mismatched)}: {kind}."
    )


def _retrieval(report: dict, layer: Layer, split: str) -> str:
    after = find_value(report, split, "after", layer, "mrr")
    if after is None or (split == "trained" and side_of_chance(after) == "above"):
        return ""
    before = find_value(report, split, "before", layer, "mrr")
    numbers = f"MRR {number(after['value'])} {interval(after)} against {number(after['chance'])}"
    name = SPLITS[split].capitalize().replace(" ", "-")
    return f"{name} retrieval is {side_of_chance(after)} chance ({numbers}; before training {number(before['value'])})."


def _sink(report: dict, layer: Layer) -> str:
    measured, trained = report["config"]["eval_pool_bos"], report["config"]["pool_bos"]
    share = max((r["value"] for r in report["measurements"] if r["metric"] == "sink_share" and r["layer"] == layer), default=0.0)
    if share <= SINK_ABOVE or not (measured or trained):
        return ""
    if measured:
        return (
            f"These vectors pool the first position, the sink, which is {share:.0%} of them: their cosines mostly compare it with itself."
        )
    return f"Training pooled the first position, the sink, which is {share:.0%} of such a vector; the measurements leave it out."
