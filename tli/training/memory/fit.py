"""What a run's batches are as far as memory goes, whether it fits, and which options make it fit. Imports no torch."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from tli.data.packing import TokenisedWords
from tli.runtime.cli import flag
from tli.runtime.errors import TliError
from tli.training.memory.estimate import Part, Run, predict, total

_DRAWS = 4
_HALVINGS = 7
# from the ones that leave the gradients as they are to the one that trains something else
_CHANGEABLE = ("micro_batch", "checkpointing", "weights", "batch", "arm")


def trained_pairs(pairs: int, held_out: float, batch: int) -> tuple[int, int]:
    """How many of a list's pairs are trained, and how many of them make a batch: an epoch's batches are of nearly equal size."""
    trained = max(1, round(pairs * (1 - held_out)))
    return trained, -(-trained // -(-trained // batch))


def largest_part(words: TokenisedWords, trained: int, batch: int, micro_batch: int | None = None, pool_bos: bool = False) -> Part:
    """The largest part of some random batches of the first ``trained`` pairs, packed as in training.

    words  all words, sources of all pairs first, then targets
    """
    size, random = min(trained, batch, micro_batch or batch), np.random.default_rng(0)
    found = []
    for _ in range(_DRAWS):
        drawn = random.permutation(trained)[:size]
        bins, width = words.pack(np.concatenate([drawn, drawn + len(words) // 2]), pool_bos).input_ids.shape
        found.append(Part(size, bins, width))
    return max(found, key=lambda part: part.nodes)


def change_to_fit(run: Run, available: int, held: int = 0, free: tuple[str, ...] = _CHANGEABLE) -> dict[str, Any] | None:
    """The options that make the run fit into ``available`` bytes: {} as it is, None if nothing does.

    Those that leave the gradients as they are come first, alone and together; then NF4 weights, a smaller batch, the early arm.

    held:  bytes of the prediction that are there already
    free:  the options that may change
    """
    halves = [run.batch >> shift for shift in range(1, _HALVINGS)]
    choices: dict[str, Iterable[Any]] = {
        "arm": dict.fromkeys((run.arm, "early")),
        "batch": dict.fromkeys((run.batch, *(size for size in halves if size >= 8), min(run.batch, 8))),
        "weights": dict.fromkeys((run.weights, "nf4")),
        "checkpointing": dict.fromkeys((run.checkpointing, True)),
        "micro_batch": (run.micro_batch, *(size for size in halves if 2 <= size < (run.micro_batch or run.batch))),
    }
    tried = (values if name in free else (getattr(run, name),) for name, values in choices.items())
    for values in itertools.product(*tried):
        changed = dict(zip(choices, values))
        if changed["micro_batch"] is not None and changed["micro_batch"] != run.micro_batch and changed["micro_batch"] >= changed["batch"]:
            continue
        if total(predict(dataclasses.replace(run, **changed))) - held <= available:
            return {name: value for name, value in changed.items() if value != getattr(run, name)}
    return None


def as_flags(changed: dict[str, Any]) -> str:
    """Changed options as they are typed: ``--micro-batch 32 --checkpointing``."""
    return " ".join(flag(name) + ("" if value is True else f" {value}") for name, value in changed.items())


def require_room(run: Run, available: int, held: int = 0, fixed: frozenset[str] = frozenset()) -> None:
    """Raise ``TliError`` if the run needs more than ``available`` bytes beside those of the prediction that are ``held`` already.

    The error names options that the same arithmetic says to be enough, none of them among the ``fixed`` ones.
    """
    need = total(predict(run)) - held
    if need <= available:
        return
    changed = change_to_fit(run, available, held, tuple(name for name in _CHANGEABLE if name not in fixed))
    remedy = f"add {as_flags(changed)}" if changed else "use a smaller model, or a machine with more memory"
    must = f"{need / 1e9:.2f} GB must be free for this run (python -m tli.memory shows for what)"
    raise TliError("memory", must, f"{available / 1e9:.2f} GB", remedy)
