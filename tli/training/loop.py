"""The training loop: the steps that are left, saved so often that a kill loses little."""

import contextlib
import functools
import time

from tli.config import TrainConfig
from tli.data.loader import BatchLoader, prefetch
from tli.model.decoder import run, run_hooked
from tli.model.pooling import Pooling
from tli.runtime.console import stop_signals, training_bar
from tli.training.memory import profile as profiling
from tli.training.state import Progress, TrainingState
from tli.training.step import TrainStep, require_finite

_SAVE_EVERY_S = 20.0


def fit(
    config: TrainConfig,
    decoder,
    batches: BatchLoader,
    pool: Pooling,
    state: TrainingState,
    console,
    profile: profiling.Profile | None = None,
) -> Progress:
    """Take the steps that are left; a signal to stop ends them early, after the step it comes in."""
    # auto has been replaced by the layer that it chose
    assert config.layer != "auto"
    aligned = functools.partial(run_hooked, layer=config.layer) if config.arm == "full-hook" else run
    steps = TrainStep(config, decoder, lambda part: pool(aligned(decoder, part), part), batches.total, batches.placement)
    progress = state.restore(steps.adapters, steps.optimiser) if config.resume else Progress()
    began = saved = time.monotonic() - progress.seconds
    position = progress.step
    decoder.train()
    with stop_signals() as stop, training_bar(console, batches.total) as show:
        while position < batches.total and not stop.is_set():
            epoch, done = divmod(position, batches.per_epoch)
            for parts, same in prefetch(batches.epoch(epoch, skip=done), batches.placement.device):
                final = position == batches.total - 1
                with profile.recorded(steps.parameters, state.path.parent) if profile and final else contextlib.nullcontext():
                    steps.take(position, parts, same)
                position += 1
                last = stop.is_set() or position == batches.total
                save = last or time.monotonic() - saved > _SAVE_EVERY_S
                for loss in steps.finished(wait=save):
                    require_finite(progress.step, loss)
                    progress.add(loss, time.monotonic() - began)
                    show(progress.step, loss, words=sum(len(part.indptr) - 1 for part in parts))
                if save:
                    state.save(steps.adapters, steps.optimiser, progress)
                    saved = time.monotonic()
                if last:
                    break
    decoder.eval()
    return progress
