"""``python -m tli.study``: how alignment depends on LoRA rank, for an early layer against the full model.

Reads top to bottom: the folder and its settings -> the words -> a learning rate per arm -> the grid of cells, each a run of
``tli.train`` -> the report, by whoever completes the last cell. Cells of one seed have the same split, steps, batches and order.
``python -m tli.study protocol`` is the other study: the paper's protocol with one switch changed at a time.
"""

import json
import os
import pathlib
import typing

import numpy as np

import tli
from tli.commands.grid import Cell, claim_folder, run_cells
from tli.config import StudyConfig
from tli.data import word_pairs
from tli.reports import study as study_report
from tli.reports import study_results
from tli.runtime.cli import as_dict
from tli.runtime.console import cells_bar, open_console
from tli.runtime.files import atomic_write

SETTINGS_FILE = "study.json"
# what may differ from one call to the next: how large the grid and the search are, and how they are run
_FREE_OPTIONS = ("ranks", "arms", "seeds", "rates", "search_seeds", "device", "jobs", "cells", "output", "json")
# options of a cell that it has from the study
_SHARED: tuple[str, ...] = ("model", "layer", "weights", "dtype", "source", "target", "prefix", "split")
_SHARED += ("targets", "dropout", "temperature", "batch", "epochs", "warmup", "keep_weight")
# the split that the search is judged by is none of the seeds'
_SEARCH_SPLIT = 1_000_003
_RSLORA_ALPHA = 8.0


def study(config: StudyConfig) -> dict:
    """Run what is not complete of the study, or of this process's part of it, and report on it when all of it is.

    Returns:
        What ``results.json`` holds; with cells missing that other processes are to run, ``{"complete": ..., "cells": ...}``.

    Raises:
        TliError: for whatever a user can cause; complete cells are never touched.
        KeyboardInterrupt: after Ctrl-C; the cells so far are kept, those at work go on in the next call.
    """
    console = open_console()
    folder = pathlib.Path(config.output).expanduser()
    part, parts, device = _place_of_process(config)
    blocks = _check_model(config)
    _claim(folder, config)
    _write_lists(folder, config, console)

    def run(cells: list[Cell], what: str, share: list[Cell]) -> None:
        of_part = f", {len(share)} of them in part {part} of {parts}" if len(share) < len(cells) else ""
        console.print(f"{what}: {len(cells)} cells{of_part}")
        with cells_bar(console, [cell.weight for cell in share]) as done:
            run_cells(share, folder / "cells", config.jobs, lambda cell: done(cell.weight))

    arms = config.arms.split(",")
    searches = [cell for arm in arms for cell in _searches(config, folder, device, arm, blocks)]
    if searches:
        # every part needs all of it; each begins elsewhere
        run(searches, "learning rate of each arm", searches[(part - 1) % len(searches) :] + searches[: (part - 1) % len(searches)])
    search = {arm: _search(config, folder, arm, blocks) for arm in arms}
    cells = _grid(config, folder, device, {arm: found["chosen"] for arm, found in search.items()}, blocks)
    run(cells, "the grid", cells[part - 1 :: parts])
    reports = [(cell, cell.report(folder / "cells")) for cell in cells]
    missing = [cell.name for cell, report in reports if report is None]
    if missing:
        console.print(f"{len(cells) - len(missing)} of {len(cells)} cells are complete; the report comes with the last, of another part")
        return {"complete": len(cells) - len(missing), "cells": len(cells)}
    results = study_results.assemble(as_dict(config), search, [(cell, report) for cell, report in reports if report is not None])
    study_report.write(folder, results)
    study_report.show(results, console)
    console.print(f"in {folder}: {', '.join(study_report.FILES)}, and cells/ with {len(cells) + len(searches)} adapters")
    return results


def _place_of_process(config: StudyConfig) -> tuple[int, int, str]:
    """Which part of how many is this process's, and its device: of ``--cells``, else of torchrun, else all."""
    if config.cells is not None:
        part, parts = map(int, config.cells.split("/"))
        return part, parts, config.device
    part, parts = int(os.environ.get("RANK", 0)) + 1, int(os.environ.get("WORLD_SIZE", 1))
    if config.device == "auto" and "LOCAL_RANK" in os.environ:
        import torch

        if torch.cuda.is_available():
            return part, parts, f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return part, parts, config.device


def _check_model(config: StudyConfig) -> int:
    """The model's number of blocks, when all ranks fit it: before anything is trained or written."""
    from tli.model import lora, starter
    from tli.model.checkpoint import open_checkpoint
    from tli.model.decoder import init_empty_decoder, require_layer
    from tli.runtime.device import resolve_device

    checkpoint = open_checkpoint(starter.locate(config.model))
    require_layer(checkpoint, config.layer)
    decoder = init_empty_decoder(checkpoint, checkpoint.blocks, np.zeros(1, np.int64), resolve_device("cpu", "float32"))
    largest = max([config.search_rank, *_ranks(config)])
    blocks = range(checkpoint.blocks if "full" in config.arms else config.layer)
    lora.check_rank(decoder, lora.target_paths(decoder, blocks, config.targets), largest, "--ranks")
    return checkpoint.blocks


def _ranks(config: StudyConfig) -> list[int]:
    return [int(rank) for rank in config.ranks.split(",")]


def _claim(folder: pathlib.Path, config: StudyConfig) -> None:
    """Make the study's folder, or find that this study may go on in it."""
    options = {name: value for name, value in as_dict(config).items() if name not in _FREE_OPTIONS}
    settings = {"version": tli.__version__, **options, "pairs": word_pairs.list_facts(config.pairs)["sha256"]}
    claim_folder(folder, SETTINGS_FILE, "study", settings)


def _write_lists(folder: pathlib.Path, config: StudyConfig, console) -> None:
    """The pairs that a rate is judged by, and all others, which the grid's seeds split: no word is in both lists."""
    if (folder / "search.jsonl").is_file():
        return
    pairs = word_pairs.read_list(config, console)
    rest, judged = word_pairs.split_pairs(pairs, config.search_share, _SEARCH_SPLIT, config.split)
    for name, part in (("grid", rest), ("search", judged)):
        with atomic_write(folder / f"{name}.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for pair in part:
                row = {
                    config.source: pair.source,
                    config.target: pair.target,
                    "synonyms": pair.synonyms,
                    "class": pair.word_class,
                    "loan": {True: "yes", False: "no", None: ""}[pair.loan],
                    "field": pair.field,
                    "family": pair.family,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _cell(config: StudyConfig, folder: pathlib.Path, device: str, blocks: int, name: str, arm: str, rank: int, **options) -> Cell:
    shared = {name: getattr(config, name) for name in _SHARED}
    rslora = config.alpha_rule == "rslora"
    own = {"arm": arm, "rank": rank, "alpha": _RSLORA_ALPHA if rslora else 2.0 * rank, "rslora": rslora}
    own["checkpointing"] = config.checkpointing and arm == "full"
    # a block's training costs about three times its measuring, which all blocks go through twice
    weight = 3 * config.epochs * (blocks if arm == "full" else config.layer) + 2 * blocks
    paths = {"pairs": folder / "grid.jsonl", "device": device}
    if "held_out" not in options:
        paths["held_out_pairs"] = folder / "search.jsonl"
    return Cell(name, {**shared, **own, **options}, paths, weight)


def _searches(config: StudyConfig, folder: pathlib.Path, device: str, arm: str, blocks: int) -> list[Cell]:
    rates = [float(rate) for rate in config.rates.split(",")]
    if len(rates) == 1:
        return []
    return [
        _cell(config, folder, device, blocks, f"search-{arm}-rate{rate:g}-seed{seed}", arm, config.search_rank, seed=seed, lr=rate)
        for seed in range(config.search_seeds)
        for rate in sorted(set(rates))
    ]


def _search(config: StudyConfig, folder: pathlib.Path, arm: str, blocks: int) -> dict:
    """The arm's learning rate: where the pairs that no cell of the grid sees are found best, in the worst of the rate's runs; at the
    layer of the arm's loss.
    """
    runs: dict[float, list[dict]] = {}
    for cell in _searches(config, folder, "auto", arm, blocks):
        # the search has run: each of its cells has a report
        runs.setdefault(cell.options["lr"], []).append(typing.cast(dict, cell.report(folder / "cells")))
    if not runs:
        return {"chosen": float(config.rates), "tried": []}
    tried = [study_results.search_record(rate, reports) for rate, reports in runs.items()]
    return {"chosen": max(tried, key=lambda one: one["value"])["rate"], "tried": tried}


def _grid(config: StudyConfig, folder: pathlib.Path, device: str, rates: dict[str, float], blocks: int) -> list[Cell]:
    """All cells, seed by seed, so that a study that is stopped has whole rounds."""

    def cell(arm: str, rank: int, seed: int, shuffled: bool) -> Cell:
        name = f"{arm}-rank{rank}-seed{seed}" + ("-shuffled" if shuffled else "")
        options = {"seed": seed, "lr": rates[arm], "held_out": config.held_out, "shuffle_pairs": shuffled}
        return _cell(config, folder, device, blocks, name, arm, rank, **options)

    return [
        cell(arm, rank, seed, shuffled)
        for seed in range(config.seeds)
        for shuffled in (False, True)
        for rank in ([config.search_rank] if shuffled else _ranks(config))
        for arm in rates
    ]
