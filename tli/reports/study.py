"""What a study found, in tables, figures and words; its numbers are of ``study_results.py``.

A score is never shown without its control: CLIPScore beside that of mismatched pairs, all beside the same
measured before training, by chance, and after training on shuffled pairs.
"""

from __future__ import annotations

import pathlib
import typing

import numpy as np

from tli.metrics.baselines import BASELINES
from tli.metrics.measures import MEASURES
from tli.model.shape import Layer
from tli.reports.figures.study import draw_bought, draw_costs, draw_ranks
from tli.reports.figures.style import save_figure
from tli.reports.glossary import how_to_read
from tli.reports.study_results import ALIGNED, QUESTIONS, find, find_answer, find_before, find_free, find_harm, place_of
from tli.reports.tables import Table, as_markdown, once, to_repeat, write_markdown
from tli.reports.tables import show as show_tables
from tli.reports.wording import interval, is_significant, number, number_or_dash, p_value, place_name, text_name
from tli.runtime.files import write_json

if typing.TYPE_CHECKING:
    import rich.console

FILES = ("results.json", "report.md", "bought.png", "rank.png", "cost.png")
_ARMS = {"early": "early arm", "full": "full arm"}
# a last loss above this part of chance's
_LITTLE_LEARNT = 0.9

_READING = how_to_read("seeds", "CLIPScore", "gap", "retrieval", "baselines", "maps", "trends", "arms", "shuffled")


def in_words(results: dict) -> str:
    """A paragraph on each arm and one on what lies between them; every sentence is a rule about numbers in the tables."""
    paragraphs = []
    for arm in results["search"]:
        own = [_bought_sentence(results, arm), _trend_sentence(results, arm), _memory_sentence(results, arm)]
        own += [_answer_sentence(results, arm, question) for question in QUESTIONS if question != "mrr"]
        own += [_control_sentence(results, arm), _harm_sentence(results, arm), _loss_sentence(results, arm), _search_sentence(results, arm)]
        paragraphs.append(own)
    between = [_cost_sentence(results), _power_sentence(results)]
    if len(paragraphs) > 1:
        between = [
            *(_arms_sentence(results, place) for place in (ALIGNED, "output") if place == ALIGNED or place in results["layers"]),
            *between,
        ]
    return "\n\n".join(text for sentences in [*paragraphs, between] if (text := " ".join(filter(None, sentences))))


def _bought_sentence(results: dict, arm: str) -> str:
    """What the arm bought over the best that needs no training."""
    best = find_free(results, place_of(results, arm, ALIGNED), "mrr")
    family = _bought_family(results, arm, "mrr")
    if best is None or not family:
        return ""
    name = f"{BASELINES[best['way']].label} without any training: held-out MRR {_with_interval(best)} at {place_name(best['layer'])}"
    above, below = (_clear_ranks(family, sign) for sign in (1, -1))
    if above:
        return f"The {_ARMS[arm]} finds more than {name}, at {_named_ranks(above)} (p after Holm below .05)."
    differences = ", ".join(f"{number(test['difference'], '+')} at rank {test['rank']}" for test in (family[0], family[-1]))
    if below:
        return f"The {_ARMS[arm]} finds less than {name} ({differences}; p after Holm below .05 at {len(below)} of {len(family)} ranks)."
    return f"The {_ARMS[arm]} is not shown to find more, at any rank, than {name} ({differences})."


def _answer_sentence(results: dict, arm: str, question: str) -> str:
    """What the arm found where neither class nor loans help, or where a map may help, beside the same without training."""
    best, family = find_free(results, place_of(results, arm, ALIGNED), question), _bought_family(results, arm, question)
    if best is None or not family:
        return ""
    ranks = results["ranks"]
    found = [find_answer(results, arm, rank, question) for rank in dict.fromkeys((ranks[0], ranks[-1]))]
    values = " and ".join(f"{_with_interval(one)} at rank {one['rank']}" for one in found if one is not None)
    said = f"{QUESTIONS[question].named.capitalize()} the {_ARMS[arm]}'s is {values}, against {_with_interval(best)} without training"
    said += f" ({BASELINES[best['way']].label})"
    told = [f"{word} at {_named_ranks(clear)}" for word, sign in (("more", 1), ("less", -1)) if (clear := _clear_ranks(family, sign))]
    return f"{said}: {' and '.join(told) or 'no difference was found at any rank'}."


def _bought_family(results: dict, arm: str, question: str) -> list[dict]:
    return [test for test in results["bought"] if (test["arm"], test["question"]) == (arm, question)]


def _clear_ranks(family: list[dict], sign: int) -> list[int]:
    """The ranks at which the difference has this sign, and p after Holm is below .05."""
    clear = [test for test in family if test["p_holm"] is not None and is_significant(test["p_holm"])]
    return [test["rank"] for test in clear if test["difference"] * sign > 0]


def _named_ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _memory_sentence(results: dict, arm: str) -> str:
    """Whether more rank buys alignment, or only memory of the trained pairs."""
    ranks, place = results["ranks"], place_of(results, arm, ALIGNED)
    trends = {t["split"]: t for t in results["trends"] if (t["arm"], t["layer"], t["metric"]) == (arm, ALIGNED, "mrr")}
    if place not in results["layers"] or any(_trend_p(trend)[0] is None for trend in trends.values()):
        return ""
    first, last = (_with_interval(find(results, arm, rank, place, "mrr", "trained")) for rank in (ranks[0], ranks[-1]))
    said = (
        f"The trained pairs' own MRR goes from {first} at rank {ranks[0]} to {last} at rank {ranks[-1]} ({_trend_told(trends['trained'])})"
    )
    trained, new = (_direction(trends[split]) for split in ("trained", "held_out"))
    if trained > 0:
        bought = {
            1: "both memory of them and alignment of new words",
            0: "memory of them, and no alignment of new words that could be seen",
            -1: "memory of them, and new words lose by it",
        }[new]
        return f"{said}: more rank buys {bought}."
    return f"{said}: more rank was not seen to buy memory of them."


def _harm_sentence(results: dict, arm: str) -> str:
    ranks = results["ranks"]
    told = []
    for trend in (trend for trend in results["harm_trends"] if trend["arm"] == arm):
        first, last = (_with_interval(find_harm(results, arm, rank, trend["text"])) for rank in (ranks[0], ranks[-1]))
        ends = f"{first} times the base's at rank {ranks[0]}" + f" and {last} at rank {ranks[-1]}" * (len(ranks) > 1)
        told.append(f"on {trend['text']} {ends}" + (f" ({_trend_told(trend)})" if _trend_p(trend)[0] is not None else ""))
    return f"Its language model's perplexity is {'; '.join(told)}." if told else ""


def _trend_p(trend: dict) -> tuple[float | None, str]:
    """The p of a trend, and whose it is."""
    return (trend["p_page"], "Page's") if trend["p_page"] is not None else (trend["p_rho"], "Spearman's")


def _trend_told(trend: dict) -> str:
    p, name = _trend_p(trend)
    return f"{name} p {p_value(p)}, rho {number(trend['rho'], '+', 2)}"


def _direction(trend: dict) -> int:
    """1 of a trend that surely rises, -1 of one that surely falls, else 0."""
    p, _ = _trend_p(trend)
    return 0 if p is None or not is_significant(p) else 1 if trend["rho"] > 0 else -1


def _trend_sentence(results: dict, arm: str) -> str:
    ranks, layer = results["ranks"], place_of(results, arm, ALIGNED)
    if layer not in results["layers"]:
        return ""
    lowest, highest = (_with_interval(find(results, arm, rank, layer, "mrr")) for rank in (ranks[0], ranks[-1]))
    before = number(find_before(results, layer, "mrr")["value"])
    said = f"The {_ARMS[arm]}, at {place_name(layer)}, where its loss was: held-out MRR {before} before training, "
    said += f"{lowest} after it at rank {ranks[0]}"
    if len(ranks) == 1:
        return f"{said}."
    said += f", {highest} at rank {ranks[-1]}: "
    key = (arm, ALIGNED, "mrr", "held_out")
    trend = next(t for t in results["trends"] if (t["arm"], t["layer"], t["metric"], t["split"]) == key)
    if _trend_p(trend)[0] is None:
        return f"{said}too few runs to speak of a trend."
    found = {1: "it rises with the rank", -1: "it falls with the rank", 0: "no trend over the ranks was found"}[_direction(trend)]
    return f"{said}{found} ({_trend_told(trend)})."


def _arms_sentence(results: dict, place: Layer) -> str:
    family = [c for c in results["comparisons"] if (c["layer"], c["metric"]) == (place, "mrr") and c["p_holm"] is not None]
    where = "each where its loss was" if place == ALIGNED else f"both at {place_name(place)}"
    if not family:
        return f"The arms, {where}, cannot be compared with so few seeds."
    clear = [c for c in family if is_significant(c["p_holm"])]
    if not clear:
        smallest = p_value(min(c["p_holm"] for c in family))
        return f"Between the arms, {where}, no difference of held-out MRR was found at any rank (smallest p after Holm {smallest})."
    sides = []
    for arm, won in (("early", [c for c in clear if c["difference"] > 0]), ("full", [c for c in clear if c["difference"] < 0])):
        if won:
            names = ", ".join(f"{c['rank']} ({number(abs(c['difference']), '+')})" for c in won)
            sides.append(f"higher in the {_ARMS[arm]} at rank{'s' * (len(won) > 1)} {names}")
    rest = len(family) - len(clear)
    open_ones = f"; at the other {rest} no difference was found" if rest else ""
    return f"Between the arms, {where}, held-out MRR is {' and '.join(sides)}, p after Holm below .05{open_ones}."


def _control_sentence(results: dict, arm: str) -> str:
    layer = place_of(results, arm, ALIGNED)
    control = [c for c in results["controls"] if (c["arm"], c["layer"], c["metric"]) == (arm, ALIGNED, "mrr")]
    if not control or layer not in results["layers"]:
        return ""
    found, rank = control[0], control[0]["rank"]
    value = find(results, arm, rank, layer, "mrr", shuffled=True)
    said = f"Trained on shuffled pairs, the {_ARMS[arm]}'s at rank {rank} is {_with_interval(value)}"
    if found["p"] is None:
        return f"{said}."
    if is_significant(found["p"]) and found["difference"] > 0:
        return f"{said}: {number(found['difference'])} less than on true pairs (p {p_value(found['p'])}), and that part is alignment."
    return f"{said}: not shown to be less than on true pairs (p {p_value(found['p'])})."


def _loss_sentence(results: dict, arm: str) -> str:
    lowest = min((cost for cost in results["costs"] if cost["arm"] == arm), key=lambda cost: cost["loss_last"])
    if lowest["loss_chance"] is None or lowest["loss_last"] < _LITTLE_LEARNT * lowest["loss_chance"]:
        return ""
    ended = f"ended at {lowest['loss_last']:.2f} at the best, at rank {lowest['rank']}, where chance is {lowest['loss_chance']:.2f}"
    return f"The {_ARMS[arm]}'s loss {ended}: in {results['steps']} steps it learnt little, and more of them may change what is said of it."


def _search_sentence(results: dict, arm: str) -> str:
    tried, chosen = [one["rate"] for one in results["search"][arm]["tried"]], results["search"][arm]["chosen"]
    if not tried or min(tried) < chosen < max(tried):
        return ""
    side, other = ("lowest", "lower") if chosen == min(tried) else ("highest", "higher")
    return f"The best learning rate of the {_ARMS[arm]}, {chosen:g}, is the {side} that was tried: a {other} one may do better."


def _cost_sentence(results: dict) -> str:
    rank = results["ranks"][-1]
    costs = {cost["arm"]: cost for cost in results["costs"] if cost["rank"] == rank}
    if len(costs) < 2:
        return ""
    ratio = {key: costs["full"][key] / costs["early"][key] for key in ("training_seconds", "peak_bytes", "parameters")}
    return (
        f"At rank {rank} the full arm's training takes {ratio['training_seconds']:.1f} times the early one's time for as many steps, "
        f"{ratio['peak_bytes']:.1f} times the memory of its process, and its adapter is {ratio['parameters']:.1f} times as large."
    )


def _power_sentence(results: dict) -> str:
    seeds = results["values"][0]["n"]
    reach = [(c["high"] - c["low"]) / 2 for c in results["comparisons"] if c["metric"] == "mrr" and c["low"] is not None]
    if seeds == 1:
        return "With one seed nothing is known of what another would give."
    if not reach:
        return ""
    median = number(float(np.median(reach)))
    return f"With {seeds} seeds the intervals of the arms' differences reach {median} to each side (median): less could have been missed."


def tables(results: dict, full: bool = False) -> list[Table]:
    """Values at each layer, trends, comparisons, costs, and how the rates were chosen; ``full`` has every interval."""
    found = [_value_table(results, layer, full) for layer in results["layers"]] + [_answer_table(results, full)]
    found += [_trend_table(results)] if len(results["ranks"]) > 2 else []
    found += [_comparison_table(results)] if results["comparisons"] else []
    return [*found, _cost_table(results), *([_search_table(results)] if any(s["tried"] for s in results["search"].values()) else [])]


def _value_table(results: dict, layer: Layer, full: bool) -> Table:
    columns = ("clipscore", "clipscore_mismatched", "gap", "p_at_1", "mrr")
    chance = {metric: find_before(results, layer, metric)["chance"] for metric in ("p_at_1", "mrr")}

    def cells(found: list[dict]) -> list[str]:
        return [_value_cell(value, full or not value["metric"].startswith("clipscore")) for value in found]

    rows = [["before", *cells([find_before(results, layer, metric) for metric in columns])]]
    rows[0].append(number(find_before(results, layer, "p_at_1", "trained")["value"]))
    for arm in results["search"]:
        rows.append([_ARMS[arm]])
        for rank, control in _rows_of(results):
            own = cells([find(results, arm, rank, layer, metric, shuffled=control) for metric in columns])
            trained = find(results, arm, rank, layer, "p_at_1", "trained", control)
            rows.append([f"{rank}" + "\nshuffled" * control, *own, number(trained["value"])])
    losses = [_ARMS[arm] for arm in results["search"] if place_of(results, arm, ALIGNED) == layer]
    title = f"{place_name(layer).capitalize()}{''.join(f', where the loss of the {arm} is' for arm in losses)}: held-out pairs; "
    title += f"chance: P@1 {chance['p_at_1']:.2g}, MRR {chance['mrr']:.2g}"
    return Table(title, ["rank", *(MEASURES[metric].column or MEASURES[metric].label for metric in columns), "trained\nP@1"], rows)


def _answer_table(results: dict, full: bool) -> Table:
    """What a rank buys where the arm's loss was: held-out MRR in several ways, beside the best without training, and memory."""
    rows = []
    for arm in results["search"]:
        rows.append([_ARMS[arm]])
        best = [find_free(results, place_of(results, arm, ALIGNED), question) for question in QUESTIONS]
        rows.append(["best without\ntraining", *("" if one is None else _value_cell(one, full) for one in best)])
        for rank, control in _rows_of(results):
            own = [find_answer(results, arm, rank, question, control) for question in QUESTIONS]
            trained = find(results, arm, rank, ALIGNED, "mrr", "trained", control)
            cells = ["" if one is None else _value_cell(one, full) for one in (*own, trained)]
            rows.append([f"{rank}" + "\nshuffled" * control, *cells])
    title = "Where each arm's loss was: held-out MRR, found in several ways, and the trained pairs' own"
    return Table(title, ["rank", *(question.label for question in QUESTIONS.values()), "trained"], rows)


def _rows_of(results: dict) -> list[tuple[int, bool]]:
    """The ranks, and behind them that of the control on shuffled pairs."""
    return [*((rank, False) for rank in results["ranks"]), (results["config"]["search_rank"], True)]


def _trend_table(results: dict) -> Table:
    rows = []
    for arm in results["search"]:
        rows.append([_ARMS[arm]])
        for trend in results["trends"]:
            if (trend["arm"], trend["split"]) == (arm, "held_out") and trend["layer"] != ALIGNED:
                rho = number_or_dash(trend["rho"], "+", 2)
                rows.append([str(trend["layer"]), MEASURES[trend["metric"]].label, rho, p_value(trend["p_rho"]), p_value(trend["p_page"])])
    head = ["layer", "held-out", "Spearman's rho", "p", "Page's p"]
    return Table("Trend over the ranks", head, once(rows))


def _comparison_table(results: dict) -> Table:
    rows, above = [], None
    for c in results["comparisons"]:
        if c["metric"] in ("mrr", "gap"):
            key = (c["layer"], c["metric"])
            if key != above:
                rows.append([f"{c['layer']}, {MEASURES[c['metric']].label}"])
            above = key
            t = number_or_dash(c["t"], digits=1)
            rows.append([str(c["rank"]), number(c["difference"], "+"), interval(c), t, p_value(c["p"]), p_value(c["p_holm"])])
    title = "Early arm minus full arm, held-out pairs, by layer; aligned: each arm where its loss was"
    return Table(title, ["rank", "difference", "95 % interval", "t", "p", "Holm"], rows)


def _cost_table(results: dict) -> Table:
    harmed = list(dict.fromkeys(one["text"] for one in results["harm"]))
    rows = [
        [
            f"{cost['arm']} {cost['rank']}",
            f"{cost['parameters']:,}",
            f"{cost['adapter_bytes'] / 1e6:.2f} MB",
            f"{cost['training_seconds']:.0f} s",
            f"{cost['peak_bytes'] / 2**30:.2f} GiB",
            *(f"{find_harm(results, cost['arm'], cost['rank'], text)['value']:.2f}" for text in harmed),
        ]
        for cost in sorted(results["costs"], key=lambda cost: (list(results["search"]).index(cost["arm"]), cost["rank"]))
    ]
    jobs = results["config"]["jobs"]
    title = f"Cost of a run of {results['steps']} steps (median over seeds; {jobs} at a time)" if jobs > 1 else "Cost of a run"
    texts = [f"perplexity,\n{text_name(text)}" for text in harmed]
    title += "; perplexity in times the base's (geometric mean)" * bool(texts)
    return Table(title, ["arm, rank", "parameters", "adapter", "training", "peak memory", *texts], rows)


def _search_table(results: dict) -> Table:
    rows = []
    for arm, found in results["search"].items():
        for one in found["tried"]:
            chosen = "taken" if one["rate"] == found["chosen"] else ""
            runs = ", ".join(number(value) for value in one["runs"])
            rows.append([f"{_ARMS[arm]}", f"{one['rate']:g}", runs, f"{number(one['value'])} {interval(one)}", chosen])
    title = f"Learning rates tried at rank {results['config']['search_rank']}: MRR of pairs that the grid never sees"
    return Table(title, ["", "rate", "each run", "the worst", ""], once(rows))


def show(results: dict, console: rich.console.Console) -> None:
    """Print the tables and the paragraphs."""
    from rich.text import Text

    show_tables(tables(results), console)
    console.print(Text(in_words(results)))


def write(folder: pathlib.Path, results: dict) -> None:
    """Write ``FILES`` into ``folder``, each complete or absent, results.json last."""
    save_figure(folder / "bought.png", draw_bought(results))
    save_figure(folder / "rank.png", draw_ranks(results))
    save_figure(folder / "cost.png", draw_costs(results))
    write_markdown(folder / "report.md", markdown(results))
    write_json(folder / "results.json", results)


def markdown(results: dict) -> str:
    """report.md: the paragraphs, the tables, the figures, and all that a repetition needs."""
    config, pairs = results["config"], results["pairs"]
    about = (
        f"{_model_name(results)}, {results['model']['blocks']} blocks; {pairs['trained']:,} pairs trained and {pairs['held_out']:,} "
        f"held out by each seed (split by {pairs['split']}, at most {pairs['with_relative']:,} of them with a trained relative), "
        f"{results['values'][0]['n']} seeds, {results['steps']} steps of {config['batch']} pairs in every cell, "
        f"alpha rule {config['alpha_rule']}."
    )
    parts = ["# LoRA rank and alignment: an early layer against the full model", about, "## In words", in_words(results)]
    for table in tables(results, full=True):
        parts += [f"## {table.title}", as_markdown(table)]
    parts += [_READING, "## Figures", "![What a rank buys](bought.png)"]
    parts += ["![Scores against rank](rank.png)", "![Scores against cost](cost.png)"]
    rest = {key: results[key] for key in ("config", "model", "pairs", "steps", "versions", "machine")}
    # where it lay says nothing to others
    rest["config"] = {name: value for name, value in config.items() if name not in ("output", "json", "cells")}
    return "\n\n".join([*parts, to_repeat(rest)])


def _model_name(results: dict) -> str:
    name = results["model"]["name"]
    return name if name.count("/") <= 1 and not name.startswith((".", "/", "~")) else pathlib.Path(name).name


def _with_interval(record: dict) -> str:
    return number(record["value"]) + ("" if record["low"] is None else f" {interval(record)}")


def _value_cell(record: dict, with_interval: bool) -> str:
    return number(record["value"]) + (f"\n{interval(record)}" if with_interval and record["low"] is not None else "")
