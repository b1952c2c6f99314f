"""``python -m tli.evaluate``: adapters against the base model, with every control; or the statistics of a table alone.

Reads top to bottom: what the adapters' folders say of their training -> the model, the lists -> one pass over the blocks ->
intervals and tests -> harm to the language model -> tables and files. With ``--from-csv`` none of it: a table of values from
anywhere, tested, without a model and without torch.
"""

import dataclasses
import functools
import pathlib
import platform
import typing

import numpy as np

import tli
from tli.config import EvaluateConfig, ListConfig
from tli.data import word_pairs
from tli.data.pair_store import DiskBackedPairs
from tli.data.relatives import LISTS, split_facts
from tli.metrics.baseline_records import BEFORE, judge
from tli.model.linear_map import Sides
from tli.model.shape import Layer
from tli.reports import evaluation
from tli.reports.tables import Table, show, write_markdown
from tli.runtime.cli import as_dict
from tli.runtime.console import open_console
from tli.runtime.errors import TliError
from tli.runtime.files import SCHEMA, prepare_output_dir, write_json
from tli.stats import paired_table

if typing.TYPE_CHECKING:
    from tli.model.lora import Adapter
    from tli.model.trained_adapter import TrainedAdapter

# of cosine: about half of the gain that the paper reports
_MARGIN = 0.05


def evaluate(config: EvaluateConfig) -> dict:
    """Compare ``config.adapters`` with their base model on trained and held-out words, or test the table ``config.from_csv``.

    Args:
        config:  adapters or a table, word lists, layers; every field is a flag of ``python -m tli.evaluate``

    Returns:
        What ``evaluation.json`` holds, as plain JSON values: ``measurements`` (mean and 95 % interval of each metric by split, adapter and
        layer), ``tests`` (paired gains: t, Wilcoxon and sign-flip, as they are and after Holm), ``differences`` (trained against held-out
        gains), ``baselines`` (what finds the held-out pairs without training) and ``harm`` (perplexity, text by text). The tables are
        printed on standard error.

    Raises:
        TliError: for whatever a user can cause; nothing that existed before is lost.

    Example:
        >>> from tli import EvaluateConfig, TrainConfig, evaluate, train
        >>> run = train(TrainConfig(rank=4, layer=1, batch=256, epochs=1, no_report=True, output="adapter"))
        >>> found = evaluate(EvaluateConfig(adapters=("adapter",), layers="1"))
        >>> [test["n"] for test in found["tests"] if test["metric"] == "gap"]
        [2243]
    """
    console = open_console()
    return _evaluate_table(config, console) if config.from_csv is not None else _evaluate_adapters(config, console)


def _evaluate_table(config: EvaluateConfig, console) -> dict:
    # what brought us here
    assert config.from_csv is not None
    table = paired_table.read_table(config.from_csv, config.before, config.after, config.group, config.cluster)
    results = paired_table.compare_table(table, config.seed or 0, config.margin)
    options = {name: as_dict(config)[name] for name in ("from_csv", "before", "after", "group", "cluster", "margin", "seed")}
    facts: dict[str, typing.Any] = {
        "schema": SCHEMA,
        "config": options,
        "table": paired_table.describe(config.from_csv, table),
        **results,
        "versions": _versions(),
    }
    tables = evaluation.tables_of_values(facts)
    if config.output is not None:
        output = pathlib.Path(config.output).expanduser()
        prepare_output_dir(output, config.overwrite)
        _write(output, facts, tables, f"# Statistics of {facts['table']['name']}")
    show(tables, console)
    console.print(evaluation.last_line_of_values(facts, config.output))
    return facts


def _evaluate_adapters(config: EvaluateConfig, console) -> dict:
    # torch and transformers, which a table does without
    from tli.metrics import comparison, layer_pass
    from tli.metrics.perplexity import harm, predict
    from tli.model import starter
    from tli.model.checkpoint import model_facts, open_checkpoint
    from tli.model.pooling import Pooling, resolve_token_norm
    from tli.model.text_windows import read_texts, read_windows
    from tli.model.trained_adapter import check_compatible, common_option, load_adapter
    from tli.runtime import environment
    from tli.runtime.console import layer_bar
    from tli.runtime.device import resolve_device

    adapters = {recorded.name: recorded for recorded in map(load_adapter, config.adapters)}
    if len(adapters) < len(config.adapters):
        raise TliError("ADAPTER", "the adapters' folders must have different names", ", ".join(adapters), "rename one")
    known = list(adapters.values())
    # what is not given is as it was in training
    weights, token_norm, prefix = (
        common_option(known, name, default) if getattr(config, name) is None else getattr(config, name)
        for name, default in (("weights", "full"), ("token_norm", "auto"), ("prefix", " "))
    )
    pool_bos = common_option(known, "eval_pool_bos", False) if config.sink is None else config.sink == "in"
    seed = known[0].option("seed", 0) if config.seed is None else config.seed
    splits, lists = _read_lists(config, known, console)
    splits = word_pairs.sample_splits(splits, seed)
    models = dict.fromkeys([config.model] if config.model else [recorded.model_name() for recorded in known])
    if len(models) > 1:
        raise TliError(
            "ADAPTER", "the adapters must be of one model", ", ".join(models), "evaluate them one by one, or name it with --model"
        )
    if config.output is None and len(known) > 1:
        raise TliError("--output", "several adapters need a folder for their evaluation", "none", "name one")
    output = known[0].folder / "evaluation" if config.output is None else pathlib.Path(config.output).expanduser()

    name = next(iter(models))
    checkpoint = open_checkpoint(starter.locate(name))
    device_config = resolve_device(config.device, config.dtype, weights, config.impl)
    console.print(device_config.ops.description)
    layers = _layers(config, known, checkpoint.blocks)
    hashed = functools.cache(checkpoint.sha256)
    for recorded in known:
        check_compatible(recorded, checkpoint, device_config, hashed)
    token_norm = resolve_token_norm(token_norm, checkpoint)
    if config.text is not None:
        texts = [read_windows(config.text, checkpoint, config.window, config.text_tokens)]
    else:
        # without a text that is named no blocks are read that the layers don't need
        texts = read_texts(None, checkpoint) if layers[-1] == "output" else []
    prepare_output_dir(output, config.overwrite)
    used = {"weights": weights, "dtype": device_config.facts["dtype"], "token_norm": token_norm, "pool_bos": pool_bos, "prefix": prefix}
    differences = _differences(used, known)

    streams: dict[str | None, Adapter | None] = {None: None, **{name: recorded.adapter for name, recorded in adapters.items()}}
    # embeddings, blocks and output, once for the words and once for the text, which then passes the head window by window
    steps = (int(layers[-1]) + 1 if layers[-1] != "output" else checkpoint.blocks + 2) + (
        sum(checkpoint.blocks + 2 + len(windows.lengths) for windows in texts)
    )
    states: dict[tuple[str | None, Layer], Sides] = {}
    with layer_bar(console, steps) as done:
        pool = Pooling.from_checkpoint(token_norm, checkpoint, device_config.device, device_config.ops)
        found, missing = layer_pass.measure_layers(
            checkpoint, splits, pool, device_config, streams, prefix, pool_bos, layers, references=True, done=done,
            see_words=layer_pass.keep_words(states, {*(recorded.layer for recorded in known), "output"}),
        )  # fmt: skip
        predicted = [predict(checkpoint, windows, device_config, [recorded.adapter for recorded in known], done) for windows in texts]
    # a text that nobody named may go unread
    unread = next((reason for _, reason in predicted if reason), None) if config.text is not None else None
    measured = [layer for layer in layers if any(layer == of for *_, of in found)]
    if (config.layers is not None and len(measured) < len(layers)) or not measured or unread:
        raise TliError(
            "--text" if unread else "--layers",
            "the blocks and the head must be there" if unread else "the blocks must be there",
            unread or missing,
            "put the missing shard there, or ask for less",
        )

    maps = {(recorded.name, recorded.fitted.report["map"]["layer"]): recorded.fitted.linear for recorded in known if recorded.fitted}
    measurements, tests = comparison.summarize(found, seed, margin=_MARGIN if config.margin is None else config.margin)
    facts = {
        "schema": SCHEMA,
        "config": as_dict(config),
        "adapters": [recorded.facts() for recorded in known],
        "model": model_facts(name, checkpoint, hashed(measured[-1])),
        "pairs": lists,
        "settings": {**used, "seed": seed, "source": lists["source"], "target": lists["target"]},
        "differences": differences,
        "layers": measured,
        "missing": missing,
        "measurements": measurements,
        "tests": tests,
        "baselines": judge(
            splits,
            {(stream or BEFORE, layer): sides for (stream, layer), sides in states.items()},
            seed,
            maps,
            functools.partial(layer_pass.tokenise_pairs, checkpoint, prefix),
        ),
        "harm": [harm(predictions, windows, seed) for windows, (predictions, absent) in zip(texts, predicted) if absent is None],
        "versions": {**_versions(), **environment.versions()},
        "machine": environment.machine(device_config),
    }
    tables = evaluation.tables_of_adapters(facts)
    _write(output, facts, evaluation.tables_of_adapters(facts, full=True), "# Evaluation")
    show(tables, console)
    console.print(evaluation.last_line_of_adapters(facts, output))
    return facts


def _read_lists(config: EvaluateConfig, known: "list[TrainedAdapter]", console) -> tuple[dict[str, DiskBackedPairs], dict]:
    """The pairs by list, "trained" and "held_out", or "all" where nobody knows which were trained; and facts about them."""
    from tli.model.trained_adapter import common_option

    path_held_out, share = (common_option(known, name, None) for name in ("held_out_pairs", "held_out"))
    # what is not given is as in training, so that the split is the same
    listed = ListConfig(**{field.name: _given(config, known, field.name, field.default) for field in dataclasses.fields(ListConfig)})
    whole = word_pairs.read_list(listed, console)
    pairs: DiskBackedPairs = whole
    file = whole.reading.file
    hashes = {recorded.report["pairs"]["sha256"] for recorded in known if recorded.report is not None}
    is_recorded = hashes == {file["sha256"]} and all(recorded.report is not None for recorded in known)
    if hashes and not is_recorded and config.pairs is None:
        remedy = "name that list with --pairs, or another to be measured as a whole"
        raise TliError(
            listed.pairs or word_pairs.SHIPPED, "the list must be the one that the adapter was trained on", "other bytes", remedy
        )
    if is_recorded and config.held_out is not None:
        raise TliError("--held-out", "the split that the run recorded must stand", config.held_out, "leave --held-out out")
    if not is_recorded:
        path_held_out, share = None, config.held_out
    by = LISTS
    if path_held_out is not None:
        splits = {"trained": pairs, "held_out": word_pairs.read_list(listed, console, path_held_out)}
    elif share is not None:
        # runs that recorded none kept only words apart
        by = common_option(known, "split", "words") if is_recorded else config.split
        split_seed = common_option(known, "seed", 0) if is_recorded else config.seed or 0
        splits = dict(zip(("trained", "held_out"), word_pairs.split_pairs(pairs, share, split_seed, by)))
    else:
        splits = {"all": pairs}
    if config.held_out_pairs is not None:
        # with a list of its own to hold out, the rest is what was trained
        by = LISTS
        splits = {"trained": splits.get("trained", pairs), "held_out": word_pairs.read_list(listed, console, config.held_out_pairs)}
    if "held_out" in splits:
        word_pairs.check_disjoint(splits["trained"], splits["held_out"])
    counts = split_facts(splits["trained"], splits["held_out"], by) if "held_out" in splits else {"all": len(pairs)}
    return splits, {**file, "source": listed.source, "target": listed.target, "split_is_recorded": is_recorded, **counts}


def _given(config: EvaluateConfig, known: "list[TrainedAdapter]", name: str, default: typing.Any) -> typing.Any:
    """The option as it was given, else as the adapters' runs had it."""
    from tli.model.trained_adapter import common_option

    return common_option(known, name, default) if getattr(config, name) is None else getattr(config, name)


def _layers(config: EvaluateConfig, known: "list[TrainedAdapter]", blocks: int) -> list[Layer]:
    """The layers to measure, in order."""
    chosen: set[Layer]
    if config.layers is None:
        chosen = {*(min(recorded.layer, blocks) for recorded in known), blocks // 2, "output"}
    elif config.layers.strip() == "all":
        chosen = {*range(blocks + 1), "output"}
    else:
        names = [name.strip() for name in config.layers.split(",")]
        wrong = [name for name in names if name != "output" and not (name.isdecimal() and int(name) <= blocks)]
        if wrong:
            must = f"the layers must be from 0 to {blocks}, or output, a comma between them, or all"
            raise TliError("--layers", must, repr(wrong[0]), "choose among these")
        chosen = {name if name == "output" else int(name) for name in names}
    return sorted(chosen, key=lambda layer: blocks + 1 if layer == "output" else layer)


def _differences(used: dict, known: "list[TrainedAdapter]") -> list[dict]:
    """Where the evaluation is not as the training was; of an adapter without a report nothing is known."""
    found = []
    for recorded in known:
        if recorded.report is None:
            found.append({"adapter": recorded.name, "setting": None, "here": None, "training": None})
            continue
        trained = {name: recorded.option(name, value) for name, value in used.items()}
        machine = recorded.report.get("machine", {})
        # what it was measured in; older reports measured in what they trained in
        trained["dtype"] = machine.get("measured_in", machine.get("dtype", used["dtype"]))
        differing = [name for name in used if used[name] != trained[name]]
        found += [{"adapter": recorded.name, "setting": name, "here": used[name], "training": trained[name]} for name in differing]
    return found


def _versions() -> dict:
    import scipy

    return {"tli": tli.__version__, "python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}


def _write(output: pathlib.Path, facts: dict, tables: list[Table], title: str) -> None:
    text = evaluation.markdown(title, tables, facts)
    write_markdown(output / "evaluation.md", text)
    write_json(output / "evaluation.json", facts)
