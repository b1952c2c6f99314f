"""The report of a training run: tables, figures and a verdict, all from the same numbers.

No mean cosine stands alone here: beside it stand the cosine of mismatched pairs, the gap, retrieval with its chance, and the sink's
share. Each number is given before and after, on trained pairs and on pairs that training never saw, at layer L and at ``output``,
where a user of the whole model would feel it; the loss was at one of the two. ``tli/reports/verdict.py`` says it in words,
``tli/reports/figures/training.py`` draws it.
"""

from __future__ import annotations

import pathlib
import typing

from tli.metrics.alignment import Alignment
from tli.metrics.comparison import summarize
from tli.metrics.measures import names
from tli.model.shape import Layer
from tli.reports.baselines import baseline_table
from tli.reports.figures.style import save_figure
from tli.reports.figures.training import draw_distributions, draw_layers
from tli.reports.harm import harm_table
from tli.reports.model_card import model_card
from tli.reports.run_tables import READING, gain_rows, languages, rows_as_markdown, summary, value_rows
from tli.reports.tables import Table, as_markdown, to_repeat, write_markdown
from tli.reports.tables import show as show_tables
from tli.reports.verdict import verdict
from tli.reports.wording import aligned_layer, compared_layers, place_name
from tli.runtime.files import write_json

if typing.TYPE_CHECKING:
    import rich.console


FILES = ("report.json", "report.md", "distributions.png", "layers.png", "README.md")

_WIDE_COLUMNS = 110


def write_report(
    folder: str | pathlib.Path, run: dict, alignments: dict[tuple[str, str, Layer], Alignment], console: rich.console.Console
) -> dict:
    """Write report.json, report.md, distributions.png, layers.png and README.md into ``folder``, print the tables, return the report.

    run          plain JSON values: config (with what its token_norm came to), model {name, family, blocks, width, sha256},
                 pairs {name, sha256, trained, held_out}, adapter {sha256, parameters, bytes}, training {steps, seconds,
                 words_per_second, loss_first, loss_last, chance_loss}, versions, machine, missing_output (None or the reason),
                 shuffled (bool), and baselines {records, tests}, probe and harm (by text) if measured. chance_loss may be None.
    alignments   by (split, when, layer): "trained" or "held_out", "before" or "after", 0..N or "output". Layer L must be there
                 before and after; other layers go into the curves, ``output`` into the tables, too.

    Each file is complete or absent; report.json comes last. No NaN is ever written.
    """
    folder = pathlib.Path(folder)
    report = assemble(run, alignments)
    save_figure(folder / "distributions.png", draw_distributions(report, alignments))
    save_figure(folder / "layers.png", draw_layers(report))
    write_markdown(folder / "report.md", markdown(report))
    write_markdown(folder / "README.md", model_card(report))
    write_json(folder / "report.json", report)
    show(report, console)
    return report


def clear(folder: str | pathlib.Path) -> None:
    """Delete an older report in ``folder``: it must not stand beside an adapter that it does not speak of."""
    for name in FILES:
        (pathlib.Path(folder) / name).unlink(missing_ok=True)


def assemble(run: dict, alignments: dict[tuple[str, str, Layer], Alignment]) -> dict:
    """The facts of the run, and of them all: ``measurements`` in every layer, ``tests`` at L and ``output``, ``verdict``."""
    layers = [run["config"]["layer"], "output"]
    records, tests = summarize(alignments, run["config"]["seed"], base="before", layers=layers)
    report = {**run, "measurements": records, "tests": tests}
    return {**report, "verdict": verdict(report)}


def show(report: dict, console: rich.console.Console) -> None:
    """Print the tables and the verdict to ``console``: intervals beside the values if it is wide, below them if it is not."""
    from rich.text import Text

    wide = console.width >= _WIDE_COLUMNS

    def shown(title: str, rows: list[list[str]]) -> Table:
        labels = [row[0] if wide else row[0].replace(", ", ",\n").replace(" share", "\nshare") for row in rows]
        head, *rest = [[label, *cells] for label, (_, *cells) in zip(labels, rows)]
        return Table(title, head, rest)

    console.print(Text(summary(report)))
    console.print()
    for layer in compared_layers(report, report["measurements"]):
        name, between = place_name(layer).capitalize(), " " if wide else "\n"
        values = shown(f"{name}: mean and 95 % interval", value_rows(report, layer, names("headline"), between))
        gains = shown(f"{name}: gain, after - before (paired t; difference: Welch's; p by Holm)", gain_rows(report, layer))
        show_tables([values, gains], console)
        if (beside := baseline_table(report, layer, intervals=False)) is not None:
            show_tables([beside], console)
    show_tables([harm_table(harm) for harm in report.get("harm", [])], console)
    console.print(Text(report["verdict"]))


def markdown(report: dict) -> str:
    """report.md: the verdict, the tables with both directions of retrieval, the figures, and all that a repetition needs."""
    parts = [
        f"# Alignment of {languages(report)} at {place_name(aligned_layer(report))}",
        summary(report),
        "## Verdict",
        report["verdict"],
    ]
    # with each direction of retrieval, which the console leaves out
    rows = tuple(name for name in names("recorded") if not name.startswith(("clipscore", "ref_clipscore")))
    for layer in compared_layers(report, report["measurements"]):
        parts += [f"## {place_name(layer).capitalize()}", rows_as_markdown(value_rows(report, layer, rows, " "))]
        parts += ["Gain, after - before:", rows_as_markdown(gain_rows(report, layer))]
        if (beside := baseline_table(report, layer)) is not None:
            parts += [f"{beside.title}:", as_markdown(beside)]
    for harm in report.get("harm", []):
        table = harm_table(harm)
        parts += [f"{table.title[0].upper()}{table.title[1:]}:", as_markdown(table)]
    parts += [READING, "## Figures", "![Cosines of true and mismatched pairs](distributions.png)", "![Gap and MRR by layer](layers.png)"]
    facts = {key: report[key] for key in report if key not in ("measurements", "tests", "baselines", "harm", "verdict")}
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report["machine"].items())
    same = f"The same settings give the same adapter, byte for byte, on the same machine alone: {machine}."
    return "\n\n".join([*parts, to_repeat(facts, same)])
