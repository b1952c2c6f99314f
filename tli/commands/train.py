"""``python -m tli.train``: align word pairs at layer L with LoRA adapters, and measure the result.

Reads top to bottom: pairs -> tokens -> the model with adapters -> steps -> the adapter's files -> the report. By default the model
ends at layer L; the arms that it is compared with run the whole model (``tli/model/decoder.py``).

Everything random is a function of the seed and of a position (epoch, step, module), never of what came before it. So a run
that was killed and resumed passes through the same numbers as one that was not, to the last bit.
"""

import dataclasses
import functools
import math
import operator
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tli.config import TokenNorm, TrainConfig
from tli.data import word_pairs
from tli.data.loader import BatchLoader
from tli.data.packing import TokenisedWords, first_token, tokenise
from tli.data.pair_store import DiskBackedPairs
from tli.data.relatives import LISTS, split_facts
from tli.metrics import layer_choice, probe
from tli.metrics.baseline_records import judge
from tli.metrics.baselines import Baselines, Choice
from tli.metrics.layer_pass import keep_words, measure_layers, see_layers, tokenise_pairs
from tli.metrics.perplexity import harm, predict
from tli.model import lora, starter
from tli.model.checkpoint import Checkpoint, context_length, model_facts, open_checkpoint
from tli.model.decoder import build_decoder, require_layer, run, run_hooked
from tli.model.linear_map import MAP_FILE, Sides, save_map
from tli.model.linear_map import REPORT_FILE as MAP_REPORT_FILE
from tli.model.pooling import Pooling, resolve_token_norm
from tli.model.shape import Layer
from tli.model.text_windows import TextWindows, read_kept_texts, read_texts
from tli.model.whole_model import whole_model
from tli.reports import evaluation, memory
from tli.reports import training as training_report
from tli.runtime import environment
from tli.runtime.cli import as_dict
from tli.runtime.console import layer_bar, open_console
from tli.runtime.device import DeviceConfig, resolve_device
from tli.runtime.errors import TliError
from tli.runtime.files import (
    SCHEMA,
    complete,
    lock_folder,
    next_result,
    prepare_output_dir,
    remove_unfinished,
    sha256,
    take_place,
)
from tli.training.kept_text import KeptText
from tli.training.loop import fit
from tli.training.loss import Objective
from tli.training.memory import budget
from tli.training.memory.estimate import Run
from tli.training.memory.profile import FIGURE_FILE, TRACE_FILE, Profile
from tli.training.run_logger import EVENTS_PREFIX, METRICS_FILE, holds_only_logs, open_loggers, require_tensorboard
from tli.training.state import STATE_FILE, Progress, TrainingState
from tli.training.step import OptimiserSettings, TrainStep

if TYPE_CHECKING:
    from tli.model.decoder import Decoder

# options that change nothing about the numbers: a resumed run may differ in them
_FREE_OPTIONS = ("text", "output", "overwrite", "resume", "no_report", "profile", "tensorboard", "json")
# of an earlier run's files those that a new one's take the place of
_RESULT_FILES = {
    *(lora.ADAPTER_FILE, lora.CONFIG_FILE, MAP_FILE, MAP_REPORT_FILE, METRICS_FILE, STATE_FILE, TRACE_FILE, FIGURE_FILE),
    *training_report.FILES,
}


def train(config: TrainConfig) -> dict:
    """Train LoRA adapters that align word pairs at one layer, measure them, and write both to ``config.output``.

    Args:
        config:  model, word list, adapter, objective and training; every field is a flag of ``python -m tli.train``

    Returns:
        What ``report.json`` holds, as plain JSON values: ``adapter`` (sha256, parameters, bytes), ``training`` (steps, seconds, loss in
        nats for InfoNCE, peak_bytes), ``measurements`` (mean and 95 % interval of each metric by split, layer, before and after),
        ``tests``, ``baselines`` (what finds the held-out pairs without training, and the adapters' gain over it) and ``harm`` (what
        training cost the language model, text by text). With ``no_report`` the facts of the run without measurements. The folder also
        holds the adapter in PEFT's format.

    Raises:
        TliError: for whatever a user can cause; an adapter and a report that existed before are not lost.
        KeyboardInterrupt: after a stop by Ctrl-C; the adapter so far, and what ``resume`` needs, are saved.

    Example:
        >>> from tli import TrainConfig, train
        >>> run = train(TrainConfig(rank=4, layer=1, batch=256, epochs=1, no_report=True, output="adapter"))
        >>> run["pairs"]["trained"], run["training"]["steps"]
        (2019, 8)
    """
    console = open_console()
    output = pathlib.Path(config.output).expanduser()
    trained, held_out, file = _read_pairs(config, console)
    with lock_folder(output):
        return _train(config, output, trained, held_out, file, console)


def _train(
    config: TrainConfig, output: pathlib.Path, trained: DiskBackedPairs, held_out: DiskBackedPairs, file: dict[str, str], console
) -> dict:
    """The run, in an output folder that no other is writing to; ``file`` is what is known of the list's.

    Where an earlier result stands in the folder, that stays whole until this one is complete, and then gives way to it at once.
    """
    # a kill may have come when one was to take the other's place
    take_place(output)
    begun = config.resume and ((output / STATE_FILE).exists() or next_result(output, anew=False) is not None)
    anew = config.overwrite and not begun and any((output / name).exists() for name in (lora.ADAPTER_FILE, STATE_FILE))
    place = next_result(output, anew) if anew or config.resume else None
    if place is None:
        facts = _train_in(output, config, trained, held_out, file, console)
    else:
        try:
            facts = _train_in(place, config, trained, held_out, file, console)
        except BaseException:
            if not (place / STATE_FILE).exists():
                shutil.rmtree(place, ignore_errors=True)
            console.print(f"what was in {output} before stays as it is until a run is complete")
            raise
        _give_way(output, place, console)
    console.print(f"in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    return facts


def _give_way(output: pathlib.Path, place: pathlib.Path, console) -> None:
    """Let the earlier result in ``output`` give way to the complete one in ``place``; what was measured of the earlier is moved aside."""
    earlier = [path.name for path in output.iterdir() if path.name in _RESULT_FILES or path.name.startswith(EVENTS_PREFIX)]
    complete(place, earlier)
    take_place(output)
    for name in evaluation.FILES:
        if (output / name).exists():
            (output / name).replace(output / f"earlier-{name}")
            console.print(f"{name} is about the earlier adapter: now it is earlier-{name}")


def _train_in(
    output: pathlib.Path, config: TrainConfig, trained: DiskBackedPairs, held_out: DiskBackedPairs, file: dict[str, str], console
) -> dict:
    """The run and its files, in ``output``."""
    state = _claim_output(config, output, trained)
    checkpoint = open_checkpoint(starter.locate(config.model))
    kept = read_kept_texts(config.keep, checkpoint) if config.keep_weight else []
    tokenizer = checkpoint.tokenizer()
    words, opening = _tokenise(config, checkpoint, tokenizer, [trained, held_out], kept), first_token(tokenizer)
    # of a large vocabulary it takes more than the adapters' training does
    del tokenizer
    if words.alike:
        console.print(f"{words.alike:,} words have all their tokens in common with another word: to the model they are one")
    texts = [] if config.no_report else read_texts(config.text, checkpoint)
    device_config = _resolve_device(config, state, console)
    config = _choose_token_norm(config, checkpoint, console)
    pool = Pooling.from_checkpoint(config.token_norm, checkpoint, device_config.device, device_config.ops)
    # what is measured is measured exactly
    exact = resolve_device(config.device, config.dtype, config.weights, config.impl)
    measure = functools.partial(_measure_layers, checkpoint, pool, exact, config, console)
    layer = _choose_layer(measure, trained, config.seed, console) if config.layer == "auto" else config.layer
    # from here on the options say what is done where they left it open
    config = dataclasses.replace(config, layer=layer)

    partners = _mismatched(len(trained), config.seed) if config.shuffle_pairs else None
    sampling = _options(config, "batch", "epochs", "micro_batch", "pool_bos", "seed")
    batches = BatchLoader(words, trained, device_config, partners=partners, **sampling)
    require_layer(checkpoint, layer)
    # as they are now, since they are read from here on
    deepest: Layer = layer if config.arm == "early" else "output"
    weights = checkpoint.sha256(deepest)
    state.fingerprints |= {"model": weights, "tokens": words.sha256()}
    if kept:
        state.fingerprints["kept texts"] = " ".join(str(windows.facts["sha256"]) for windows in kept)
    needed = _require_memory(config, checkpoint, words, len(trained), device_config, kept)
    profile = Profile(device_config.device) if config.profile else None
    decoder = build_decoder(checkpoint, words.vocab_ids, device_config, **_options(config, "arm", "layer", "checkpointing"))
    whole = whole_model(checkpoint)
    adapter = lora.LoRAConfig(**_options(config, "rank", "alpha", "targets", "dropout", "rslora", "init"))
    lora.inject(decoder, adapter, None if config.arm == "full" else range(layer), config.seed)

    step = _training_step(config, decoder, pool, layer, batches.total, device_config, kept, words.vocab_ids)
    progress = state.restore(step.adapters, step.optimiser) if config.resume else Progress()
    with open_loggers(output, progress.step, config.tensorboard) as loggers:
        fit(step, batches, state, progress, loggers, console, profile, _chance_loss(config, len(trained)))
    lora.save(decoder, adapter, output, config.model or starter.NAME, whole.decoder, whole.task)
    training_report.clear(output)
    for stale in (MAP_FILE, MAP_REPORT_FILE):
        (output / stale).unlink(missing_ok=True)
    if progress.step < batches.total:
        console.print(
            f"stopped after step {progress.step} of {batches.total}: the adapter so far is in {output}; --resume goes on from here"
        )
        raise KeyboardInterrupt

    learnt, choice = lora.snapshot(decoder, adapter.scale), None
    if config.map == "auto":
        choice = _fit_map(config, checkpoint, pool, exact, trained, partners, learnt, console)
        save_map(output, choice.linear, _map_facts(config, checkpoint, choice, output))
    facts = _facts(config, checkpoint, weights, decoder, device_config, trained, held_out, file, output, progress)
    facts["model"] |= {"loads_by": whole.loads_by, "first_token": opening}
    facts["machine"]["measured_in"] = exact.facts["dtype"]
    if profile is not None:
        held = batches.bytes() + (step.keep.bytes() if step.keep is not None else 0)
        facts["memory"] = memory.measured(needed, profile, decoder, held, output, console)
    if not config.no_report:
        splits = word_pairs.sample_splits({"trained": trained, "held_out": held_out}, config.seed)
        states: dict[tuple[str, Layer], Sides] = {}
        see_words = keep_words(states, (layer, "output"))
        alignments, facts["missing_output"] = measure(splits, {"before": None, "after": learnt}, config.eval_pool_bos, see_words=see_words)
        maps = None if choice is None else {("after", _aligned_layer(config)): choice.linear}
        facts["baselines"] = judge(splits, states, config.seed, maps, functools.partial(tokenise_pairs, checkpoint, config.prefix))
        facts["probe"] = _probe(config, checkpoint, exact, splits, console)
        facts["harm"] = _measure_harm(checkpoint, texts, exact, learnt, config.seed, console)
    _require_same_weights(checkpoint, deepest, weights, output)
    if not config.no_report:
        facts = training_report.write_report(output, facts, alignments, console)
    state.discard()
    return facts


def _options(config: TrainConfig, *names: str) -> dict[str, Any]:
    """These options, for what takes them under the same names."""
    return {name: getattr(config, name) for name in names}


def _read_pairs(config: TrainConfig, console) -> tuple[DiskBackedPairs, DiskBackedPairs, dict[str, str]]:
    """Trained and held-out pairs, which share no word, and no family where the split sees to it; and facts about the list's file."""
    pairs = word_pairs.read_list(config, console)
    if config.held_out_pairs is None:
        return *word_pairs.split_pairs(pairs, config.held_out, config.seed, config.split), pairs.reading.file
    held_out = word_pairs.read_list(config, console, config.held_out_pairs)
    word_pairs.check_disjoint(pairs, held_out)
    return pairs, held_out, pairs.reading.file


def _require_same_weights(checkpoint: Checkpoint, deepest: Layer, weights: str, output: pathlib.Path) -> None:
    """Raise ``TliError`` where the model's files are not those any more that the run began with: nothing would be true of either."""
    if checkpoint.sha256(deepest) != weights:
        must = "the model must stay as it is during a run"
        raise TliError(checkpoint.name, must, "other weights than at its start", f"run again; the adapter in {output} is of the first ones")


def _claim_output(config: TrainConfig, output: pathlib.Path, trained: DiskBackedPairs) -> TrainingState:
    """The output folder, made or claimed, and in it the state that an interrupted run may have left."""
    if config.tensorboard:
        require_tensorboard()
    state = TrainingState(output, {name: value for name, value in as_dict(config).items() if name not in _FREE_OPTIONS}, trained)
    if config.resume:
        remove_unfinished(output)
    if not (config.resume and state.exists()):
        prepare_output_dir(output, config.overwrite or (config.resume and holds_only_logs(output)))
    return state


def _resolve_device(config: TrainConfig, state: TrainingState, console) -> DeviceConfig:
    """Device, dtype and ops for training: the fastest dtype if the options leave it open, or what an interrupted run was begun with."""
    begun = state.begun_with() if config.resume else {}
    # the reference ops are for comparing every bit
    fast = config.dtype == "auto" and config.impl == "auto"
    dtype = begun.get("dtype") or ("fastest" if fast else config.dtype)
    device_config = resolve_device(config.device, dtype, config.weights, config.impl, begun)
    state.begun_on = device_config.facts
    console.print(device_config.ops.description)
    changed = {name: value for name, value in device_config.facts.items() if begun.get(name, value) != value}
    if changed:
        told = ", ".join(f"{name} {value} in place of {begun[name]}" for name, value in changed.items())
        console.print(f"this run was begun on another machine and goes on with {told}: its last bits will not be those of one machine")
    return device_config


def _tokenise(
    config: TrainConfig, checkpoint: Checkpoint, tokenizer, splits: Sequence[DiskBackedPairs], kept: Sequence[TextWindows]
) -> TokenisedWords:
    """All sources, then all targets; with rows for the kept texts, too."""
    texts = (text for side in ("source", "target") for pairs in splits for text in map(operator.attrgetter(side), pairs))
    words = tokenise(tokenizer, texts, context_length(checkpoint), config.prefix)
    if config.all_rows:
        # of fewer rows it is asked as they are read
        checkpoint.require_rows(int(words.vocab_ids[-1]))
        return words.with_all_rows(checkpoint.config.vocab_size)
    return dataclasses.replace(words, vocab_ids=functools.reduce(np.union1d, (windows.vocab_ids for windows in kept), words.vocab_ids))


def _choose_token_norm(config: TrainConfig, checkpoint: Checkpoint, console) -> TrainConfig:
    """The options with the token norm that ``auto`` means here."""
    token_norm = resolve_token_norm(config.token_norm, checkpoint)
    if token_norm != config.token_norm and token_norm == "rms":
        why = "is a LayerNorm" if checkpoint.family.layer_norm else "lies in a shard that is not needed otherwise"
        console.print(f"token states are normalised by plain RMS: the model's final norm {why}")
    return dataclasses.replace(config, token_norm=cast(TokenNorm, token_norm))


def _measure_layers(
    checkpoint: Checkpoint,
    pool: Pooling,
    exact: DeviceConfig,
    config: TrainConfig,
    console,
    splits,
    streams,
    pool_bos: bool = False,
    **seen,
):
    """``measure_layers`` with a bar."""
    # the embeddings, each block, and the output
    with layer_bar(console, checkpoint.blocks + 2) as done:
        return measure_layers(checkpoint, splits, pool, exact, streams, config.prefix, pool_bos, done=done, **seen)


def _probe(config: TrainConfig, checkpoint: Checkpoint, exact: DeviceConfig, splits: dict[str, DiskBackedPairs], console) -> dict | None:
    """What the base model itself says when it is asked for translations of held-out words; None where it cannot be asked."""
    examples, asked = probe.draw(splits["trained"], splits.get("held_out", ()), config.seed)
    if not asked:
        return None
    with layer_bar(console, checkpoint.blocks + 2, "asking the model") as done:
        given = probe.probe(checkpoint, examples, asked, config.source, config.target, exact, done)
    return None if given is None else probe.rate(given)


def _measure_harm(
    checkpoint: Checkpoint, texts: list[TextWindows], exact: DeviceConfig, adapter: lora.Adapter | None, seed: int, console
) -> list[dict]:
    """What training cost the language model, text by text; empty where the model's files are not all here, or it has no head."""
    assert adapter is not None
    found = []
    with layer_bar(console, sum(checkpoint.blocks + 2 + len(windows.lengths) for windows in texts), "measuring harm") as done:
        for windows in texts:
            predictions, unread = predict(checkpoint, windows, exact, [adapter], done)
            if unread is not None:
                console.print(f"what training cost the language model is not measured: {unread}")
                break
            found.append(harm(predictions, windows, seed))
    return found


def _choose_layer(measure: Callable, trained: DiskBackedPairs, seed: int, console) -> int:
    """The layer for ``auto``, chosen by the trained pairs alone: held-out ones must judge the result."""
    alignments, _ = measure({"trained": trained.subset(word_pairs.sample(trained, seed))}, {"before": None})
    gaps = {layer: alignment.per_pair("gap") for (_, _, layer), alignment in alignments.items()}
    chosen = layer_choice.choose_layer(gaps, next(iter(alignments.values())).clusters, seed)
    console.print(f"layer {chosen}: that is where the trained pairs' gap is surely the largest before training")
    return chosen


def _aligned_layer(config: TrainConfig) -> Layer:
    """The hidden state that the loss is about, once ``auto`` is chosen: L, or ``output`` in the full arm."""
    return "output" if config.arm == "full" else config.layer


def _fit_map(
    config: TrainConfig,
    checkpoint: Checkpoint,
    pool: Pooling,
    exact: DeviceConfig,
    trained: DiskBackedPairs,
    partners: np.ndarray | None,
    adapter: lora.Adapter,
    console,
) -> Choice:
    """The closed-form map to be saved: its kind is what finds most of a part of the trained pairs in the frozen states, and it is fitted on
    the trained states of them all; of a control's mismatched pairs likewise.
    """
    pairs = list(trained.subset(numbers := word_pairs.sample(trained, config.seed)))
    if partners is not None:
        others = trained.subset(partners[numbers])
        pairs = [dataclasses.replace(pair, target=other.target, synonyms=other.synonyms) for pair, other in zip(pairs, others)]
    place = _aligned_layer(config)
    states: dict[tuple[str, Layer], Sides] = {}
    # the embeddings and the blocks up to the layer, or all and the output
    with layer_bar(console, checkpoint.blocks + 2 if place == "output" else int(place) + 1, "fitting a map") as done:
        see_layers(
            checkpoint, pairs, pool, exact, config.prefix, [place], keep_words(states, [place]), done, config.eval_pool_bos,
            {"before": None, "after": adapter},
        )  # fmt: skip
    baselines = Baselines(pairs, (), config.seed)
    return baselines.refit(baselines.best_map(*states["before", place]), *states["after", place])


def _map_facts(config: TrainConfig, checkpoint: Checkpoint, choice: Choice, output: pathlib.Path) -> dict:
    """What the map's file says: of which layer and model it is, what chose it, and of which adapter it is the head."""
    place = _aligned_layer(config)
    return {
        "schema": SCHEMA,
        "config": as_dict(config),
        "model": model_facts(config.model or starter.NAME, checkpoint, checkpoint.sha256(place)),
        "map": {"layer": place, **choice.facts()},
        "adapter": sha256(output / lora.ADAPTER_FILE),
    }


def _mismatched(pairs: int, seed: int) -> np.ndarray:
    """Partners that are never a source's own: of each source, the target of the next one around a random ring."""
    ring = np.random.default_rng([seed, 1]).permutation(pairs)
    partners = np.empty(pairs, np.int64)
    partners[ring] = np.roll(ring, 1)
    return partners


def _require_memory(
    config: TrainConfig,
    checkpoint: Checkpoint,
    words: TokenisedWords,
    trained: int,
    device_config: DeviceConfig,
    kept: Sequence[TextWindows],
) -> Run:
    """The memory that the run needs; raises ``TliError`` where that is not available."""
    options = _options(config, "arm", "layer", "rank", "targets", "dropout", "batch", "micro_batch", "checkpointing", "pool_bos")
    options["kept_windows"] = sum(len(windows.lengths) for windows in kept)
    options["kept_width"] = max((windows.width for windows in kept), default=0)
    needed = budget.needed(checkpoint, words, trained, device_config, token_norm=config.token_norm != "none", **options)
    budget.require_room(needed, device_config)
    return needed


def _training_step(
    config: TrainConfig,
    decoder: "Decoder",
    pool: Pooling,
    layer: int,
    total: int,
    device_config: DeviceConfig,
    kept: Sequence[TextWindows],
    vocab_ids: np.ndarray,
) -> TrainStep:
    """The arm's states, pooled, under the run's loss and optimiser; made before an interrupted run's adapters are restored."""
    states = functools.partial(run_hooked, layer=layer) if config.arm == "full-hook" else run
    # the output is normalised already
    pool = pool.for_layer("output") if config.arm == "full" else pool
    objective = Objective(**_options(config, "loss", "temperature", "margin"), ops=device_config.ops)
    optimiser = OptimiserSettings(**_options(config, "lr", "weight_decay", "clip", "warmup", "schedule"), total=total)
    keep = None
    if kept:
        keep = KeptText(functools.partial(states, decoder), kept, vocab_ids, device_config, config.keep_weight, config.seed)
    return TrainStep(decoder, lambda batch: pool(states(decoder, batch), batch), objective, optimiser, config.seed, keep=keep)


def _chance_loss(config: TrainConfig, trained: int) -> float | None:
    """The loss of a batch whose words are all alike, in nats; None where it depends on how alike they are."""
    per_batch = trained / -(-trained // config.batch)
    return math.log(per_batch) if config.loss == "infonce" else None


def _facts(
    config: TrainConfig,
    checkpoint: Checkpoint,
    weights: str,
    decoder: "Decoder",
    device_config: DeviceConfig,
    trained: DiskBackedPairs,
    held_out: DiskBackedPairs,
    listed: dict[str, str],
    output: pathlib.Path,
    progress: Progress,
) -> dict:
    """What the run was: plain JSON values, for the report."""
    file = output / lora.ADAPTER_FILE
    return {
        "schema": SCHEMA,
        "config": as_dict(config),
        "model": model_facts(config.model or starter.NAME, checkpoint, weights),
        "pairs": {
            **split_facts(trained, held_out, config.split if config.held_out_pairs is None else LISTS),
            **listed,
        },
        "adapter": {"sha256": sha256(file), "parameters": sum(p.numel() for p in lora.trainable(decoder)), "bytes": file.stat().st_size},
        "training": {
            "steps": progress.step,
            "seconds": progress.seconds,
            "words_per_second": 2 * len(trained) * config.epochs / progress.seconds,
            "first_step_at": progress.first_step_at,
            "loss_first": progress.losses[0],
            "loss_last": progress.losses[-1],
            "chance_loss": _chance_loss(config, len(trained)),
            "alarm": progress.alarm,
            "peak_bytes": environment.peak_bytes(),
        },
        "versions": environment.versions(),
        "machine": environment.machine(device_config),
        "shuffled": config.shuffle_pairs,
        "missing_output": None,
    }
