"""A scan in tables, on the console and within 80 columns, and in words.

Each sentence of the verdict is a rule about numbers in the tables, and says nothing that they do not.
"""

from __future__ import annotations

import shlex
import typing

from tli.metrics.baseline_records import PLAIN
from tli.metrics.baselines import BASELINES
from tli.metrics.measures import MEASURES
from tli.model.shape import Layer
from tli.reports.tables import Table
from tli.reports.tables import show as show_tables
from tli.reports.wording import interval, number, place_name, side, side_of_chance
from tli.runtime.cli import flag

if typing.TYPE_CHECKING:
    import rich.console

# a rise of the mismatched cosine that is worth a sentence
_SHIFT_ABOVE = 0.1
_NORMS = {"final": "through the final norm", "rms": "over their root mean square", "none": "as they are"}
# measures of vectors with BOS left out; CKA has its chance beside it
_SHOWN = (
    "auc",
    "p_at_1",
    "p_at_5",
    "mrr",
    "csls_p_at_1",
    "mexa",
    "cka",
    "cka_chance",
    "centred_gap",
    "standardised_gap",
    "iso_score",
    "random_cosine",
)


def verdict(report: dict) -> str:
    """What the numbers show, in words; each sentence is a rule about numbers in the tables."""
    sinks = [_sink(report, stream) for stream in report["sink_layers"]]
    return "\n\n".join(
        filter(None, (_choice(report), _alignment(report), _maps(report, "base"), *sinks, _with_adapter(report), _other_options(report)))
    )


def _choice(report: dict) -> str:
    found, chosen = _index(report, "base"), report["choice"]
    gap, true, mismatched = found["gap", "word", "gap"], *(found["paper", "raw_bos", name] for name in ("cosine", "mismatched"))
    by_gap = f"{number(gap['value'], '+', 4)} {interval(gap)}{'' if side(gap) == 'above' else '; at no layer is it surely above zero'}"
    by_cosine = f"{number(true['value'], digits=5)}, and {number(mismatched['value'], digits=5)} for mismatched pairs"
    if chosen["gap"] == chosen["paper"]:
        both = f"Both rules choose layer {chosen['gap']}: the gap with BOS left out ({by_gap}), and the"
        return f"{both} mean cosine of true pairs with BOS pooled ({by_cosine})."
    return (
        f"The two rules differ: the paper's, the highest mean cosine of true pairs with BOS pooled, chooses layer {chosen['paper']} "
        f"({by_cosine}); the gap with BOS left out chooses layer {chosen['gap']} ({by_gap})."
    )


def _alignment(report: dict) -> str:
    layer, found = report["choice"]["gap"], _index(report, "base")
    auc, rank, hit = (found["gap", "word", name] for name in ("auc", "mrr", "p_at_1"))
    text = (
        f"At layer {layer} of the base a true pair is nearer than a mismatched one with a probability of {number(auc['value'])} "
        f"{interval(auc)} (.5 by chance), and retrieval is {side_of_chance(rank)} chance: MRR {number(rank['value'], digits=4)} "
        f"{interval(rank)} against "
        f"{number(rank['chance'], digits=4)}, P@1 {number(hit['value'], digits=4)} against {number(hit['chance'], digits=4)}."
    )
    gaps = {r["stratum"]: r for r in report["strata"] if (r["stream"], r["layer"], r["metric"]) == ("base", layer, "gap")}
    if not {"loan words", "no loan words"} <= gaps.keys():
        return text
    loans, others = (f"{number(r['value'], '+', 4)} {interval(r)}" for r in (gaps["loan words"], gaps["no loan words"]))
    spelling = ": spelling may be all of it" * (side(gaps["loan words"]) == "above" != side(gaps["no loan words"]))
    return f"{text} The gap is {loans} among loan words and {others} among the others{spelling}."


def _maps(report: dict, stream: str) -> str:
    """Where a closed-form map finds most, beside the plain cosine there."""
    found = _maps_by_layer(report, stream)
    if not found:
        return ""
    way, layer = max(((way, layer) for way, layer in found if way != PLAIN), key=lambda key: found[key]["value"])
    mapped, plain = found[way, layer], found[PLAIN, layer]
    mrr = [f"{number(record['value'])} {interval(record)}" for record in (mapped, plain)]
    numbers = f"MRR {mrr[0]} of {mapped['n']:,} pairs that it was not fitted on, where the cosine as it is has {mrr[1]}"
    if side_of_chance(mapped) != "above":
        best = f"{BASELINES[way].label} at {place_name(layer)}"
        return f"No linear map finds translations above chance at any layer (the best: {best}, {numbers})."
    return f"A linear map finds most at {place_name(layer)}: {BASELINES[way].label}, {numbers} (chance {number(mapped['chance'])})."


def _maps_by_layer(report: dict, stream: str) -> dict[tuple[str, Layer], dict]:
    """The MRR records of the maps, by way and layer; none in scans of versions without them, and where pairs were too few."""
    records = (report.get("maps") or {}).get("records", [])
    return {(r["way"], r["layer"]): r for r in records if (r["stream"], r["metric"]) == (stream, "mrr")}


def _map_rows(report: dict, stream: str) -> list[list[str]]:
    found = _maps_by_layer(report, stream)
    ways = list(dict.fromkeys(way for way, _ in found))
    heads = ["cosine\nas it is" if way == PLAIN else BASELINES[way].label.replace(" of states", "\nof states") for way in ways]
    rows = [["layer", *(cell for head in heads for cell in (head, "95 %\ninterval"))]]
    for layer in dict.fromkeys(layer for _, layer in found):
        shown = (found[way, layer] for way in ways)
        rows.append([_marked(report, layer), *(cell for record in shown for cell in (number(record["value"]), interval(record)))])
    # it depends on the number of candidates alone
    chance = number(next(iter(found.values()))["chance"])
    return [*rows, ["chance", *(cell for _ in ways for cell in (chance, ""))]]


def _sink(report: dict, stream: str) -> str:
    found, of_sink = _index(report, stream), report["sink_layers"][stream]
    if not of_sink:
        return ""
    worst = max(of_sink, key=lambda layer: found[layer, "raw_bos", "mismatched"]["value"])
    pooled, mismatched, alone = (number(found[worst, "raw_bos", name]["value"], digits=5) for name in ("cosine", "mismatched", "sink_only"))
    words, apart = (number(found[worst, "raw", name]["value"]) for name in ("cosine", "mismatched"))
    return (
        f"Warning{', with the adapter' * (stream == 'adapter')}: with BOS pooled, the mean cosine is the sink's at {_ranges(of_sink)}. At "
        f"{place_name(worst)} the sink is {found[worst, 'raw_bos', 'sink_share']['value']:.0%} of a pooled word; true pairs have {pooled} "
        f"and mismatched ones {mismatched}, where words with nothing in common but this sink would have {alone}. Without it they have "
        f"{words} and {apart}."
    )


def _with_adapter(report: dict) -> str:
    if report["adapter"] is None:
        return ""
    base, adapter = (_index(report, stream) for stream in ("base", "adapter"))
    best = _surest_layer(report, "adapter")
    after, before = (f"{number(r['value'], '+')} {interval(r)}" for r in (found[best, "word", "gap"] for found in (adapter, base)))
    text = f"With the adapter the gap is surest at layer {best}: {after}, where the base has {before}."
    rise = {layer: adapter[layer, "word", "mismatched"]["value"] - base[layer, "word", "mismatched"]["value"] for layer in _layers(report)}
    most = max(rise, key=rise.__getitem__)
    if rise[most] > _SHIFT_ABOVE:
        mismatched = " to ".join(number(found[most, "word", "mismatched"]["value"]) for found in (base, adapter))
        text += f" Mismatched pairs' mean cosine rises from {mismatched} at {place_name(most)}: there all words are drawn together."
    if report["config"]["split"] == "all":
        text += " Pairs that it was trained on are not left out here; --split held_out does."
    return text


def _other_options(report: dict) -> str:
    recorded = report["adapter"] and report["adapter"]["recorded"]
    names = ("prefix", "token_norm", "weights", *(("held_out", "seed") if report["config"]["split"] != "all" else ()))
    other = [name for name in names if recorded and recorded["config"].get(name, report["config"][name]) != report["config"][name]]
    if not other:
        return ""
    flags = " ".join(f"{flag(name)} {shlex.quote(str(recorded['config'][name]))}" for name in other)
    return f"The adapter was trained with other options than it is scanned with: {flags}."


def show(report: dict, console: rich.console.Console) -> None:
    """Print the tables, within 80 columns, and the verdict."""
    from rich.text import Text

    stream = "base" if report["adapter"] is None else "adapter"
    of = "" if report["adapter"] is None else f", with the adapter {report['adapter']['name']}"
    scanned, listed = (report["pairs"][name] for name in ("scanned", "listed"))
    pairs = f"{scanned:,} pairs" + (f" of {listed:,}, drawn at random" if scanned < listed else "")
    console.print(Text(f"{report['model']['name']}{of}; {report['pairs']['name']}: {pairs}\n"))
    norm = _NORMS[report["config"]["token_norm"]]
    about = f"Mean cosines. BOS in: token states as they are, BOS pooled (the paper's). BOS out: token states {norm}, BOS left out."
    marks = f"*: the gap's choice, p: the paper's{', both of the base' * (stream == 'adapter')}"
    _print_table(console, f"{about} {marks}", _cosine_rows(report, stream))
    _print_table(console, "Is there alignment? BOS left out", _alignment_rows(report, stream))
    if _maps_by_layer(report, stream):
        fitted, judged = report["maps"]["fitted"], report["maps"]["judged"]
        _print_table(console, f"Is it held there? MRR of {judged:,} pairs, maps fitted on {fitted:,} others", _map_rows(report, stream))
    layer = _surest_layer(report, stream)
    _print_table(console, f"Kinds of pairs at layer {layer}, where the gap is surest; BOS left out", _stratum_rows(report, stream, layer))
    if report["adapter"] is not None:
        _print_table(console, "The adapter beside the base, BOS left out", _beside_rows(report))
    if report["missing_output"]:
        console.print(Text(f"The scan ends early: {report['missing_output']}.\n"))
    console.print(Text(report["verdict"]))


def _print_table(console: rich.console.Console, title: str, rows: list[list[str]]) -> None:
    show_tables([Table(title, rows[0], rows[1:])], console)


def _cosine_rows(report: dict, stream: str) -> list[list[str]]:
    found = _index(report, stream)
    heads = ("\nmism.", "\ngap")
    rows = [["layer", "BOS in:\ntrue", *heads, "sink\nshare", "sink /\nword", "BOS out:\ntrue", *heads, "95 %\ninterval"]]
    for layer in _layers(report):
        pooled, word = ({name: found[layer, of, name] for name in ("cosine", "mismatched", "gap")} for of in ("raw_bos", "word"))
        share, ratio = (found[layer, "raw_bos", name]["value"] for name in ("sink_share", "norm_ratio"))
        cells = [number(pooled[name]["value"]) for name in ("cosine", "mismatched")] + [number(pooled["gap"]["value"], "+", 4)]
        cells += [f"{share:.2f}", f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"]
        cells += [number(word[name]["value"]) for name in ("cosine", "mismatched")] + [number(word["gap"]["value"], "+", 4)]
        rows.append([_marked(report, layer), *cells, interval(word["gap"])])
    return rows


def _alignment_rows(report: dict, stream: str) -> list[list[str]]:
    found = _index(report, stream)

    def cell(layer: Layer, metric: str, part: str) -> str:
        if metric == "cka_chance":
            metric, part = "cka", "chance"
        value = found[layer, "word", metric][part]
        return "" if value is None else _short(value, MEASURES[metric].digits)

    heads = [MEASURES[metric].column or f"\n{MEASURES[metric].label}" if metric != "cka_chance" else "by\nchance" for metric in _SHOWN]
    rows = [["layer", *heads]]
    rows += [[_marked(report, layer), *(cell(layer, metric, "value") for metric in _SHOWN)] for layer in _layers(report)]
    by_chance = ["" if metric.startswith("cka") else cell("gap", metric, "chance") for metric in _SHOWN]
    return [*rows, ["chance", *by_chance]]


def _stratum_rows(report: dict, stream: str, layer: Layer) -> list[list[str]]:
    rows = [["", "pairs", "gap", "95 % interval", "P@1", "95 % interval", "chance"]]
    mine = [r for r in report["strata"] if (r["stream"], r["layer"]) == (stream, layer)]
    for gap, hit in zip(mine[::2], mine[1::2], strict=True):
        shown = [
            number(gap["value"], "+", 4),
            interval(gap),
            number(hit["value"], digits=4),
            interval(hit),
            number(hit["chance"], digits=4),
        ]
        rows.append([gap["stratum"], f"{gap['n']:,}", *shown])
    return rows


def _beside_rows(report: dict) -> list[list[str]]:
    base, adapter = (_index(report, stream) for stream in ("base", "adapter"))
    names = {"gap": "gap", "mismatched": "mism.", "p_at_1": "P@1", "mrr": "MRR"}
    rows = [["layer", *(f"{head}{when}" for head in names.values() for when in ("\nbase", "\nadapter"))]]
    for layer in _layers(report):
        cells = [number(found[layer, "word", name]["value"], digits=4) for name in names for found in (base, adapter)]
        rows.append([_marked(report, layer), *cells])
    return rows


def _surest_layer(report: dict, stream: str) -> Layer:
    """The layer where the lower end of the gap's interval is the highest: for the base the one that the gap chooses."""
    if stream == "base":
        return report["choice"]["gap"]
    found = _index(report, stream)
    return max((layer for layer in _layers(report) if layer not in (0, "output")), key=lambda layer: found[layer, "word", "gap"]["low"])


def _index(report: dict, stream: str) -> dict[tuple[Layer, str, str], dict]:
    """One stream's records by (layer, vectors, metric); the layers that the rules choose also by the rule's name."""
    found = {(r["layer"], r["vectors"], r["metric"]): r for r in report["measurements"] if r["stream"] == stream}
    named = {(rule, *key[1:]): r for rule, layer in report["choice"].items() for key, r in found.items() if key[0] == layer}
    return found | named


def _layers(report: dict) -> list[Layer]:
    return list(dict.fromkeys(r["layer"] for r in report["measurements"]))


def _marked(report: dict, layer: Layer) -> str:
    """A layer's name, with a mark where a rule chooses it."""
    marks = {"gap": "*", "paper": "p"}
    return f"{layer}{''.join(mark for rule, mark in marks.items() if report['choice'][rule] == layer)}"


def _short(value: float, digits: int) -> str:
    """Without the zero before the point: twelve columns have little room."""
    return number(value, digits=digits).replace("0.", ".", 1) if abs(value) < 1 else number(value, digits=digits)


def _ranges(found: list[Layer]) -> str:
    """``layers 1-9, 12-30 and the output``."""
    runs: list[list[int]] = []
    # a layer is a number, or the word output
    for layer in typing.cast("list[int]", [layer for layer in found if layer != "output"]):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    named = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    several = "s" * (sum(map(len, runs)) > 1)
    return " and ".join([f"layer{several} {', '.join(named)}"] * bool(named) + ["the output"] * ("output" in found))
