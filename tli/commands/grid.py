"""Many runs of ``tli.train``, each a cell: a process of its own, and a folder that is complete or absent.

A cell that was stopped goes on where it was, since ``tli.train --resume`` does; one that is complete is never run again. Whoever
runs a cell holds a lock on it, so processes that share a folder, on one machine or on several, need no coordinator.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import filelock

from tli.model.linear_map import MAP_FILE
from tli.model.linear_map import REPORT_FILE as MAP_REPORT_FILE
from tli.model.lora import ADAPTER_FILE, CONFIG_FILE
from tli.reports.training import FILES as REPORT_FILES
from tli.runtime.cli import flag
from tli.runtime.console import stop_signals
from tli.runtime.environment import cores
from tli.runtime.errors import TliError, disk_errors
from tli.runtime.files import remove_unfinished, remove_written, require_written, write_json
from tli.training.run_logger import METRICS_FILE
from tli.training.state import STATE_FILE

REPORT = "report.json"
# all that a cell's run leaves in its folder
_RUN_FILES = (*REPORT_FILES, ADAPTER_FILE, CONFIG_FILE, MAP_FILE, MAP_REPORT_FILE, METRICS_FILE, STATE_FILE)
_LOOK_EVERY_S = 0.1


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    name      of its folder
    options   of ``tli.train`` by their fields' names, those that are not as by default
    paths     options that say where its words lie, not what they are
    weight    about how long it takes, in the unit of the other cells
    """

    name: str
    options: dict
    paths: dict = dataclasses.field(default_factory=dict)
    weight: float = 1.0

    def flags(self) -> list[str]:
        """The options as ``tli.train``'s command line."""
        flags = []
        for name, value in (self.options | self.paths).items():
            flags += [flag(name)] if value is True else [] if value is False or value is None else [f"{flag(name)}={value}"]
        return flags

    def report(self, folder: pathlib.Path) -> dict | None:
        """What the complete cell in ``folder`` reports, None if it is not complete.

        Raises:
            TliError: the cell was run with other options.
        """
        file = folder / self.name / REPORT
        if not file.is_file():
            return None
        report = json.loads(file.read_text(encoding="utf-8"))
        done = report["config"]
        differing = [name for name, value in self.options.items() if done.get(name) != value]
        if differing:
            must = f"the cell must have been run with {differing[0]} {self.options[differing[0]]}"
            raise TliError(file, must, done.get(differing[0]), "name another folder with --output, or delete this cell")
        return report


def run_cells(cells: Iterable[Cell], folder: pathlib.Path, jobs: int, done: Callable[[Cell], None] = lambda cell: None) -> None:
    """Run the cells that are not complete in ``folder``, ``jobs`` at a time; those that another process is at work on are waited for.

    Args:
        cells:   in the order in which they are begun
        folder:  holds a folder per cell
        jobs:    processes at a time; each gets its share of the processors
        done:    called when a cell is complete, at once for one that was already

    Raises:
        TliError: a run that failed, with its own last line. The others are stopped and can go on later.
        KeyboardInterrupt: after a stop by Ctrl-C or a request to terminate, which the runs are told of and wait for.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    waiting = list(cells)
    running: dict[str, tuple[Cell, subprocess.Popen, Any]] = {}
    threads = max(1, cores() // jobs)
    # a cell is a run of one process, whatever shares the cells out
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "WORLD_SIZE": "1"}
    with stop_signals() as stop, contextlib.ExitStack() as locks:
        try:
            while waiting or running:
                for cell in list(waiting):
                    if cell.report(folder) is not None:
                        waiting.remove(cell)
                        done(cell)
                    elif len(running) < jobs and (lock := _lock(folder / f".{cell.name}.lock")) is not None:
                        # it may have been completed between the look and the lock
                        if cell.report(folder) is None:
                            running[cell.name] = (cell, _start(cell, folder, lock, environment), locks.enter_context(lock))
                            waiting.remove(cell)
                        else:
                            lock.close()
                for cell, process, lock in list(running.values()):
                    if process.poll() is not None:
                        del running[cell.name]
                        _finish(cell, folder, process.returncode)
                        lock.close()
                        done(cell)
                if stop.wait(_LOOK_EVERY_S if running else 10 * _LOOK_EVERY_S if waiting else 0):
                    raise KeyboardInterrupt
        finally:
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                process.wait()


def remove_cells(cells: Iterable[Cell], folder: pathlib.Path) -> None:
    """Delete these cells out of ``folder``, complete or begun, and the folder if nothing else is in it.

    Raises:
        TliError: a cell's folder holds what no run wrote, or is a link.
    """
    if not folder.is_dir() or folder.is_symlink():
        return
    cells = list(cells)
    own = [path for cell in cells for path in (folder / cell.name, _partial(cell, folder)) if path.is_dir()]
    # all of them before the first is gone
    for path in own:
        remove_unfinished(path)
        require_written(path, _RUN_FILES)
    with disk_errors(folder):
        for path in own:
            remove_written(path, _RUN_FILES)
        for cell in cells:
            for ending in ("lock", "log"):
                (folder / f".{cell.name}.{ending}").unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def claim_folder(folder: pathlib.Path, name: str, what: str, settings: dict[str, Any], overwrite: bool = False) -> None:
    """Make the folder of many runs, or find that they may go on in it. Of processes that come at once one makes it.

    Args:
        folder:     holds the cells and what is made of them
        name:       of the file in it that keeps the settings
        what:       the command, as ``study``
        settings:   plain JSON values, or parts of them by name: what must be the same for the runs to go on
        overwrite:  begin anew; the caller has deleted what was there

    Raises:
        TliError: the folder is another's, or the settings are not those that it was begun with.
    """
    file, anew = folder / name, f"name another folder with --output, or repeat the {what}'s own settings"
    with disk_errors(folder):
        # the lock, and what the settings are written to before they have their name, are another process's of the same command
        mine = (f".{what}.", f".{name}.")
        used = folder.exists() and (not folder.is_dir() or any(not path.name.startswith(mine) for path in folder.iterdir()))
        # looked for last: of all that is written it has its name first
        if used and not overwrite and not file.is_file():
            raise TliError("--output", f"the folder must be new, empty or a {what}'s", folder, "name another with --output")
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{what}.lock"):
            if not file.is_file():
                write_json(file, settings)
    try:
        kept = _flat(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise TliError(file, f"the file must be a {what}'s settings", "something else", "name another folder with --output") from error
    for key, value in _flat(settings).items():
        if kept.get(key) != value:
            raise TliError(f"{file}: {key}", f"a {what} must go on as it was begun, with {kept.get(key)}", value, anew)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """``{"pairs": {"name": 1}, "seed": 2}`` as ``{"pairs name": 1, "seed": 2}``."""
    flat: dict[str, Any] = {}
    for part, values in settings.items():
        flat |= {f"{part} {key}": value for key, value in values.items()} if isinstance(values, dict) else {part: values}
    return flat


def _partial(cell: Cell, folder: pathlib.Path) -> pathlib.Path:
    return folder / f".{cell.name}.partial"


def _lock(path: pathlib.Path):
    """The file, locked for this process and those that inherit it; None where another process holds it."""
    try:
        import fcntl
    except ModuleNotFoundError as error:
        raise TliError("grid", "this system must lock files that a process inherits", error, "run studies on Linux or a Mac") from error
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _start(cell: Cell, folder: pathlib.Path, lock, environment: dict) -> subprocess.Popen:
    partial = _partial(cell, folder)
    # what is there goes on; without a state to go on from, it is begun anew
    command = [sys.executable, "-m", "tli.train", *cell.flags(), f"--output={partial}", "--resume", "--overwrite"]
    if (partial / REPORT).is_file():
        # all was done but the renaming
        command = [sys.executable, "-c", ""]
    with (folder / f".{cell.name}.log").open("w") as log:
        # the run inherits the lock: should this process be killed, no other begins the cell while the run is still at it. Ctrl-C
        # goes to this process alone, which tells its runs
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()], start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip


_PR_SET_PDEATHSIG = 1
# loaded here: between fork and exec nothing should be
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """In a child of this process: have it asked to end when this process is killed. Elsewhere the next study waits for its lock."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _finish(cell: Cell, folder: pathlib.Path, code: int) -> None:
    """Give a complete cell its name, or raise with the last line that its run wrote."""
    partial, log = _partial(cell, folder), folder / f".{cell.name}.log"
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
        why = f"signal {-code}, as when memory runs out" if code < 0 else said
        raise TliError(f"cell {cell.name}", "its run must end well", why, f"mend that and run again; all it said is in {log}")
    # the run's last act, which a kill may have come before
    (partial / STATE_FILE).unlink(missing_ok=True)
    partial.rename(folder / cell.name)
    log.unlink()
    (folder / f".{cell.name}.lock").unlink()
