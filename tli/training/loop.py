"""The training loop: takes the steps that are left, logs them, and saves so often that a kill loses little."""

import contextlib
import time
from collections.abc import Sequence

from tli.data.loader import BatchLoader, prefetch
from tli.runtime.console import stop_signals, training_bar
from tli.runtime.errors import TliError
from tli.training import collapse
from tli.training.memory.profile import Profile
from tli.training.run_logger import RunLogger
from tli.training.state import Progress, TrainingState
from tli.training.step import TrainStep, require_finite

_SAVE_EVERY_S = 20.0


def fit(
    step: TrainStep,
    batches: BatchLoader,
    state: TrainingState,
    progress: Progress,
    loggers: Sequence[RunLogger],
    console,
    profile: Profile | None = None,
    chance: float | None = None,
) -> None:
    """Take the steps from ``progress`` on, and count them in it; a signal to stop ends the run after the step that it comes in.

    A collapse is said once, and stays in ``progress.alarm``; ``chance`` is the loss of words that are all alike.
    """
    began = saved = time.monotonic() - progress.seconds
    step.decoder.train()
    with stop_signals() as stop, training_bar(console, batches.total) as show:
        steps = prefetch(batches.steps(progress.step), batches.device_config.device)
        for position, (micro_batches, false_negatives) in enumerate(steps, progress.step):
            final = position == batches.total - 1
            last = final or stop.is_set()
            save = last or time.monotonic() - saved > _SAVE_EVERY_S
            try:
                with profile.recorded(step.parameters, state.path.parent) if profile and final else contextlib.nullcontext():
                    step(position, micro_batches, false_negatives)
                for result in step.pop_results(wait=save):
                    require_finite(progress.step, result.loss)
                    require_finite(progress.step, result.grad_norm, "gradient norm")
                    progress.add(result.loss, (result.mismatched, result.effective_rank), time.monotonic() - began)
                    _watch(progress, batches.total, chance, console)
                    for logger in loggers:
                        logger.log({"epoch": progress.step / batches.per_epoch, **vars(result)}, progress.step)
                    show(progress.step, result.loss, words=sum(len(packed.indptr) - 1 for packed in micro_batches))
            except TliError:
                # a step that is not finite has changed nothing
                if progress.step:
                    state.save(step.adapters, step.optimiser, progress)
                    console.print(f"the last good state, after step {progress.step}, is kept: {state.path}")
                raise
            # after its steps were logged: a resumed run logs those that come after them
            if save:
                state.save(step.adapters, step.optimiser, progress)
                saved = time.monotonic()
            if last:
                break
    step.decoder.eval()


def _watch(progress: Progress, total: int, chance: float | None, console) -> None:
    """Say, once, that the run collapses."""
    if progress.alarm is None:
        progress.alarm = collapse.alarm(progress.losses, progress.spreads, total, chance)
        if progress.alarm is not None:
            console.print(f"warning: {progress.alarm}")
