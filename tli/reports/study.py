"""What a study found: every value over seeds with its interval, trends over ranks, the arms against each other, in tables and words.

The unit is a run. A score is never shown without its control: CLIPScore beside that of mismatched pairs, all beside the same
measured before training, by chance, and after training on shuffled pairs.
"""

from __future__ import annotations

import pathlib
import typing

import numpy as np

from tli.metrics.baseline_records import ALL, BEFORE, PLAIN
from tli.metrics.baselines import BASELINES
from tli.metrics.measures import MEASURES, names
from tli.model.shape import Layer
from tli.reports.figures.study import draw_costs, draw_ranks
from tli.reports.figures.style import save_figure
from tli.reports.glossary import how_to_read
from tli.reports.tables import Table, as_markdown, once, to_repeat
from tli.reports.tables import show as show_tables
from tli.reports.wording import aligned_layer, find_value, interval, is_significant, number, number_or_dash, p_value, place_name
from tli.runtime import cpu
from tli.runtime.files import SCHEMA, write_json, write_text
from tli.stats.across_runs import compare_arms, rank_trend, seed_interval
from tli.stats.tests import add_holm

if typing.TYPE_CHECKING:
    import rich.console

    from tli.commands.grid import Cell

FILES = ("results.json", "report.md", "rank.png", "cost.png")
# where an arm's loss was: layer L or the output
ALIGNED = "aligned"
# what cells record of each layer; a study's list has no references
METRICS = tuple(name for name in names("tested") if not name.startswith("ref_"))
_ARMS = {"early": "early arm", "full": "full arm"}
# a last loss above this part of chance's
_LITTLE_LEARNT = 0.9

_READING = how_to_read("seeds", "CLIPScore", "gap", "retrieval", "trends", "arms", "shuffled")


def search_record(rate: float, report: dict) -> dict:
    """How well a learning rate did: the MRR of the pairs that the grid never sees, at the layer of the loss."""
    found = find_value(report, "held_out", "after", aligned_layer(report), "mrr")
    return {"rate": rate, **{key: found[key] for key in ("value", "low", "high", "n")}}


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
    held_out = {
        (arm, place, metric): np.array([over_seeds((arm, rank, False), "held_out", "after", place, metric) for rank in ranks]).T
        for arm in arms
        for place in (*places, ALIGNED)
        for metric in names("judged")
    }
    trends = [
        {"arm": arm, "layer": place, "metric": metric, **rank_trend(of_runs, ranks)} for (arm, place, metric), of_runs in held_out.items()
    ]
    free = _without_training([runs[*cells[0], seed] for seed in seeds], places)
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
        "bought": _bought(held_out, free, arms, ranks, config["layer"]),
        "comparisons": _compare(held_out, arms, ranks, (*places, ALIGNED)),
        "controls": _control(runs, arms, seeds, config["search_rank"], over_seeds, (*places, ALIGNED)),
        "costs": [_cost(arm, rank, [runs[arm, rank, shuffled, seed] for seed in seeds]) for arm, rank, shuffled in cells if not shuffled],
        "versions": first["versions"],
        "machine": first["machine"] | {"processor": cpu.name()},
    }


def _without_training(reports: list[dict], places: list[Layer]) -> list[dict]:
    """Held-out MRR of what needs no training, over seeds; of each layer the best, oracles left out. Any cell of a seed knows it."""
    found = []
    for place in places:
        by_way: dict[str, list[float]] = {}
        for report in reports:
            for record in (report.get("baselines") or {}).get("records", []):
                told = (record["candidates"], record["group"], record["metric"]) == ("split", ALL, "mrr")
                is_free = record["stream"] in (BEFORE, None) and record["layer"] in (place, None) and record["way"] != PLAIN
                if told and is_free and not BASELINES[record["way"]].oracle:
                    by_way.setdefault(record["way"], []).append(record["value"])
        if by_way:
            best = max(by_way, key=lambda way: float(np.mean(by_way[way])))
            found.append({"layer": place, "way": best, **seed_interval(by_way[best]), "by_seed": by_way[best]})
    return found


def _bought(held_out: dict, free: list[dict], arms: list[str], ranks: list[int], layer: int) -> list[dict]:
    """Held-out MRR of each rank minus the best without training where the arm's loss was; Holm's correction over the ranks."""
    found = []
    for arm in arms:
        place: Layer = "output" if arm == "full" else layer
        for best in (one for one in free if one["layer"] == place):
            columns = held_out[arm, ALIGNED, "mrr"].T
            family = [{"arm": arm, "rank": rank, **compare_arms(column, best["by_seed"])} for rank, column in zip(ranks, columns)]
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
        "perplexity_ratio": _perplexity_ratios(reports),
    }


def _perplexity_ratios(reports: list[dict]) -> dict[str, float]:
    """How many times the base's perplexity the trained model's is, by text: medians over seeds."""
    by_text: dict[str, list[float]] = {}
    for report in reports:
        for one in report.get("harm") or []:
            by_text.setdefault(one["text"]["name"], []).append(one["after"][0]["perplexity_ratio"]["value"])
    return {name: float(np.median(ratios)) for name, ratios in by_text.items()}


def find(results: dict, arm: str, rank: int, layer: Layer, metric: str, split: str = "held_out", shuffled: bool = False) -> dict:
    """The value after training with these keys; ``ALIGNED`` is where the arm's loss was."""
    layer = _place(results, arm, layer)
    wanted = {"arm": arm, "rank": rank, "shuffled": shuffled, "split": split, "when": "after", "layer": layer, "metric": metric}
    return next(value for value in results["values"] if wanted.items() <= value.items())


def find_before(results: dict, layer: Layer, metric: str, split: str = "held_out") -> dict:
    """The value before training."""
    wanted = {"split": split, "when": "before", "layer": layer, "metric": metric}
    return next(value for value in results["values"] if wanted.items() <= value.items())


def _place(results: dict, arm: str, layer: Layer) -> Layer:
    if layer != ALIGNED:
        return layer
    return "output" if arm == "full" else results["config"]["layer"]


def in_words(results: dict) -> str:
    """One paragraph, every sentence a rule about numbers in the tables."""
    search = results["search"]
    sentences = [_bought_sentence(results, arm) for arm in search] + [_trend_sentence(results, arm) for arm in search]
    if len(search) > 1:
        sentences += [_arms_sentence(results, place) for place in (ALIGNED, "output") if place == ALIGNED or place in results["layers"]]
    sentences += [_control_sentence(results, arm) for arm in search]
    sentences += [said for arm in search for said in (_loss_sentence(results, arm), _search_sentence(results, arm))]
    sentences += [_cost_sentence(results), _power_sentence(results)]
    return " ".join(sentence for sentence in sentences if sentence)


def _bought_sentence(results: dict, arm: str) -> str:
    """What the arm bought over the best that needs no training."""
    layer = _place(results, arm, ALIGNED)
    best = next((one for one in results.get("without_training", []) if one["layer"] == layer), None)
    family = [test for test in results.get("bought", []) if test["arm"] == arm]
    if best is None or not family:
        return ""
    name = f"{BASELINES[best['way']].label} without any training: held-out MRR {_with_interval(best)} at {place_name(layer)}"
    clear = [test for test in family if test["p_holm"] is not None and is_significant(test["p_holm"])]
    above, below = ([test["rank"] for test in clear if test["difference"] * sign > 0] for sign in (1, -1))
    if above:
        ranks = f"rank{'s' * (len(above) > 1)} {', '.join(map(str, above))}"
        return f"The {_ARMS[arm]} finds more than {name}, at {ranks} (p after Holm below .05)."
    differences = ", ".join(f"{number(test['difference'], '+')} at rank {test['rank']}" for test in (family[0], family[-1]))
    if below:
        return f"The {_ARMS[arm]} finds less than {name} ({differences}; p after Holm below .05 at {len(below)} of {len(family)} ranks)."
    return f"The {_ARMS[arm]} is not shown to find more, at any rank, than {name} ({differences})."


def _trend_sentence(results: dict, arm: str) -> str:
    ranks, layer = results["ranks"], _place(results, arm, ALIGNED)
    if layer not in results["layers"]:
        return ""
    lowest, highest = (_with_interval(find(results, arm, rank, layer, "mrr")) for rank in (ranks[0], ranks[-1]))
    before = number(find_before(results, layer, "mrr")["value"])
    said = f"The {_ARMS[arm]}, at {place_name(layer)}, where its loss was: held-out MRR {before} before training, "
    said += f"{lowest} after it at rank {ranks[0]}"
    if len(ranks) == 1:
        return f"{said}."
    said += f", {highest} at rank {ranks[-1]}: "
    trend = next(t for t in results["trends"] if (t["arm"], t["layer"], t["metric"]) == (arm, ALIGNED, "mrr"))
    p, name = (trend["p_page"], "Page's") if trend["p_page"] is not None else (trend["p_rho"], "Spearman's")
    if p is None:
        return f"{said}too few runs to speak of a trend."
    found = f"it {'rises' if trend['rho'] > 0 else 'falls'} with the rank" if is_significant(p) else "no trend over the ranks was found"
    return f"{said}{found} ({name} p {p_value(p)}, rho {number(trend['rho'], '+', 2)})."


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
    layer = _place(results, arm, ALIGNED)
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
    found = [_value_table(results, layer, full) for layer in results["layers"]]
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
        shuffled = [results["config"]["search_rank"]]
        for rank, control in [*((rank, False) for rank in results["ranks"]), *((rank, True) for rank in shuffled)]:
            own = cells([find(results, arm, rank, layer, metric, shuffled=control) for metric in columns])
            trained = find(results, arm, rank, layer, "p_at_1", "trained", control)
            rows.append([f"{rank}" + "\nshuffled" * control, *own, number(trained["value"])])
    losses = [_ARMS[arm] for arm in results["search"] if _place(results, arm, ALIGNED) == layer]
    title = f"{place_name(layer).capitalize()}{''.join(f', where the loss of the {arm} is' for arm in losses)}: held-out pairs; "
    title += f"chance: P@1 {chance['p_at_1']:.2g}, MRR {chance['mrr']:.2g}"
    return Table(title, ["rank", *(MEASURES[metric].column or MEASURES[metric].label for metric in columns), "trained\nP@1"], rows)


def _trend_table(results: dict) -> Table:
    rows = []
    for arm in results["search"]:
        rows.append([_ARMS[arm]])
        for trend in results["trends"]:
            if trend["arm"] == arm and trend["layer"] != ALIGNED:
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
    rows = [
        [
            f"{cost['arm']} {cost['rank']}",
            f"{cost['parameters']:,}",
            f"{cost['adapter_bytes'] / 1e6:.2f} MB",
            f"{cost['training_seconds']:.0f} s",
            f"{cost['peak_bytes'] / 2**30:.2f} GiB",
            *(f"{ratio:.2f}" for ratio in cost.get("perplexity_ratio", {}).values()),
        ]
        for cost in sorted(results["costs"], key=lambda cost: (list(results["search"]).index(cost["arm"]), cost["rank"]))
    ]
    jobs = results["config"]["jobs"]
    title = f"Cost of a run of {results['steps']} steps (median over seeds; {jobs} at a time)" if jobs > 1 else "Cost of a run"
    texts = [
        f"perplexity,\n{name.removesuffix('.txt').removeprefix('running-text-')}"
        for name in results["costs"][0].get("perplexity_ratio", {})
    ]
    title += "; perplexity in times the base's" * bool(texts)
    return Table(title, ["arm, rank", "parameters", "adapter", "training", "peak memory", *texts], rows)


def _search_table(results: dict) -> Table:
    rows = []
    for arm, found in results["search"].items():
        for one in found["tried"]:
            chosen = "taken" if one["rate"] == found["chosen"] else ""
            rows.append([f"{_ARMS[arm]}", f"{one['rate']:g}", f"{number(one['value'])} {interval(one)}", chosen])
    title = f"Learning rates tried at rank {results['config']['search_rank']}: MRR of pairs that the grid never sees"
    return Table(title, ["", "rate", "MRR", ""], once(rows))


def show(results: dict, console: rich.console.Console) -> None:
    """Print the tables and the paragraph."""
    from rich.text import Text

    show_tables(tables(results), console)
    console.print(Text(in_words(results)))


def write(folder: pathlib.Path, results: dict) -> None:
    """Write ``FILES`` into ``folder``, each complete or absent, results.json last."""
    save_figure(folder / "rank.png", draw_ranks(results))
    save_figure(folder / "cost.png", draw_costs(results))
    write_text(folder / "report.md", markdown(results))
    write_json(folder / "results.json", results)


def markdown(results: dict) -> str:
    """report.md: the paragraph, the tables, the figures, and all that a repetition needs."""
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
    parts += [_READING, "## Figures", "![Scores against rank](rank.png)", "![Scores against cost](cost.png)"]
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
