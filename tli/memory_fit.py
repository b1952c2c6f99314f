"""Whether a run fits into the memory that there is, and which options make it fit."""

import dataclasses
import math

from tli.memory_model import Run, predict, total


def change_to_fit(run: Run, available: int, fixed: int = 0) -> dict[str, object] | None:
    """The fewest options that make the run fit into ``available`` bytes: {} as it is, None if nothing does.

    Options that leave the gradients as they are come first; then NF4 weights, a smaller batch, the early arm. ``fixed``: bytes of the
    prediction that are there already.
    """
    parts = [None, *(size for size in (run.batch >> shift for shift in range(1, 8)) if size >= 2)]
    batches = [run.batch, *(size for size in (run.batch >> shift for shift in range(1, 8)) if size >= 8)]
    arms = dict.fromkeys((run.arm, "early"))
    for arm in arms:
        for batch in batches:
            for weights in dict.fromkeys((run.weights, "nf4")):
                for recomputed in dict.fromkeys((run.checkpointing, run.checkpointing or arm != "early")):
                    for size in dict.fromkeys((run.micro_batch, *(part for part in parts if part and part < (run.micro_batch or batch)))):
                        changed = {"arm": arm, "batch": batch, "weights": weights, "checkpointing": recomputed, "micro_batch": size}
                        if total(predict(dataclasses.replace(run, **changed))) - fixed <= available:
                            return {name: value for name, value in changed.items() if value != getattr(run, name)}
    return None


def as_flags(changed: dict[str, object]) -> str:
    """Changed options as they are typed: ``--micro-batch 32 --checkpointing``."""
    return " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in changed.items())


def require_room(run: Run, available: int, fixed: int, where: str) -> None:
    """Raise ``TliError`` before anything is loaded if the run will not fit; ``fixed``: bytes of the prediction that are held already."""
    need = total(predict(run)) - fixed
    if need <= available:
        return
    changed = change_to_fit(run, available, fixed)
    remedy = f"add {as_flags(changed)}" if changed else "use a smaller model, or a machine with more memory"
    raise TliError(where, f"{gigabytes(need)} must be free for this run (python -m tli.memory says for what)", gigabytes(available), remedy)


def gigabytes(size: float) -> str:
    """As ``1.23 GB``."""
    return f"{size / 1e9:.{2 if size < 9.995e9 else 1}f} GB" if math.isfinite(size) else "unknown"
