"""``python -m tli.train``: align word pairs at layer L with LoRA adapters, and measure what came of it.

Reads top to bottom: pairs -> tokens -> the model with adapters -> steps -> the adapter's files -> the report. By default the model
ends at layer L; the arms that it is compared with run the whole model (``tli/hooked.py``).

Everything random is a function of the seed and of a position (epoch, step, module), never of what came before it. So a run
that was killed and resumed passes through the same numbers as one that was not, to the last bit.
"""

from tli.config import TrainConfig, as_dict, parse

if __name__ == "__main__":
    # first of all: --help and a wrong flag must not wait for torch
    COMMAND_LINE = parse(TrainConfig, "tli.train")

import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
import types

import numpy as np
import torch

from tli import layers, lexicon, lora, ops, provenance, report, starter
from tli.arms import arm_model
from tli.checkpoint import Checkpoint, open_checkpoint, sight
from tli.errors import TliError, run_command
from tli.files import claim_output, sha256
from tli.hooked import run_hooked
from tli.objective import Pooling, pooling, token_norm_at_hand
from tli.packing import TokenisedWords, tokenise
from tli.progress import Progress, TrainingState, layer_bar, stop_signals, training_bar
from tli.step import Stepper, made_ahead, require_finite
from tli.streaming import align_layers
from tli.truncated import Batch, Placement, place, run, to_batch

_SAVE_EVERY_S = 20.0


def train(config: TrainConfig) -> dict:
    """Train adapters as ``config`` says and write them, and the report, to ``config.output``.

    Returns:
        What ``report.json`` holds; with ``no_report`` the facts of the run without measurements.

    Raises:
        TliError: for whatever a user can cause; nothing that existed before is lost.
        KeyboardInterrupt: after a stop by Ctrl-C; the adapter so far, and what ``resume`` needs, are saved.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    output = pathlib.Path(config.output).expanduser()
    trained, held_out = _read_pairs(config)
    partners = _partners(len(trained), config)
    taught = [dataclasses.replace(trained[own], source=pair.source) for pair, own in zip(trained, partners, strict=True)]
    state = TrainingState(output, config, taught)
    if not (config.resume and state.exists()):
        claim_output(output, config.overwrite)

    checkpoint = open_checkpoint(config.model or str(starter.starter_folder()))
    words = _tokenise(config, checkpoint, trained + held_out)
    # what is measured is measured exactly; the reference ops are for comparing every bit
    fast = config.dtype == "auto" and config.impl == "auto"
    placement, exact = (place(config.device, dtype, config.weights) for dtype in ("fastest" if fast else config.dtype, config.dtype))
    console.print(ops.choose(config.impl, placement.dtype, placement.device))

    adapter = lora.LoRAConfig(
        rank=config.rank, alpha=config.alpha, targets=config.targets, dropout=config.dropout, rslora=config.rslora, init=config.init
    )
    token_norm = token_norm_at_hand(config.token_norm, checkpoint)
    if token_norm != config.token_norm and token_norm == "rms":
        console.print("token states are normalised by plain RMS: the model's final norm lies in a shard that is not needed otherwise")
    pool = pooling(token_norm, checkpoint, placement.device)
    if config.layer == "auto":
        config = dataclasses.replace(config, layer=_choose_layer(config, checkpoint, words, trained, pool, exact, console))
    decoder = arm_model(config, checkpoint, words.rows, placement)
    lora.inject(decoder, adapter, None if config.arm == "full" else range(config.layer), seed=config.seed)
    batches = EpochBatches(config, words, partners, lexicon.same_meaning(taught), placement)
    base_model = config.model or starter.NAME

    # the output is normalised already
    at_loss = pool.at("output") if config.arm == "full" else pool
    progress = _fit(config, decoder, batches, at_loss, state, console)
    lora.save(decoder, adapter, output, base_model)
    report.clear(output)
    if progress.step < batches.total:
        console.print(
            f"stopped after step {progress.step} of {batches.total}: the adapter so far is in {output}; --resume goes on from here"
        )
        raise KeyboardInterrupt

    # what was done, where the options left it open
    done_config = dataclasses.replace(config, token_norm=token_norm)
    facts = _facts(done_config, checkpoint, decoder, placement, trained, held_out, output, progress)
    if not config.no_report:
        streams = {"before": None, "after": lora.snapshot(decoder, adapter.scale)}
        splits = _splits(trained, held_out)
        # the embeddings, each block, and the output
        with layer_bar(console, checkpoint.blocks + 2) as done:
            alignments, facts["missing_output"] = align_layers(checkpoint, words, splits, pool, exact, streams, config.eval_pool_bos, done)
        facts = report.write_report(output, facts, alignments, console)
    state.discard()
    console.print(f"in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    return facts


def _read_pairs(config: TrainConfig) -> tuple[list[lexicon.Pair], list[lexicon.Pair]]:
    """Trained and held-out pairs, which share no word."""
    pairs = lexicon.read_pairs(config.pairs, config.source, config.target)
    if config.held_out_pairs is None:
        return lexicon.split_pairs(pairs, config.held_out, config.seed)
    held_out = lexicon.read_pairs(config.held_out_pairs, config.source, config.target)
    lexicon.check_disjoint(pairs, held_out)
    return pairs, held_out


def _partners(pairs: int, config: TrainConfig) -> np.ndarray:
    """Whose target each trained source is taught with: its own, or, shuffled, that of the next one around a random ring."""
    if not config.shuffle_pairs:
        return np.arange(pairs)
    ring = np.random.default_rng([config.seed, 1]).permutation(pairs)
    partners = np.empty(pairs, np.int64)
    partners[ring] = np.roll(ring, 1)
    return partners


def _tokenise(config: TrainConfig, checkpoint: Checkpoint, pairs: list[lexicon.Pair]) -> TokenisedWords:
    texts = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    words = tokenise(checkpoint.tokenizer(), texts, sight(checkpoint), config.prefix)
    return words.with_all_rows(checkpoint.config.vocab_size) if config.all_rows else words


def _choose_layer(
    config: TrainConfig,
    checkpoint: Checkpoint,
    words: TokenisedWords,
    trained: list[lexicon.Pair],
    pool: Pooling,
    placement: Placement,
    console,
) -> int:
    """The layer for ``auto``, by the trained pairs alone: held-out ones are to judge what comes of it."""
    splits = {"trained": (np.arange(len(trained)), lexicon.same_meaning(trained))}
    with layer_bar(console, checkpoint.blocks + 2) as done:
        alignments, _ = align_layers(checkpoint, words, splits, pool, placement, {"before": None}, done=done)
    gaps = {layer: alignment.per_pair("gap") for (_, _, layer), alignment in alignments.items()}
    chosen = layers.choose_layer(gaps, splits["trained"][1], config.seed)
    console.print(f"layer {chosen}: that is where the trained pairs' gap is surely the largest before training")
    return chosen


class EpochBatches:
    """Each epoch's batches, packed before the epoch begins: random pairs in parts of nearly equal size.

    Words are numbered sources first (trained, then held out), then targets in the same order.
    """

    def __init__(self, config: TrainConfig, words: TokenisedWords, partners: np.ndarray, same: np.ndarray, placement: Placement):
        if config.micro_batch is not None and config.micro_batch < 1:
            raise TliError("--micro-batch", "a part of a batch must have at least 1 pair", config.micro_batch, "raise it, or leave it out")
        if config.batch < 2 or config.epochs < 1:
            got = f"batch {config.batch}, epochs {config.epochs}"
            raise TliError("--batch, --epochs", "a batch must have at least 2 pairs, and a run at least 1 epoch", got, "raise them")
        self.config, self.words, self.partners, self.same, self.placement = config, words, partners, same, placement
        self.per_epoch = -(-len(partners) // config.batch)
        self.total = self.per_epoch * config.epochs

    def epoch(self, epoch: int, skip: int = 0) -> list[tuple[list[Batch], torch.Tensor]]:
        """The epoch's batches from the ``skip``-th on, each in parts, with its pairs (i, j) that are no negatives: int64 [E, 2]."""
        order = np.random.default_rng([self.config.seed, 0, epoch]).permutation(len(self.partners))
        return [self._batch(pairs) for pairs in np.array_split(order, self.per_epoch)[skip:]]

    def _batch(self, pairs: np.ndarray) -> tuple[list[Batch], torch.Tensor]:
        parts = [self._part(part) for part in np.array_split(pairs, -(-len(pairs) // (self.config.micro_batch or len(pairs))))]
        place_of = np.full(len(self.partners), -1)
        place_of[pairs] = np.arange(len(pairs))
        same = place_of[self.same]
        same = same[(same >= 0).all(axis=1)]
        # row by row, as the fused losses walk them
        return parts, torch.from_numpy(same[np.lexsort(same.T[::-1])]).to(self.placement.device)

    def _part(self, pairs: np.ndarray) -> Batch:
        targets = self.partners[pairs] + len(self.words.lengths) // 2
        packed = self.words.pack(np.concatenate([pairs, targets]), self.config.pool_bos, width_step=self.placement.width_step)
        return to_batch(packed, self.placement.dtype, self.placement.device)


def _fit(config: TrainConfig, decoder, batches: EpochBatches, pool: Pooling, state: TrainingState, console) -> Progress:
    """Take the steps that are left; a signal to stop ends them early, after the step it comes in."""
    aligned = functools.partial(run_hooked, layer=config.layer) if config.arm == "full-hook" else run
    record = batches.placement.device.type == "cuda" and ops.fused()
    steps = Stepper(config, decoder, lambda part: pool(aligned(decoder, part), part), batches.total, record)
    progress = state.restore(steps.adapters, steps.optimiser) if config.resume else Progress()
    began = saved = time.monotonic() - progress.seconds
    position = progress.step
    decoder.train()
    with stop_signals() as stop, training_bar(console, batches.total) as show:
        while position < batches.total and not stop.is_set():
            epoch, done = divmod(position, batches.per_epoch)
            for parts, same in made_ahead(batches.epoch(epoch, skip=done), batches.placement.device):
                steps.take(position, parts, same)
                position += 1
                last = stop.is_set() or position == batches.total
                save = last or time.monotonic() - saved > _SAVE_EVERY_S
                for loss in steps.finished(wait=save):
                    require_finite(progress.step, loss)
                    progress.add(loss, time.monotonic() - began)
                    show(progress, words=sum(len(part.indptr) - 1 for part in parts))
                if save:
                    state.save(steps.adapters, steps.optimiser, progress)
                    saved = time.monotonic()
                if last:
                    break
    decoder.eval()
    return progress


def _splits(trained: list[lexicon.Pair], held_out: list[lexicon.Pair]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The true pairs of each split, also where mismatched ones were taught, and those among them that mean the same."""
    numbers = np.arange(len(trained) + len(held_out))
    return {
        "trained": (numbers[: len(trained)], lexicon.same_meaning(trained)),
        "held_out": (numbers[len(trained) :], lexicon.same_meaning(held_out)),
    }


def _facts(
    config: TrainConfig,
    checkpoint: Checkpoint,
    decoder,
    placement: Placement,
    trained: list,
    held_out: list,
    output: pathlib.Path,
    progress: Progress,
) -> dict:
    """What the run was: plain JSON values, for the report."""
    file = output / lora.ADAPTER_FILE
    list_file = pathlib.Path(config.pairs or lexicon.SHIPPED)
    per_batch = len(trained) / -(-len(trained) // config.batch)
    return {
        "config": as_dict(config),
        "model": provenance.model_facts(
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
            "peak_bytes": provenance.peak_bytes(),
        },
        "versions": provenance.versions(),
        "machine": provenance.machine(placement),
        "shuffled": config.shuffle_pairs,
        "missing_output": None,
    }


class _CallableModule(types.ModuleType):
    """Lets ``from tli import train`` be the function, although ``tli.train`` is this module."""

    def __call__(self, config: TrainConfig) -> dict:
        return train(config)


sys.modules[__name__].__class__ = _CallableModule


def main() -> None:
    """The command."""
    facts = train(COMMAND_LINE)
    if COMMAND_LINE.json:
        print(json.dumps(facts))


if __name__ == "__main__":
    run_command(main)
