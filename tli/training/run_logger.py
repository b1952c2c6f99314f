"""Run loggers: the metrics of each training step, as JSON lines and for TensorBoard.

A logger is handed steps in their order, each once its loss has arrived. One that is opened for a resumed run forgets the steps that an
interrupted run logged beyond its saved state, because they are taken and logged again: to the same bytes.
"""

import contextlib
import importlib.util
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from tli.runtime.errors import TliError, disk_errors, one_line
from tli.runtime.files import SCHEMA, atomic_write

METRICS_FILE = "metrics.jsonl"
# of TensorBoard's files
EVENTS_PREFIX = "events.out.tfevents."


class RunLogger(Protocol):
    """Where a run's metrics go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of step 1, 2, ..."""

    def close(self) -> None:
        """Write what is left; nothing is logged afterwards."""


class JsonlLogger:
    """``metrics.jsonl``: a line a step, ``{"step": 1, "epoch": 0.0625, "loss": 5.19, "lr": 0.0001, "grad_norm": 2.7}``.

    The first line begins with the format's version, ``"schema": 1``. A value that is not finite becomes ``null``. Each line goes to the
    file when it is logged, so that the run can be watched, and a kill loses none.

    Args:
        path:  the file
        done:  steps that are done already; 0 begins a new file

    Raises:
        TliError: a resumed run's file that is no log of steps; a full disk.
    """

    def __init__(self, path: pathlib.Path, done: int = 0):
        self.path, kept = path, _lines_until(path, done) if done else []
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(kept))
        # kept open for the run, and closed by ``close``
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._header = {} if kept else {"schema": SCHEMA}

    def log(self, values: Mapping[str, float], step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with disk_errors(self.path):
            self._file.write(json.dumps({**self._header, "step": step, **finite}) + "\n")
        self._header = {}

    def close(self) -> None:
        with disk_errors(self.path):
            self._file.close()


class TensorBoardLogger:
    """TensorBoard's event files in ``folder``; ``done`` as for ``JsonlLogger``."""

    def __init__(self, folder: pathlib.Path, done: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


@contextlib.contextmanager
def open_loggers(folder: pathlib.Path, done: int, tensorboard: bool) -> Iterator[Sequence[RunLogger]]:
    """The loggers of a run whose first ``done`` steps are done, closed at the end whatever happened."""
    with contextlib.ExitStack() as stack:
        loggers: list[RunLogger] = [JsonlLogger(folder / METRICS_FILE, done)]
        stack.callback(loggers[0].close)
        if tensorboard:
            loggers.append(TensorBoardLogger(folder, done))
            stack.callback(loggers[1].close)
        yield loggers


def require_tensorboard() -> None:
    """Raise ``TliError`` where the package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise TliError(
            "--tensorboard", "tensorboard must be installed", "no such package", "pip install tensorboard, or leave the flag out"
        )


def holds_only_logs(folder: pathlib.Path) -> bool:
    """Whether a run left nothing but logs, because it was killed before its first save."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return all(name.startswith((METRICS_FILE, EVENTS_PREFIX)) for name in names)


def _lines_until(path: pathlib.Path, step: int) -> list[bytes]:
    """The whole lines of a log up to this step."""
    try:
        # a kill may have cut the last line short
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if path.exists() else []
        return [line for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, TypeError, KeyError) as error:
        raise TliError(path, "each line must be a logged step", one_line(error), "delete it, or start anew with --overwrite") from error
