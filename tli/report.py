"""The report of a run, and the adapter's model card: tables, figures and a verdict, all from the same numbers.

No mean cosine stands alone here: beside it stand the cosine of mismatched pairs, the gap, retrieval with its chance, and the sink's
share. Each number is given before and after, on trained pairs and on pairs that training never saw, at layer L and at ``output``,
where a user of the whole model would feel it; the loss was at one of the two. ``tli/verdict.py`` says it in words, ``tli/figures.py``
draws it.
"""

from __future__ import annotations

import json
import pathlib
import re
import typing

from tli.figures import draw_distributions, draw_layers, save_figure
from tli.metrics.alignment import RETRIEVAL, Alignment, measurements
from tli.metrics.measures import DIFFERENCE, SPLITS
from tli.model.shape import Layer
from tli.records import aligned_layer, compared_layers, find_value, interval, number, p_value, place_name
from tli.runtime.files import write_text
from tli.stats import tests as significance
from tli.tables import Table, as_markdown, once
from tli.tables import show as show_tables
from tli.verdict import verdict

if typing.TYPE_CHECKING:
    import rich.console

FILES = ("report.json", "report.md", "distributions.png", "layers.png", "README.md")
LABELS = {
    "gap": "gap",
    "p_at_1": "P@1",
    "mrr": "MRR",
    "cosine": "cosine, true",
    "mismatched": "cosine, mismatched",
    "sink_share": "sink share",
}
TESTED = ("gap", "p_at_1", "mrr", "cosine", "mismatched")
# trained and held-out retrieval have different numbers of candidates; their gains are not comparable
TESTED_BETWEEN = ("gap", "cosine")

_WIDE_COLUMNS = 110
_LANGUAGE_CODES = {"swahili": "sw", "english": "en"}


def write_report(
    folder: str | pathlib.Path, run: dict, alignments: dict[tuple[str, str, Layer], Alignment], console: rich.console.Console
) -> dict:
    """Write report.json, report.md, distributions.png, layers.png and README.md into ``folder``, print the tables, return the report.

    run          plain JSON values: config (with what its token_norm came to), model {name, family, blocks, width, sha256},
                 pairs {name, sha256, trained, held_out}, adapter {sha256, parameters, bytes}, training {steps, seconds,
                 words_per_second, loss_first, loss_last, chance_loss}, versions, machine, missing_output (None or the reason),
                 shuffled (bool). chance_loss may be None.
    alignments   by (split, when, layer): "trained" or "held_out", "before" or "after", 0..N or "output". Layer L must be there
                 before and after; other layers go into the curves, ``output`` into the tables, too.

    Each file is complete or absent; report.json comes last. No NaN is ever written.
    """
    folder = pathlib.Path(folder)
    report = assemble(run, alignments)
    save_figure(folder / "distributions.png", draw_distributions(report, alignments))
    save_figure(folder / "layers.png", draw_layers(report))
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "README.md", model_card(report))
    write_text(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    show(report, console)
    return report


def clear(folder: str | pathlib.Path) -> None:
    """Delete an older report in ``folder``: it must not stand beside an adapter that it does not speak of."""
    for name in FILES:
        (pathlib.Path(folder) / name).unlink(missing_ok=True)


def assemble(run: dict, alignments: dict[tuple[str, str, Layer], Alignment]) -> dict:
    """The facts of the run, and of them all: ``measurements`` in every layer, ``tests`` at L and ``output``, ``verdict``."""
    seed = run["config"]["seed"]
    records = [record for key, alignment in alignments.items() for record in measurements(alignment, *key, seed)]
    tests = []
    for layer in compared_layers(run, records):
        gains = {}
        for split in [s for s in SPLITS if (s, "after", layer) in alignments]:
            before, after = (alignments[split, when, layer] for when in ("before", "after"))
            for metric in TESTED:
                values = before.per_pair(metric), after.per_pair(metric)
                gains[split, metric] = values[1] - values[0]
                compared = significance.compare_paired(*values, seed)
                tests.append({"test": "paired", "split": split, "layer": layer, "metric": metric, **compared})
        for metric in TESTED_BETWEEN if ("held_out", "gap") in gains else ():
            compared = significance.welch(gains["trained", metric], gains["held_out", metric])
            tests.append({"test": "welch", "split": DIFFERENCE, "layer": layer, "metric": metric, **compared})
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

    console.print(Text(_summary(report)))
    console.print()
    for layer in compared_layers(report, report["measurements"]):
        name, between = place_name(layer).capitalize(), " " if wide else "\n"
        values = shown(f"{name}: mean and 95 % interval", _value_rows(report, layer, tuple(LABELS), between))
        gains = shown(f"{name}: gain, after - before (paired t; difference: Welch's t)", _gain_rows(report, layer))
        show_tables([values, gains], console, padding=int(wide))
    console.print(Text(report["verdict"]))


def markdown(report: dict) -> str:
    """report.md: the verdict, the tables with both directions of retrieval, the figures, and all that a repetition needs."""
    parts = [
        f"# Alignment of {_languages(report)} at {place_name(aligned_layer(report))}",
        _summary(report),
        "## Verdict",
        report["verdict"],
    ]
    rows = ("gap", *RETRIEVAL, "cosine", "mismatched", "sink_share")
    for layer in compared_layers(report, report["measurements"]):
        parts += [f"## {place_name(layer).capitalize()}", _as_markdown(_value_rows(report, layer, rows, " "))]
        parts += ["Gain, after - before:", _as_markdown(_gain_rows(report, layer))]
    parts += [_READING, "## Figures", "![Cosines of true and mismatched pairs](distributions.png)", "![Gap and MRR by layer](layers.png)"]
    facts = {key: report[key] for key in report if key not in ("measurements", "tests", "verdict")}
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report["machine"].items())
    parts += ["## To repeat it", f"The same settings give the same adapter, byte for byte, on the same machine alone: {machine}."]
    parts += ["```json\n" + json.dumps(facts, indent=1, allow_nan=False) + "\n```"]
    return "\n\n".join(parts) + "\n"


def model_card(report: dict) -> str:
    """README.md of the adapter: front matter for the hub, the numbers with their controls, how to load it, what it is not for."""
    config, layer = report["config"], aligned_layer(report)
    base = _hub_name(report["model"]["name"])
    codes = [code for code in map(_language_code, (config["source"], config["target"])) if code]
    front = [f"base_model: {json.dumps(base)}", "library_name: peft", "pipeline_tag: feature-extraction"]
    front += ["language:", *(f"- {code}" for code in codes)] if codes else []
    front += ["tags:", *(f"- {tag}" for tag in ("lora", "peft", "tli", "cross-lingual-alignment", "lexical-alignment"))]
    parts = ["---\n" + "\n".join(front) + "\n---", f"# {base}: {_languages(report)} words aligned at {place_name(layer)}", _summary(report)]
    parts += ["## What the numbers show", report["verdict"]]
    for place in compared_layers(report, report["measurements"]):
        parts += [f"### {place_name(place).capitalize()}", _as_markdown(_value_rows(report, place, tuple(LABELS), " "))]
    parts += [
        _READING,
        "## How to load it",
        _LOADING.format(base=base, state=-1 if layer == "output" else layer, prefix=_prefix(config), pool=_pool(config, layer)),
    ]
    return "\n\n".join([*parts, _CAVEATS.format(place=place_name(layer))]) + "\n"


_READING = """\
How to read this. The *gap* is the mean cosine of true pairs minus that of mismatched pairs. *P@1* is how often the true partner is the
nearest candidate, *MRR* the mean of 1/rank; both are means of the two directions unless one is named. *Chance* is their value for ranks
drawn by lot from as many candidates; trained and held-out lists differ in length, so in chance, too. The *sink share* is the part of a
word's states, by norm, that the first position would make up if it were pooled. A mean cosine that rises for mismatched pairs as well is
a shift of all words. Brackets are 95 % bootstrap intervals over pairs (BCa, 2,000 resamples); one without width means that all pairs
agree, not that the value is certain. The p-values are not corrected for their number: the held-out gap where the loss was is the question,
the rest is context. The control for all of it is the same run with `--shuffle-pairs`."""

_LOADING = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

A word's vector is made from `output_hidden_states=True`, `hidden_states[{state}]` of the word alone behind the beginning-of-sequence
token{prefix}: {pool}."""

_CAVEATS = """\
## What it is not

It aligns single words of one list at {place}. It was not tested on sentences, translation or text generation; blocks above the
adapters see changed states, and the model's other abilities may have suffered. Held-out words come from the same list as the trained ones.
`report.md` and `report.json` hold all numbers, tests, versions and hashes."""


def _prefix(config: dict) -> str:
    written = {"": "", " ": " and a space"}
    return written.get(config.get("prefix", ""), f" and the text {config.get('prefix')!r}")


def _pool(config: dict, layer: Layer) -> str:
    norms = {
        "final": "each token state through the model's final norm",
        "rms": "each token state over its root mean square",
        "none": "the token states",
    }
    first = "the first position included" if config["eval_pool_bos"] else "the first position left out"
    # the output is normalised already
    token_states = norms["none" if layer == "output" else config["token_norm"]]
    return f"{token_states}, their mean over the word's tokens, {first}, then unit length"


def _summary(report: dict) -> str:
    model, pairs, training, adapter = (report[key] for key in ("model", "pairs", "training", "adapter"))
    chance = "" if training["chance_loss"] is None else f" (chance {training['chance_loss']:.3f})"
    return (
        f"{_hub_name(model['name'])}, {model['blocks']} blocks; {pairs['name']}: {pairs['trained']:,} pairs trained"
        f"{', shuffled into false ones' if report['shuffled'] else ''}, {pairs['held_out']:,} held out{_samples(report)}; "
        f"{adapter['parameters']:,} adapter parameters, {training['steps']:,} steps in {training['seconds']:.1f} s, "
        f"{training['words_per_second']:,.0f} words/s; loss {training['loss_first']:.3f} -> {training['loss_last']:.3f}{chance}."
    )


def _samples(report: dict) -> str:
    """What is said of splits of which a random part was measured."""
    sizes = {record["split"]: record["n"] for record in report["measurements"]}
    parts = [f"{n:,} {SPLITS[split]}" for split, n in sizes.items() if n < report["pairs"][split]]
    return f" (measured: a random sample, {' and '.join(parts)})" if parts else ""


def _value_rows(report: dict, layer: Layer, metrics: tuple[str, ...], between: str) -> list[list[str]]:
    """A head and a row per metric; ``between`` stands between a value and its interval."""
    splits = [split for split in SPLITS if find_value(report, split, "after", layer, "gap")]
    counts = {split: f"(n={find_value(report, split, 'after', layer, 'gap')['n']})" for split in splits}
    rows = [[""]]
    for split in splits:
        # in a narrow table a split's name and number stand side by side above its two columns
        above = (SPLITS[split], counts[split]) if between == "\n" else (f"{SPLITS[split]} {counts[split]}",) * 2
        rows[0] += [f"{above[0]}\nbefore", f"{above[1]}\nafter", "\nchance"]
    for metric in metrics:
        row = [_label(report, metric)]
        for split in splits:
            cells = [find_value(report, split, when, layer, metric) for when in ("before", "after")]
            row += ["" if cell is None else f"{number(cell['value'])}{between}{interval(cell)}" for cell in cells]
            row.append(number(cells[1]["chance"]) if cells[1] and cells[1]["chance"] is not None else "")
        rows += [row] if any(row[1:]) else []
    return rows


def _gain_rows(report: dict, layer: Layer) -> list[list[str]]:
    rows = [["", "pairs", "gain", "95 % interval", "t", "p", "Wilcoxon", "d_z"]]
    for test in sorted((t for t in report["tests"] if t["layer"] == layer), key=lambda t: TESTED.index(t["metric"])):
        paired = test["test"] == "paired"
        ranks = [p_value(test["p_wilcoxon"]), "inf" if test["d_z"] is None else number(test["d_z"], digits=2)] if paired else ["", ""]
        t, p = "inf" if test["t"] is None else number(test["t"], digits=1), p_value(test["p_t"] if paired else test["p"])
        gain = number(test["mean_gain" if paired else "difference"], "+")
        rows.append([LABELS[test["metric"]], SPLITS.get(test["split"], "difference"), gain, interval(test), t, p, *ranks])
    return once(rows)


def _as_markdown(rows: list[list[str]]) -> str:
    return as_markdown(Table("", rows[0], rows[1:]))


def _label(report: dict, metric: str) -> str:
    source, target = report["config"]["source"], report["config"]["target"]
    if metric.endswith("_forward"):
        return f"{LABELS[metric.removesuffix('_forward')]}, {source} to {target}"
    return f"{LABELS[metric.removesuffix('_backward')]}, {target} to {source}" if metric.endswith("_backward") else LABELS[metric]


def _languages(report: dict) -> str:
    return f"{report['config']['source'].capitalize()} and {report['config']['target'].capitalize()}"


def _language_code(name: str) -> str | None:
    return _LANGUAGE_CODES.get(name.lower()) or (name.lower() if re.fullmatch(r"[A-Za-z]{2,3}", name) else None)


def _hub_name(name: str) -> str:
    # a card is made to be published: of a local path it shows the last part only
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else pathlib.Path(name).name
