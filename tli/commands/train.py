"""``python -m tli.train``: align word pairs at layer L with LoRA adapters, and measure what came of it.

Reads top to bottom: pairs -> tokens -> the model with adapters -> steps -> the adapter's files -> the report. By default the model
ends at layer L; the arms that it is compared with run the whole model (``tli/model/decoder.py``).

Everything random is a function of the seed and of a position (epoch, step, module), never of what came before it. So a run
that was killed and resumed passes through the same numbers as one that was not, to the last bit.
"""

import dataclasses
import math
import operator
import pathlib
from collections.abc import Sequence

import numpy as np

from tli.config import TrainConfig
from tli.data import word_pairs
from tli.data.loader import BatchLoader
from tli.data.packing import TokenisedWords, tokenise
from tli.data.pair_store import Pairs
from tli.metrics import layer_choice
from tli.metrics.layer_pass import align_layers
from tli.model import lora, starter
from tli.model.checkpoint import Checkpoint, model_facts, open_checkpoint, sight
from tli.model.decoder import build_decoder, require_layer
from tli.model.pooling import Pooling, pooling, resolve_token_norm
from tli.reports import memory
from tli.reports import training as training_report
from tli.runtime import environment
from tli.runtime.cli import as_dict
from tli.runtime.console import layer_bar
from tli.runtime.device import Placement, place
from tli.runtime.files import prepare_output_dir, sha256
from tli.training.loop import fit
from tli.training.memory import budget
from tli.training.memory import profile as profiling
from tli.training.state import Progress, TrainingState


def train(config: TrainConfig) -> dict:
    """Train LoRA adapters that align word pairs at one layer, measure them, and write both to ``config.output``.

    Args:
        config:  model, word list, adapter, objective and training; every field is a flag of ``python -m tli.train``

    Returns:
        What ``report.json`` holds, as plain JSON values: ``adapter`` (sha256, parameters, bytes), ``training`` (steps, seconds, loss in
        nats for InfoNCE, peak_bytes), ``measurements`` (mean and 95 % interval of each metric by split, layer, before and after) and
        ``tests``. With ``no_report`` the facts of the run without measurements. The folder also holds the adapter in PEFT's format.

    Raises:
        TliError: for whatever a user can cause; an adapter and a report that existed before are not lost.
        KeyboardInterrupt: after a stop by Ctrl-C; the adapter so far, and what ``resume`` needs, are saved.

    Example:
        >>> from tli import TrainConfig, train
        >>> run = train(TrainConfig(rank=4, layer=1, batch=256, epochs=1, no_report=True, output="adapter"))
        >>> run["pairs"]["trained"], run["training"]["steps"]
        (2019, 8)
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    output = pathlib.Path(config.output).expanduser()
    trained, held_out = _read_pairs(config)
    partners = _partners(len(trained), config)
    state = TrainingState(output, config, trained)
    if not (config.resume and state.exists()):
        prepare_output_dir(output, config.overwrite)

    checkpoint = open_checkpoint(config.model or str(starter.starter_folder()))
    words = _tokenise(config, checkpoint, [trained, held_out])
    placement = _place(config, state, console)
    # what is measured is measured exactly
    exact = place(config.device, config.dtype, config.weights, config.impl)

    adapter = lora.LoRAConfig(
        rank=config.rank, alpha=config.alpha, targets=config.targets, dropout=config.dropout, rslora=config.rslora, init=config.init
    )
    token_norm = resolve_token_norm(config.token_norm, checkpoint)
    if token_norm != config.token_norm and token_norm == "rms":
        console.print("token states are normalised by plain RMS: the model's final norm lies in a shard that is not needed otherwise")
    pool = pooling(token_norm, checkpoint, placement.device, placement.ops)
    if config.layer == "auto":
        config = dataclasses.replace(config, layer=_choose_layer(config, checkpoint, words, trained, pool, exact, console))
    # auto has been replaced by the layer that it chose
    assert config.layer != "auto"
    batches = BatchLoader(config, words, partners, trained, placement)
    require_layer(checkpoint, config.layer)
    needed = budget.needed(config, checkpoint, words, len(trained), token_norm, placement)
    budget.require_room(needed, placement)
    profile = profiling.Profile(placement.device) if config.profile else None
    decoder = build_decoder(config, checkpoint, words.rows, placement)
    lora.inject(decoder, adapter, None if config.arm == "full" else range(config.layer), seed=config.seed)
    base_model = config.model or starter.NAME

    # the output is normalised already
    at_loss = pool.at("output") if config.arm == "full" else pool
    progress = fit(config, decoder, batches, at_loss, state, console, profile)
    lora.save(decoder, adapter, output, base_model)
    training_report.clear(output)
    if progress.step < batches.total:
        console.print(
            f"stopped after step {progress.step} of {batches.total}: the adapter so far is in {output}; --resume goes on from here"
        )
        raise KeyboardInterrupt

    # what was done, where the options left it open
    done_config = dataclasses.replace(config, token_norm=token_norm)
    facts = _facts(done_config, checkpoint, decoder, placement, trained, held_out, output, progress)
    facts["machine"]["measured_in"] = str(exact.dtype).removeprefix("torch.")
    if profile is not None:
        facts["memory"] = memory.measured(needed, profile, decoder, batches.bytes(), output, console)
    if not config.no_report:
        streams = {"before": None, "after": lora.snapshot(decoder, adapter.scale)}
        splits = _splits(trained, held_out, config.seed)
        # the embeddings, each block, and the output
        with layer_bar(console, checkpoint.blocks + 2) as done:
            alignments, facts["missing_output"] = align_layers(checkpoint, words, splits, pool, exact, streams, config.eval_pool_bos, done)
        facts = training_report.write_report(output, facts, alignments, console)
    state.discard()
    console.print(f"in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    return facts


def _read_pairs(config: TrainConfig) -> tuple[Pairs, Pairs]:
    """Trained and held-out pairs, which share no word."""
    pairs = word_pairs.read_pairs(config.pairs, config.source, config.target)
    if config.held_out_pairs is None:
        return word_pairs.split_pairs(pairs, config.held_out, config.seed)
    held_out = word_pairs.read_pairs(config.held_out_pairs, config.source, config.target)
    word_pairs.check_disjoint(pairs, held_out)
    return pairs, held_out


def _partners(pairs: int, config: TrainConfig) -> np.ndarray:
    """Whose target each trained source is taught with: its own, or, shuffled, that of the next one around a random ring."""
    if not config.shuffle_pairs:
        return np.arange(pairs)
    ring = np.random.default_rng([config.seed, 1]).permutation(pairs)
    partners = np.empty(pairs, np.int64)
    partners[ring] = np.roll(ring, 1)
    return partners


def _place(config: TrainConfig, state: TrainingState, console) -> Placement:
    """Where and how the run trains: the dtype that is fastest, if the options leave it open, or as the run that goes on was begun."""
    begun = state.begun_with() if config.resume else {}
    # the reference ops are for comparing every bit
    fast = config.dtype == "auto" and config.impl == "auto"
    placement = place(config.device, begun.get("dtype") or ("fastest" if fast else config.dtype), config.weights, config.impl, begun)
    state.begun_on = placement.facts
    console.print(placement.ops.description)
    changed = {name: value for name, value in placement.facts.items() if begun.get(name, value) != value}
    if changed:
        told = ", ".join(f"{name} {value} in place of {begun[name]}" for name, value in changed.items())
        console.print(f"this run was begun on another machine and goes on with {told}: its last bits will not be those of one machine")
    return placement


def _tokenise(config: TrainConfig, checkpoint: Checkpoint, splits: Sequence[Pairs]) -> TokenisedWords:
    """All sources, then all targets."""
    texts = (text for side in ("source", "target") for pairs in splits for text in map(operator.attrgetter(side), pairs))
    words = tokenise(checkpoint.tokenizer(), texts, sight(checkpoint), config.prefix)
    return words.with_all_rows(checkpoint.config.vocab_size) if config.all_rows else words


def _choose_layer(
    config: TrainConfig,
    checkpoint: Checkpoint,
    words: TokenisedWords,
    trained: Pairs,
    pool: Pooling,
    placement: Placement,
    console,
) -> int:
    """The layer for ``auto``, by the trained pairs alone: held-out ones are to judge what comes of it."""
    splits = {"trained": _measured(trained, 0, config.seed)}
    with layer_bar(console, checkpoint.blocks + 2) as done:
        alignments, _ = align_layers(checkpoint, words, splits, pool, placement, {"before": None}, done=done)
    gaps = {layer: alignment.per_pair("gap") for (_, _, layer), alignment in alignments.items()}
    chosen = layer_choice.choose_layer(gaps, splits["trained"][1], config.seed)
    console.print(f"layer {chosen}: that is where the trained pairs' gap is surely the largest before training")
    return chosen


def _splits(trained: Pairs, held_out: Pairs, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The true pairs of each split, also where mismatched ones were taught, and those among them that mean the same."""
    return {"trained": _measured(trained, 0, seed), "held_out": _measured(held_out, len(trained), seed)}


def _measured(pairs: Pairs, first: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, from ``first`` on, of the pairs that are measured: all, or a sample; and those among them that mean the same."""
    numbers = word_pairs.sample(pairs, seed)
    return first + numbers, word_pairs.false_negative_pairs(pairs.subset(numbers))


def _facts(
    config: TrainConfig,
    checkpoint: Checkpoint,
    decoder,
    placement: Placement,
    trained: Pairs,
    held_out: Pairs,
    output: pathlib.Path,
    progress: Progress,
) -> dict:
    """What the run was: plain JSON values, for the report."""
    file = output / lora.ADAPTER_FILE
    list_file = pathlib.Path(config.pairs or word_pairs.SHIPPED)
    # auto has been replaced by the layer that it chose
    assert config.layer != "auto"
    per_batch = len(trained) / -(-len(trained) // config.batch)
    return {
        "config": as_dict(config),
        "model": model_facts(
            config.model or starter.NAME, checkpoint, checkpoint.sha256(config.layer if config.arm == "early" else checkpoint.blocks)
        ),
        "pairs": {"trained": len(trained), "held_out": len(held_out), "name": list_file.name, "sha256": sha256(list_file)},
        "adapter": {"sha256": sha256(file), "parameters": sum(p.numel() for p in lora.trainable(decoder)), "bytes": file.stat().st_size},
        "training": {
            "steps": progress.step,
            "seconds": progress.seconds,
            "words_per_second": 2 * len(trained) * config.epochs / progress.seconds,
            "first_step_at": progress.first_step_at,
            "loss_first": progress.losses[0],
            "loss_last": progress.losses[-1],
            # of a batch in which nothing is told apart
            "chance_loss": math.log(per_batch) if config.loss == "infonce" else None,
            "peak_bytes": environment.peak_bytes(),
        },
        "versions": environment.versions(),
        "machine": environment.machine(placement),
        "shuffled": config.shuffle_pairs,
        "missing_output": None,
    }
