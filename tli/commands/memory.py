"""``python -m tli.memory``: the memory that training takes at most, by category, and what fits on a device of some size.

From config.json alone, before anything is loaded or downloaded: of a hub name only that file is fetched, and neither torch nor
transformers is imported. Where the tokenizer's file is on disk the list's words are packed as in training, and nodes and tokens
counted; else they are estimated, and the answer says so.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from tli.config import MemoryConfig
from tli.data import word_pairs
from tli.data.packing import DEFAULT_WIDTH, tokenise
from tli.data.pair_store import Pair
from tli.model import hub, starter
from tli.model.shape import SHORT_WIDTH, Shape
from tli.reports.tables import Table, show
from tli.runtime.console import open_console
from tli.runtime.errors import TliError, one_line
from tli.runtime.files import SCHEMA
from tli.training.memory.estimate import Part, Run, allocations, predict, total
from tli.training.memory.fit import as_flags, change_to_fit, largest_part, trained_pairs

SIZES_GB = (2, 4, 6, 8, 12, 16, 24)
# where nothing can be counted: nodes of a pair in batches of 64 to 512, and tokens of a pair in the list; measured on the
# shipped list with two tokenizers (3.2 to 3.6 and 1.5 to 2.0)
_NODES_PER_PAIR, _TOKENS_PER_PAIR = 3.6, 2.0
# of the shipped texts that training keeps, with the starter's tokenizer
_KEPT_WINDOWS = 30
# of a number, by device: on a CPU training computes in what its processor multiplies fastest (tli/runtime/cpu.py)
_DEVICES = {"cpu fp32": 4, "cpu bf16": 2, "gpu bf16": 2}


def memory(config: MemoryConfig) -> dict:
    """The prediction for each device and ``--weights``, and the options with which each arm fits on devices of ``SIZES_GB``.

    Returns:
        ``runs``: bytes by category, their sum, and the part that the run allocates itself; ``fits``: the options that are needed, an
        empty text where none is, None where nothing helps; ``nodes``, ``rows`` and whether they were ``counted``.

    Raises:
        TliError: no such model or list, another family, a layer that the model has not.
    """
    folder, path = _config_file(config.model)
    name = config.model or starter.NAME
    shape = Shape.from_config(starter.SIZES if path is None else _read(path), name)
    if config.layer > shape.blocks:
        must = f"the layer must be from 1 to {shape.blocks}, the model's number of blocks"
        raise TliError("--layer", must, config.layer, "choose one in this range")
    pairs = word_pairs.read_list(config, open_console())
    tokenizer = _tokenizer_file(config.model, folder)
    trained, batch = trained_pairs(len(pairs), config.held_out, config.batch)
    part, rows = _estimated(shape, len(pairs), batch) if tokenizer is None else _counted(config, tokenizer, path, pairs, trained, batch)
    run = Run(
        shape=shape,
        part=part,
        batch=batch,
        list_pairs=trained,
        rows=shape.vocabulary if config.all_rows else rows,
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer else None,
        kept_windows=_KEPT_WINDOWS if config.keep_weight else 0,
        kept_width=SHORT_WIDTH,
        **{name: getattr(config, name) for name in ("arm", "layer", "rank", "targets", "dropout", "micro_batch", "checkpointing")},
    )
    runs: list[dict[str, Any]] = []
    fits: list[dict[str, Any]] = []
    for device, element in _DEVICES.items():
        run = dataclasses.replace(run, device=device[:3], element=element)
        for weights in ("full", "nf4"):
            bytes_of = predict(dataclasses.replace(run, weights=weights))
            runs.append({"device": device, "weights": weights, "bytes": bytes_of})
            runs[-1] |= {"total": total(bytes_of), "allocations": allocations(bytes_of)}
        for size in SIZES_GB:
            for arm in ("early", "full"):
                for weights in ("full", "nf4"):
                    this = dataclasses.replace(run, weights=weights, arm=arm)
                    changed = change_to_fit(this, size * 10**9, free=("micro_batch", "checkpointing"))
                    options = None if changed is None else as_flags(changed)
                    fits.append({"device": device, "gb": size, "arm": arm, "weights": weights, "options": options})
    facts = {"nodes": run.current.nodes, "rows": run.rows, "counted": tokenizer is not None, "batch": batch, "adapters": run.parameters}
    model = {"name": name, **dataclasses.asdict(shape)}
    return {"schema": SCHEMA, "config": dataclasses.asdict(config), "model": model, **facts, "runs": runs, "fits": fits}


def _config_file(model: str | None) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """The model's local folder, or None for a hub name, and its config.json; both None for a starter that is not there yet."""
    if model is None:
        folder = starter.cached_folder()
        return folder, folder and folder / "config.json"
    folder = pathlib.Path(model).expanduser()
    if folder.is_dir() or model.startswith((".", "/", "~")):
        if not (folder / "config.json").is_file():
            raise TliError(folder, "the folder must hold a config.json", "none", "name a Hugging Face checkpoint's folder")
        return folder, folder / "config.json"
    return None, hub.download(model, "config.json")


def _read(path: pathlib.Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TliError(path, "config.json must be JSON", one_line(error), "check the file") from error
    if not isinstance(config, dict):
        raise TliError(path, "config.json must be an object", type(config).__name__, "check the file")
    return config


def _tokenizer_file(model: str | None, folder: pathlib.Path | None) -> pathlib.Path | None:
    """The tokenizer's file where it is on disk already."""
    if folder is not None:
        return folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else None
    return None if model is None else hub.cached(model, "tokenizer.json")


class _Tokenizer:
    """As much of transformers' tokenizer as ``tokenise`` asks for, without importing it."""

    def __init__(self, file: pathlib.Path, config: pathlib.Path):
        from tokenizers import Tokenizer

        try:
            self.inner = Tokenizer.from_file(str(file))
            self.inner.encode_special_tokens = True
        except Exception as error:
            raise TliError(file, "the tokenizer must be readable", one_line(error), "download it again") from error
        content = _read(config)
        content = content.get("text_config", content) | content
        ids = (content.get(name) for name in ("bos_token_id", "eos_token_id"))
        # which token the sink is changes no number here
        self.bos_token_id = next((found for found in ids if isinstance(found, int)), 0)

    def __call__(self, texts: list[str], **_) -> dict[str, list]:
        encoded = self.inner.encode_batch(texts, add_special_tokens=False)
        return {"input_ids": [one.ids for one in encoded], "offset_mapping": [one.offsets for one in encoded]}


def _counted(
    config: MemoryConfig, file: pathlib.Path, path: pathlib.Path | None, pairs: Sequence[Pair], trained: int, batch: int
) -> tuple[Part, int]:
    """The largest part of some random batches, and the tokens that occur."""
    # where a tokenizer is at hand, so is the config
    assert path is not None
    texts = word_pairs.words_of(pairs)
    words = tokenise(_Tokenizer(file, path), texts, 1 << 30, config.prefix)
    return largest_part(words, trained, batch, config.micro_batch), len(words.vocab_ids)


def _estimated(shape: Shape, pairs: int, batch: int) -> tuple[Part, int]:
    return Part(batch, _NODES_PER_PAIR * batch / DEFAULT_WIDTH, DEFAULT_WIDTH), min(shape.vocabulary, int(_TOKENS_PER_PAIR * pairs))


def _tables(facts: dict) -> list[Table]:
    config, runs = facts["config"], facts["runs"]
    names = {device: device.replace("cpu", "CPU").replace("gpu", "GPU") for device in _DEVICES}
    categories = list(dict.fromkeys(name for run in runs for name in run["bytes"]))
    rows = [[name, *(f"{run['bytes'][name] / 1e6:,.0f}" if name in run["bytes"] else "" for run in runs)] for name in categories]
    rows.append(["all", *(f"{run['total'] / 1e6:,.0f}" for run in runs)])
    counted = "counted" if facts["counted"] else "estimated: the tokenizer is not at hand"
    parts = "" if config["micro_batch"] is None else f" in parts of {config['micro_batch']}"
    title = (
        f"{facts['model']['name']}, {config['arm']} arm, layer {config['layer']}, rank {config['rank']}, {facts['batch']} pairs a step"
        f"{parts}: {facts['nodes']:,.0f} nodes at once, {facts['rows']:,} embedding rows "
        f"({counted}). MB at most"
    )
    heads = {device: name.replace(" ", "\n") for device, name in names.items()}
    tables = [Table(title, ["", *(f"{heads[run['device']]}\n{run['weights']}" for run in runs)], rows)]
    arms = [(arm, weights) for arm in ("early", "full") for weights in ("full", "nf4")]
    for device, called in names.items():
        cells = {(fit["gb"], fit["arm"], fit["weights"]): fit["options"] for fit in facts["fits"] if fit["device"] == device}
        rows = [[f"{size} GB", *(_cell(cells[size, *arm]) for arm in arms)] for size in SIZES_GB]
        title = f"what fits in so much free memory, {called}, and the options that it takes"
        tables.append(Table(title, ["", *(f"{arm} arm, {weights}" for arm, weights in arms)], rows))
    return tables


def _cell(options: str | None) -> str:
    return "no" if options is None else options or "yes"


def print_tables(facts: dict, stderr: bool) -> None:
    """Print what ``memory`` returned as tables, on standard output or error."""
    console = open_console(stderr)
    show(_tables(facts), console)
    console.print(
        "CPU: anonymous memory of the process; pages of the mapped checkpoint and of libraries come on top, and go when they are needed. "
        "GPU: what torch allocates, and a CUDA context that is assumed, not measured."
    )
