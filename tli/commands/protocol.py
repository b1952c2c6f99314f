"""The paper's protocol with one switch changed at a time, and the number that each choice makes.

Every row differs from the first, the paper's own protocol, in one thing. Rows that change the training are trained, each in a cell
(``tli/commands/grid.py``), and their numbers are those of the cell's own report. Rows that change the measurement alone measure such a
cell's adapter anew. Two rows have no training of their own (``tli/commands/protocol_controls.py``): adapters where no gradient comes, and
words with nothing but a sink in common. Reads top to bottom: the rows -> the folder -> the cells -> the rows' numbers -> sentences,
tables, a figure.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from tli.commands.grid import REPORT, Cell, claim_folder, remove_cells, run_cells
from tli.commands.protocol_controls import adapters_everywhere, save_random_model, sink_only
from tli.config import LIST_OPTIONS, ProtocolConfig, TrainConfig
from tli.data import word_pairs
from tli.data.pair_store import Pair
from tli.data.relatives import split_facts
from tli.metrics.alignment import measure
from tli.metrics.comparison import summarize
from tli.metrics.layer_pass import measure_layers, tokenise_pairs
from tli.metrics.measures import names
from tli.model import starter
from tli.model.checkpoint import Checkpoint, open_checkpoint
from tli.model.lora import Adapter
from tli.model.pooling import Pooling
from tli.model.trained_adapter import load_adapter
from tli.reports.figures.protocol import draw_protocol
from tli.reports.figures.style import save_figure
from tli.reports.protocol import PUBLISHED, markdown, sentence, show, verdict
from tli.reports.tables import write_markdown
from tli.runtime import environment
from tli.runtime.cli import as_dict
from tli.runtime.console import cells_bar, open_console
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError, disk_errors
from tli.runtime.files import SCHEMA, remove_written, require_written, write_json

FILES = ("protocol.json", "protocol.md", "protocol.png")
# what the option ``model`` says until there is a folder to name
RANDOM = "random weights"
# of the null model: how many times as long as a token's vector the shared one is
SINK_LENGTH = 343.0
_SETTINGS = "settings.json"
# options of tli.train that are not a run's own, or are another option's doing
_NOT_COMPARED = ("recipe", "output", "overwrite", "resume", "no_report", "json")


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One row: what it changes against the paper's protocol.

    name       of the row, and of the cell that it is trained in
    title      what it is, in a table
    shows      what a reader sees by it
    trained    options of ``tli.train`` that differ from its ``--recipe paper``
    measured   options that differ in the measurement of an adapter that was trained with ``trained``
    way        how its numbers come to be: "report", a cell's; "measured" anew; "everywhere" and "null", the controls
    """

    name: str
    title: str
    shows: str
    trained: dict = dataclasses.field(default_factory=dict)
    measured: dict = dataclasses.field(default_factory=dict)
    way: str = "report"


ABLATIONS = (
    Ablation(
        "paper",
        "the paper's protocol",
        "Hidden state 2, NF4, bf16, BOS pooled in training and left out of the measurement, q_proj and v_proj, the hinge.",
    ),
    Ablation(
        "bos-measured",
        "BOS pooled in the measurement, too",
        "The same adapter, measured as the paper's pilot measured its layers: every vector now holds one and the same sink.",
        measured={"eval_pool_bos": True},
        way="measured",
    ),
    Ablation(
        "bos-not-trained", "BOS left out in training, too", "The loss sees words alone, as the measurement does.", {"pool_bos": False}
    ),
    Ablation("layer-1", "hidden_states[1]", "'Layer 2' counted from the embeddings as the first: one block less.", {"layer": 1}),
    Ablation("layer-3", "hidden_states[3]", "'Layer 2' as what comes out of the block with the index 2: one block more.", {"layer": 3}),
    Ablation(
        "final-norm",
        "hidden_states[2] after the final norm",
        "What a model built with num_hidden_layers=2 calls hidden_states[2]: each token state through the norm of the model's end.",
        {"token_norm": "final"},
    ),
    Ablation("rms-norm", "token states over their RMS", "Each token weighs as much as the others of its word.", {"token_norm": "rms"}),
    Ablation("full", "weights not rounded to NF4", "Trained and measured in the checkpoint's own weights.", {"weights": "full"}),
    Ablation(
        "nf4-then-full",
        "trained in NF4, measured without",
        "The first row's adapter, measured on weights that it was not trained on.",
        measured={"weights": "full"},
        way="measured",
    ),
    Ablation(
        "full-then-nf4",
        "trained without NF4, measured in it",
        "The other way round.",
        {"weights": "full"},
        {"weights": "nf4"},
        "measured",
    ),
    Ablation("float32", "computed in float32", "NF4 weights, but activations and products in fp32 in place of bf16.", {"dtype": "float32"}),
    Ablation(
        "adapters-everywhere",
        "adapters in all blocks",
        "Adapters above the hidden state that the loss reads are counted and saved, and never learn.",
        way="everywhere",
    ),
    Ablation("infonce", "InfoNCE in place of the hinge", "All negatives of a batch, both ways, not the hardest one.", {"loss": "infonce"}),
    Ablation("shuffled", "shuffled pairs", "The control: no true pair is ever taught.", {"shuffle_pairs": True}),
    Ablation("random-weights", "a model of random weights", "The same architecture and tokenizer, before any learning.", {"model": RANDOM}),
    Ablation(
        "sink-only",
        "no model: a shared sink only",
        f"Tokens are random directions of length 1; one vector {SINK_LENGTH:g} times as long is pooled into every word.",
        way="null",
    ),
)


def protocol(config: ProtocolConfig) -> dict:
    """Train and measure every row of ``ABLATIONS``, and write protocol.json, protocol.md and protocol.png to ``config.output``.

    What an earlier run with the same settings completed in that folder is kept: a protocol that was stopped goes on.

    Returns:
        What ``protocol.json`` holds.

    Raises:
        TliError: for whatever a user can cause; nothing that existed before is lost.
        KeyboardInterrupt: after a stop by Ctrl-C; complete cells stay, the one at work can go on.
    """
    console = open_console()
    output = pathlib.Path(config.output).expanduser()
    pairs = word_pairs.read_list(config, console)
    splits = dict(zip(("trained", "held_out"), word_pairs.split_pairs(pairs, TrainConfig().held_out, config.seed)))
    checkpoint = open_checkpoint(starter.locate(config.model))
    runs = {switch.name: options_of(switch, config, output) for switch in ABLATIONS}
    deepest = max(options["layer"] for options in runs.values())
    if checkpoint.blocks < deepest:
        must = f"the model must have at least {deepest} blocks, as hidden states 1 to {deepest} are compared"
        raise TliError("--model", must, checkpoint.blocks, "choose a deeper model")
    facts = _facts(config, checkpoint, pairs.reading.file, splits, deepest)
    # what is measured here must be what the cells' own reports measure
    splits = {split: part.subset(word_pairs.sample(part, config.seed)) for split, part in splits.items()}
    _claim(output, facts, config.overwrite)

    folder, random_folder = output / "cells", _random_folder(output)
    cells = [Cell(switch.name, runs[switch.name]) for switch in ABLATIONS if switch.way == "report"]
    for cell in cells:
        if cell.options["model"] == str(random_folder) and cell.report(folder) is None and not random_folder.exists():
            save_random_model(checkpoint, random_folder, config.seed)
    with cells_bar(console, [cell.weight for cell in cells]) as done:
        run_cells(cells, folder, config.jobs, lambda cell: done(cell.weight))
    if random_folder.exists():
        remove_written(random_folder)

    reports = {cell.name: json.loads((folder / cell.name / REPORT).read_text(encoding="utf-8")) for cell in cells}
    rows: list[dict] = []
    for switch in ABLATIONS:
        name = next(cell.name for cell in cells if cell.options == runs[switch.name])
        report = reports[name]
        row = {**dataclasses.asdict(switch), **_numbers(switch, report, folder / name, checkpoint, splits)}
        rows.append({**row, "sentence": sentence(row, rows[0] if rows else row)})
    result = {
        "schema": SCHEMA,
        **facts,
        "machine": report["machine"],
        "published": PUBLISHED,
        "rows": rows,
        "baselines": reports[ABLATIONS[0].name]["baselines"],
    }
    result["verdict"] = verdict(result)
    save_figure(output / "protocol.png", draw_protocol(result))
    write_markdown(output / "protocol.md", markdown(result))
    write_json(output / "protocol.json", result)
    show(result, console)
    console.print(f"in {output}: {', '.join(FILES)}, and each training in cells/")
    return result


def options_of(switch: Ablation, config: ProtocolConfig, output: pathlib.Path) -> dict:
    """The options of the run that a row is trained by: the paper's recipe spelled out, with the row's own change."""
    given = {name: getattr(config, name) for name in ("model", *LIST_OPTIONS, "seed", "epochs")} | switch.trained
    if given["model"] == RANDOM:
        given["model"] = str(_random_folder(output))
    options = as_dict(TrainConfig(recipe="paper", **given))
    return {name: value for name, value in options.items() if name not in _NOT_COMPARED}


def _random_folder(output: pathlib.Path) -> pathlib.Path:
    return output / "random-weights"


def _facts(
    config: ProtocolConfig, checkpoint: Checkpoint, file: dict[str, str], splits: Mapping[str, Sequence[Pair]], deepest: int
) -> dict:
    """What must be the same for a stopped protocol to go on: plain JSON values."""
    local = None if checkpoint.folder is None else checkpoint.folder.resolve().name
    name = starter.NAME if config.model is None else local or config.model
    return {
        "config": {name: getattr(config, name) for name in (*LIST_OPTIONS, "seed", "epochs") if name != "pairs"},
        "model": {"name": name, "family": checkpoint.config.model_type, "blocks": checkpoint.blocks, "sha256": checkpoint.sha256(deepest)},
        "pairs": {**file, **split_facts(splits["trained"], splits["held_out"], "families")},
        "versions": environment.versions(),
    }


def _claim(output: pathlib.Path, facts: dict, overwrite: bool) -> None:
    """Make the folder, or go on in it if it is that of a protocol with the same facts."""
    if overwrite:
        _make_room(output, facts)
    claim_folder(output, _SETTINGS, "protocol", facts, overwrite)


def _make_room(output: pathlib.Path, facts: dict) -> None:
    """Delete what a protocol left in the folder, and nothing else: none of another's cells may be taken for this one's."""
    try:
        known = json.loads((output / _SETTINGS).read_text(encoding="utf-8")).keys() == facts.keys()
    except FileNotFoundError:
        if not any(path.exists() for path in (output / "cells", _random_folder(output))):
            return
        known = False
    except (OSError, ValueError, AttributeError):
        known = False
    if not known or output.is_symlink():
        must = "a folder that is overwritten must be new, empty or a protocol's"
        raise TliError("--output", must, output, "name another with --output")
    random_folder = _random_folder(output)
    if random_folder.exists():
        require_written(random_folder)
    remove_cells([Cell(switch.name, {}) for switch in ABLATIONS], output / "cells")
    if random_folder.exists():
        remove_written(random_folder)
    with disk_errors(output):
        for name in (*FILES, _SETTINGS):
            (output / name).unlink(missing_ok=True)


def _numbers(switch: Ablation, report: dict, folder: pathlib.Path, checkpoint: Checkpoint, splits: Mapping[str, Sequence[Pair]]) -> dict:
    """A row's measurements and tests, from the report of the cell in ``folder`` or beyond it."""
    options = report["config"]
    row = {"cell": folder.name, "layer": options["layer"], "seconds": report["training"]["seconds"]}
    row |= {"parameters": report["adapter"]["parameters"], **of_report(report)}
    if switch.way == "measured":
        return row | measure_anew(options | switch.measured, folder, checkpoint, splits)
    if switch.way == "everywhere":
        check = adapters_everywhere(options, checkpoint, splits["trained"])
        return row | {"parameters": check["parameters"], "check": check}
    if switch.way == "null":
        words = tokenise_pairs(checkpoint, options["prefix"], [*splits["trained"], *splits["held_out"]])
        return measure_null(words, splits, checkpoint.config.hidden_size, options["seed"])
    return row


def of_report(report: dict) -> dict:
    """The numbers that a cell's own report has for its layer."""
    layer = report["config"]["layer"]
    return _numbers_of(*([record for record in report[part] if record["layer"] == layer] for part in ("measurements", "tests")))


def _numbers_of(measurements: list[dict], tests: list[dict]) -> dict:
    """Of a report's records those that a row shows."""
    return {
        "measurements": [record for record in measurements if record["metric"] in names("headline")],
        "tests": [test for test in tests if test["test"] == "paired" and test["metric"] in names("between")],
    }


def measure_anew(options: dict, folder: pathlib.Path, checkpoint: Checkpoint, splits: Mapping[str, Sequence[Pair]]) -> dict:
    """The numbers of the adapter in ``folder``: base and adapter, measured with these options of ``tli.train``."""
    device_config = resolve_device(options["device"], options["dtype"], options["weights"], options["impl"])
    pool, layer = Pooling.from_checkpoint(options["token_norm"], checkpoint, device_config.device, device_config.ops), options["layer"]
    streams: dict[str | None, Adapter | None] = {"before": None, "after": load_adapter(folder).adapter}
    found, _ = measure_layers(checkpoint, splits, pool, device_config, streams, options["prefix"], options["eval_pool_bos"], [layer])
    return _numbers_of(*summarize(found, options["seed"], base="before"))


def measure_null(words, splits: Mapping[str, Sequence[Pair]], width: int, seed: int) -> dict:
    """The numbers of words that have nothing but a sink in common; ``expected`` is the formula's mean over the true pairs."""
    source, target, cosine = sink_only(words, width, SINK_LENGTH, seed)
    found, expected, first = {}, {}, 0
    for split, pairs in splits.items():
        part = np.arange(first, first + len(pairs))
        found[split, "before", None] = measure(source[part], target[part], word_pairs.false_negative_pairs(pairs))
        expected[split], first = float(cosine[part].mean()), first + len(pairs)
    return {"cell": None, "layer": None, "parameters": 0, "expected": expected, **_numbers_of(*summarize(found, seed, base="before"))}
