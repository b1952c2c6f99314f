"""``python -m tli.map``: the best closed-form map between two languages' word states, without training the model.

Reads top to bottom: pairs -> tokens -> one pass over the blocks, one in memory at a time, with a map fitted in each -> the best of them,
map.safetensors -> the held-out pairs through it, beside everything else that needs no training -> map.json.
"""

import functools
import pathlib
import time

from torch import Tensor

from tli.config import MapConfig
from tli.data import word_pairs
from tli.data.relatives import split_facts
from tli.metrics import baseline_records
from tli.metrics.baselines import Baselines, Choice
from tli.metrics.layer_choice import choose_layer_by_maps
from tli.metrics.layer_pass import keep_words, see_layers, tokenise_pairs
from tli.model import starter
from tli.model.checkpoint import model_facts, open_checkpoint
from tli.model.linear_map import Sides, save_map
from tli.model.pooling import Pooling, resolve_token_norm
from tli.model.shape import Layer
from tli.reports.map import show, verdict
from tli.runtime import environment
from tli.runtime.cli import as_dict
from tli.runtime.console import layer_bar, open_console
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError
from tli.runtime.files import SCHEMA, prepare_output_dir


def fit_map(config: MapConfig) -> dict:
    """Fit the best closed-form map between two languages' word states and write it to ``config.output``.

    Args:
        config:  model, layer and word list; every field is a flag of ``python -m tli.map``

    Returns:
        What ``map.json`` holds, as plain JSON values: ``map`` (way, layer, shrinkage, MRR of the part of the pairs that chose them),
        ``by_layer`` (the best of each layer), ``baselines`` (what finds the held-out pairs: this map, its rivals and their chance).

    Raises:
        TliError: for whatever a user can cause; nothing that existed before is lost.

    Example:
        >>> from tli import MapConfig, embed, fit_map
        >>> found = fit_map(MapConfig(layer=1, output="map"))
        >>> found["map"]["layer"], found["map"]["way"] in ("procrustes", "cca")
        (1, True)
        >>> source = embed(["maji"], map="map", language="swahili")
        >>> target = embed(["water", "fire"], map="map", language="english")
        >>> (source @ target.T).shape
        torch.Size([1, 2])
    """
    began = time.monotonic()
    console = open_console()
    output = pathlib.Path(config.output).expanduser()
    pairs = word_pairs.read_list(config, console)
    names = ("trained", "held_out")
    whole = dict(zip(names, word_pairs.split_pairs(pairs, config.held_out, config.seed, config.split), strict=True))
    splits = word_pairs.sample_splits(whole, config.seed)
    checkpoint = open_checkpoint(starter.locate(config.model))
    hashed = functools.cache(checkpoint.sha256)
    device_config = resolve_device(config.device, config.dtype, config.weights, config.impl)
    token_norm = resolve_token_norm(config.token_norm, checkpoint)
    pool = Pooling.from_checkpoint(token_norm, checkpoint, device_config.device, device_config.ops)
    layers = _layers(config.layer, checkpoint.blocks)
    prepare_output_dir(output, config.overwrite)
    console.print(device_config.ops.description)

    baselines = Baselines(splits["trained"], splits["held_out"], config.seed)
    choices: dict[Layer, Choice] = {}

    def see_words(stream: str, layer: Layer, source: Tensor, target: Tensor) -> None:
        # at 0 no block has seen the word
        if layer != 0:
            choices[layer] = baselines.best_map(source.cpu().numpy(), target.cpu().numpy())

    look = functools.partial(see_layers, checkpoint, baselines.pairs, pool, device_config, config.prefix)
    with layer_bar(console, checkpoint.blocks + 2, "fitting maps") as done:
        missing = look(layers, see_words, done)
    if not choices:
        raise TliError("--layer", "the blocks must be there", missing, "put the missing shard there, or ask for a lower layer")
    layer = choose_layer_by_maps(choices)
    choice = choices[layer]
    # the states of all layers would take too much memory
    states: dict[tuple[str, Layer], Sides] = {}
    look([layer], keep_words(states, [layer]))

    report = {
        "schema": SCHEMA,
        "config": {**as_dict(config), "token_norm": token_norm},
        "model": model_facts(config.model or starter.NAME, checkpoint, hashed(layer)),
        "pairs": {
            **split_facts(whole["trained"], whole["held_out"], config.split),
            **pairs.reading.file,
        },
        "map": {"layer": layer, **choice.facts()},
        "by_layer": [{"layer": of, **each.facts()} for of, each in choices.items()],
        "missing": missing,
        "baselines": baseline_records.judge(
            splits, states, config.seed, words=functools.partial(tokenise_pairs, checkpoint, config.prefix)
        ),
        "versions": environment.versions(),
        "machine": environment.machine(device_config),
        "seconds": time.monotonic() - began,
    }
    report["verdict"] = verdict(report)
    save_map(output, choice.linear, report)
    show(report, console)
    console.print(f"in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    return report


def _layers(layer: Layer, blocks: int) -> list[Layer] | None:
    """The layers to fit maps in, in order; None: all."""
    if layer == "auto":
        return None
    if layer != "output" and not 1 <= int(layer) <= blocks:
        must = f"the layer must be from 1 to {blocks}, the model's number of blocks, output or auto"
        raise TliError("--layer", must, layer, "choose one in this range")
    return [layer]
