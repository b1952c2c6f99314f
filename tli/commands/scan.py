"""``python -m tli.scan``: what every layer of a model shows about word pairs, in one pass, and where to train.

Reads top to bottom: pairs -> tokens -> one pass over the blocks, one in memory at a time -> scan.json, scan.png, tables, a verdict.

The main columns are of the vectors that training aligns: each token state through the token norm, their mean, BOS left out. Beside
them stand the paper's, token states as they are with BOS pooled, so that a reader sees what the pooled sink does to a mean cosine.
"""

import contextlib
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tli.config import ScanConfig
from tli.data import word_pairs
from tli.data.pair_store import DiskBackedPairs, Pair
from tli.metrics import layer_choice, layer_pass, layers
from tli.metrics.baseline_records import LayerMaps
from tli.model import starter
from tli.model.checkpoint import model_facts, open_checkpoint
from tli.model.pooling import Pooling, resolve_token_norm
from tli.model.shape import Layer
from tli.model.trained_adapter import check_compatible, load_adapter
from tli.reports.figures.scan import draw_scan
from tli.reports.figures.style import save_figure
from tli.reports.scan import show, verdict
from tli.runtime import environment
from tli.runtime.cli import as_dict
from tli.runtime.console import layer_bar, open_console
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError
from tli.runtime.files import SCHEMA, prepare_output_dir, write_json
from tli.stats.bootstrap import word_clusters

FILES = ("scan.json", "scan.png")


def scan(config: ScanConfig) -> dict:
    """Measure word pairs at every layer of a model, with one block in memory at a time, and write the result to ``config.output``.

    Args:
        config:  model, adapter to measure beside it, and word list; every field is a flag of ``python -m tli.scan``

    Returns:
        What ``scan.json`` holds, as plain JSON values: ``measurements`` (mean and 95 % interval of each metric by layer: 0 for the
        embeddings, "output" for the last one after the final norm), ``choice`` (the layer that each of two rules would align),
        ``sink_layers``, ``strata``, ``maps`` (what closed-form maps find in each layer), ``seconds``, ``peak_bytes``.

    Raises:
        TliError: for whatever a user can cause; nothing that existed before is lost.

    Example:
        >>> from tli import ScanConfig, scan
        >>> found = scan(ScanConfig(sample=50, output="scan"))
        >>> found["pairs"]["scanned"], sorted(found["choice"])
        (50, ['gap', 'paper'])
        >>> gaps = {row["layer"]: row["value"] for row in found["measurements"] if row["metric"] == "gap"}
        >>> len(gaps) == found["model"]["blocks"] + 2
        True
    """
    began = time.monotonic()
    console = open_console()
    output = pathlib.Path(config.output).expanduser()
    pairs, listed, file = _pairs(config, console)
    false_negatives = word_pairs.false_negative_pairs(pairs)
    adapted = None if config.adapter is None else load_adapter(config.adapter)
    streams = {"base": None} if adapted is None else {"base": None, "adapter": adapted.adapter}
    name = config.model or (starter.NAME if adapted is None else adapted.model_name())
    checkpoint = open_checkpoint(starter.locate(name))
    hashed = functools.cache(checkpoint.sha256)
    words = layer_pass.tokenise_pairs(checkpoint, config.prefix, pairs)
    device_config = resolve_device(config.device, config.dtype, config.weights, config.impl)
    if adapted is not None:
        check_compatible(adapted, checkpoint, device_config, hashed)
    prepare_output_dir(output, config.overwrite)
    console.print(device_config.ops.description)

    token_norm = resolve_token_norm(config.token_norm, checkpoint)
    pool = Pooling.from_checkpoint(token_norm, checkpoint, device_config.device, device_config.ops)
    maps = _layer_maps(pairs, config)

    def see_words(stream: str, layer: Layer, source: Tensor, target: Tensor) -> None:
        if maps is not None:
            maps.see(stream, layer, source.cpu().numpy(), target.cpu().numpy())

    # the embeddings, each block, and the output
    with layer_bar(console, checkpoint.blocks + 2) as done:
        scans, missing_output = layer_pass.scan_layers(
            checkpoint, words, false_negatives, pool, device_config, streams, done, see_words=see_words
        )

    clusters = word_clusters(len(pairs), false_negatives)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "config": {**as_dict(config), "token_norm": token_norm},
        "model": model_facts(name, checkpoint, hashed(max(layer for _, layer in scans if layer != "output"))),
        "adapter": None if adapted is None else adapted.facts(),
        "pairs": {**file, "listed": listed, "scanned": len(pairs)},
        "missing_output": missing_output,
        "choice": {
            "gap": layer_choice.choose_layer(layers.by_layer(scans, "base", "word", "gap"), clusters, config.seed),
            "paper": layer_choice.choose_layer_by_cosine(layers.by_layer(scans, "base", "raw_bos", "cosine")),
        },
        "sink_layers": {stream: layer_choice.sink_layers(scans, stream) for stream in streams},
        "versions": environment.versions(),
        "machine": environment.machine(device_config),
        "measurements": layers.records(scans, config.seed),
        "maps": maps and maps.records(),
        "strata": layers.stratum_records(scans, layers.strata(pairs, words), config.seed),
    }
    report["verdict"] = verdict(report)
    save_figure(output / "scan.png", draw_scan(report))
    report |= {"seconds": time.monotonic() - began, "peak_bytes": environment.peak_bytes()}
    write_json(output / "scan.json", report)
    show(report, console)
    console.print(f"in {output}: {', '.join(FILES)}")
    return report


def _layer_maps(pairs: Sequence[Pair], config: ScanConfig) -> LayerMaps | None:
    """What fits maps in each layer; None where the pairs are too few, or too closely related, to be split."""
    for by in dict.fromkeys((config.split_by, "words")):
        with contextlib.suppress(TliError):
            return LayerMaps(pairs, config.seed, by)
    return None


def _pairs(config: ScanConfig, console) -> tuple[DiskBackedPairs, int, dict[str, str]]:
    """The pairs of the chosen split, or a random sample of them, in the order of the list; how many the split has; and the list's file."""
    whole = word_pairs.read_list(config, console)
    pairs: DiskBackedPairs = whole
    file = whole.reading.file
    if config.split != "all":
        sides = word_pairs.split_pairs(pairs, config.held_out, config.seed, config.split_by)
        pairs = sides[("trained", "held_out").index(config.split)]
    if config.sample is None:
        return pairs.subset(word_pairs.sample(pairs, config.seed)), len(pairs), file
    if not 2 <= config.sample <= len(pairs):
        raise TliError("--sample", f"a sample must have from 2 to {len(pairs)} pairs, as many as there are", config.sample, "change it")
    return pairs.subset(word_pairs.sample(pairs, config.seed, config.sample)), len(pairs), file
