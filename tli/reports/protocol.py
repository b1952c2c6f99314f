"""The paper's protocol, switch by switch, in words and tables: on the console within 80 columns, and as protocol.md.

Each sentence is a rule about numbers in the tables, and says nothing that they do not.
"""

from __future__ import annotations

import textwrap
import typing

from tli.metrics.measures import SPLITS
from tli.reports.baselines import baseline_table, bought
from tli.reports.glossary import how_to_read
from tli.reports.tables import Table, as_markdown, to_repeat
from tli.reports.tables import show as show_tables
from tli.reports.wording import (
    find_gain,
    find_value,
    is_shift,
    is_significant,
    number,
    p_value,
    side,
    side_of_chance,
    signed_gain,
)

if typing.TYPE_CHECKING:
    import rich.console

# arXiv 2506.15415: evaluation at hidden state 2 with BOS left out, pilot with BOS pooled
PUBLISHED: dict[str, typing.Any] = {
    "model": "Lugha-Llama-8B-wura",
    "trained": {"n": 623, "before": 0.3211, "after": 0.4113, "p": "<1.33e-240"},
    "held_out": {"n": 63, "before": 0.3143, "after": 0.4033, "p": "<7.17e-27"},
    "pilot": {"0": 0.3153, "1": 0.9808, "2": 0.99998, "31": 0.9876},
}
_COLUMNS = {"cosine": "cosine,\ntrue", "mismatched": "cosine,\nmism.", "gap": "gap", "p_at_1": "P@1", "mrr": "MRR"}
_CHANGED = 0.0005
# rows in which there is nothing to learn
_CONTROLS = ("shuffled", "random-weights")
_TITLE_COLUMNS = 20


def sentence(row: dict, first: dict) -> str:
    """What a row's switch makes of the number, beside the ``first`` row, the paper's protocol."""
    if row["way"] == "everywhere":
        return _sentence_everywhere(row["check"])
    true, mismatched = (_way(row, metric) for metric in ("cosine", "mismatched"))
    if row["way"] == "null":
        ranks = f"trained pairs' retrieval is {_side(row, 'trained')}"
        return f"True pairs have the cosine {true} and mismatched ones {mismatched}, without a model or a meaning; {ranks}."
    values = [[find_value(of, "trained", when, of["layer"], "cosine")["value"] for when in ("before", "after")] for of in (row, first)]
    as_before = all(abs(mine - by_default) < _CHANGED for mine, by_default in zip(*values))
    beside = ", as in the first row," if as_before else f" (first row: {_way(first, 'cosine')})"
    goes = f"Trained pairs' cosine goes {true}{'' if row['name'] == first['name'] else beside} and mismatched pairs' {mismatched}"
    return f"{goes}: {_kind(row)}; retrieval ends {_side(row, 'trained')}, that of held-out pairs {_side(row, 'held_out')}."


def _sentence_everywhere(check: dict) -> str:
    numbers = "equal to the last bit, so the numbers are the first row's"
    if not check["equal_below"]:
        numbers = "not equal, so the first row's numbers, which stand here, may not be this one's"
    return (
        f"{check['parameters']:,} parameters in place of {check['parameters_below']:,}: in {check['steps']} steps of both side by side, "
        f"{check['learning_above']} of the {check['adapters_above']} adapters above the layer learnt, and the losses and the adapters "
        f"below it were {numbers}."
    )


def verdict(report: dict) -> str:
    """What all rows together show: how far a choice moves the number, whether controls move with it, what the first row bought."""
    rows = report["rows"]
    measured = [row for row in rows if row["way"] in ("report", "measured")]
    after = sorted((find_value(row, "trained", "after", row["layer"], "cosine")["value"], row["title"]) for row in measured)
    significant = [row for row in measured if is_significant(find_gain(row, row["layer"], "cosine", "trained")["p_t"])]
    controls = [row["title"] for row in significant if row["name"] in _CONTROLS]
    rose = [row["title"] for row in measured if side(find_gain(row, row["layer"], "gap", "held_out")) == "above"]
    (lowest, low), (highest, high) = after[0], after[-1]
    told = (
        f"One choice moves the trained pairs' cosine after training from {number(lowest)} ({low}) to {number(highest)} ({high}). "
        f"The paired t-test on that cosine has p below .05 in {len(significant)} of {len(measured)} rows"
        f"{', ' + ' and '.join(controls) + ' among them' if controls else ''}; "
        f"the held-out gap surely rose in {f'{len(rose)}: ' + ', '.join(rose) if rose else 'none'}."
    )
    beside = bought(report, rows[0]["layer"])
    return f"{told} Of the first row: {beside[0].lower()}{beside[1:]}" if beside else told


def _way(row: dict, metric: str, split: str = "trained") -> str:
    """The split's value before -> after, or the only one there is."""
    found = (find_value(row, split, when, row["layer"], metric) for when in ("before", "after"))
    return " -> ".join(number(record["value"]) for record in found if record is not None)


def _kind(row: dict) -> str:
    """What the change of the trained pairs' cosine is, in the light of their gap's."""
    cosine, gap = (find_gain(row, row["layer"], metric, "trained") for metric in ("cosine", "gap"))
    if side(cosine) == "at":
        kind = "no sure change"
    elif side(cosine) == "below":
        further = {"above": "mismatched pairs fell further", "below": "true pairs fell further", "at": "a fall of all words"}
        kind = further[side(gap)]
    else:
        kind = "a shift of all words" if is_shift(cosine, gap) else "true pairs rose above mismatched ones"
    return f"{kind}, the gap changing by {signed_gain(gap)}"


def _side(row: dict, split: str) -> str:
    """On which side of chance the split's retrieval is in the end."""
    found = (find_value(row, split, when, row["layer"], "mrr") for when in ("before", "after"))
    *_, last = (record for record in found if record is not None)
    return f"{side_of_chance(last)} chance (MRR {_way(row, 'mrr', split)}, chance {number(last['chance'])})"


def show(report: dict, console: rich.console.Console) -> None:
    """Print a table per split, and the sentences."""
    from rich.text import Text

    note = "\nbefore training above, after it below; p: paired t-test on cosine and gap"
    show_tables([Table(_title(report, split) + note, _head(), _rows(report, split, "\n")) for split in SPLITS], console)
    if (beside := _baselines(report, intervals=False)) is not None:
        show_tables([beside], console)
    for row in report["rows"]:
        console.print(Text(f"{row['title']}: ", style="bold") + Text(row["sentence"], style="none"))
    console.print()
    console.print(Text(report["verdict"]))


def markdown(report: dict) -> str:
    """protocol.md: the tables, the sentences, how to read them, and what a repetition needs."""
    parts = [
        f"# The paper's protocol, one switch at a time: {report['model']['name']}",
        "Which choice makes which number? The first row is the protocol of arXiv 2506.15415 as it was run, on this model; every other row "
        "changes one thing of it. The cosine of true pairs is the paper's number; the columns beside it say what it is worth.",
        report["verdict"],
        "![Cosines and retrieval of every row](protocol.png)",
    ]
    for split in SPLITS:
        parts += [f"## {_title(report, split)}", as_markdown(Table("", _head(), _rows(report, split, " -> ")))]
    if (beside := _baselines(report, intervals=True)) is not None:
        parts += [f"## {beside.title}", as_markdown(beside)]
    rows = [f"- **{row['title']}**{_options(row)}. {row['shows']} *{row['sentence']}*" for row in report["rows"]]
    parameters = {row["name"]: row["parameters"] for row in report["rows"]}
    facts = {**{key: report[key] for key in ("config", "model", "pairs", "versions", "machine")}, "adapter_parameters": parameters}
    parts += ["## What each switch makes of the number", "\n".join(rows), _READING]
    return "\n\n".join([*parts, to_repeat(facts, "`python -m tli.study protocol`")])


def _title(report: dict, split: str) -> str:
    first = report["rows"][0]
    hits, ranks = (find_value(first, split, "after", first["layer"], metric) for metric in ("p_at_1", "mrr"))
    chance = f"by chance P@1 {number(hits['chance'], digits=4)} and MRR {number(ranks['chance'], digits=4)}"
    return f"{SPLITS[split].capitalize()} pairs, n = {ranks['n']:,}; {chance}"


def _baselines(report: dict, intervals: bool) -> Table | None:
    """What finds the held-out pairs with the first row's training, and what without any."""
    return baseline_table(report, report["rows"][0]["layer"], intervals)


def _head() -> list[str]:
    return ["", *_COLUMNS.values(), "p,\ncosine", "p,\ngap"]


def _rows(report: dict, split: str, arrow: str) -> list[list[str]]:
    """A row per switch, with intervals where they fit; the published one, another model's, stands behind the first."""
    rows, told = [], PUBLISHED[split]
    for row in report["rows"]:
        cells = []
        for metric in _COLUMNS:
            found = [find_value(row, split, when, row["layer"], metric) for when in ("before", "after")]
            found = [record for record in found if record is not None]
            # with as many digits as the values
            last = f" [{number(found[-1]['low'])}, {number(found[-1]['high'])}]" if arrow != "\n" else ""
            cells.append(arrow.join(number(record["value"]) for record in found) + last)
        tests = (find_gain(row, row["layer"], metric, split) for metric in ("cosine", "gap"))
        rows.append([_folded(row["title"]), *cells, *("" if test is None else p_value(test["p_t"]) for test in tests)])
    published = arrow.join(f"{told[when]:.4f}" for when in ("before", "after"))
    of = f"published: another model (n = {told['n']})"
    return [rows[0], [_folded(of), published, "", "", "", "", told["p"], ""], *rows[1:]]


def _folded(title: str) -> str:
    return "\n".join(textwrap.wrap(title, _TITLE_COLUMNS))


def _options(row: dict) -> str:
    """A switch as options of ``tli.train`` beside ``--recipe paper``, in brackets."""
    changes = [f"{part} with `{name} = {value}`" for part in ("trained", "measured") for name, value in row[part].items()]
    return f" ({', '.join(changes)})" if changes else ""


_PILOT = ", ".join(f"{value} at hidden state {layer}" for layer, value in PUBLISHED["pilot"].items())
_READING = f"""\
## How to read this

{how_to_read("gap", "retrieval", "intervals")} Each cell is before -> after training, its bracket that of the last number. *p* is the paired
t-test's, after against before: on the cosine as the paper has it, and on the gap; it is not corrected for the number of rows.

A cosine that rises for mismatched pairs as much as for translations is a shift of all words, however small its p: a t-test on the cosine
cannot tell the two apart; the gap and the ranks can. The paper published the cosines of true pairs of another model,
{PUBLISHED["model"]}, on {PUBLISHED["trained"]["n"]} and {PUBLISHED["held_out"]["n"]} other pairs; they stand here for their size, not to
be met by this model. Its pilot, with BOS pooled and before training, gave {_PILOT}.

Rows that change the measurement alone measure an adapter anew, and the base with it. *Adapters in all blocks* is not trained to the end:
where a loss reads hidden state L no gradient reaches a block above it, which was checked by some steps of the whole model beside the
truncated one; its numbers are the first row's and its size is its own. The last row is simulated at this model's width with the words' own
numbers of tokens; words of m and n tokens have the cosine k²/√((k²+m)(k²+n))."""
