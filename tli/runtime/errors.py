"""The one form in which tli says that something is wrong, and how a command ends when it does, or is asked to."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator


class TliError(Exception):
    """``<where>: <what must hold>, got <value>; <what to do>``: an error that a user can cause and correct.

    Args:
        where: the module, file, file and line, or option that the error is about.
        must: what must hold, as a clause: ``rank must be at least 1``.
        got: what was found instead.
        remedy: what to do, as an imperative.

    Example:
        >>> from tli import TliError, read_pairs
        >>> try:
        ...     read_pairs("missing.tsv", "swahili", "english")
        ... except TliError as error:
        ...     print(str(error).partition(";")[0])
        missing.tsv: the path must be that of a readable file, got no such file or directory
    """

    def __init__(self, where: object, must: str, got: object, remedy: str):
        super().__init__(f"{where}: {must}, got {got}; {remedy}")


# what steers a terminal, and what turns the direction of all text behind it
_STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Other people's text as it may be shown: a file's or a column's name may hold what would steer a terminal, which becomes U+FFFD."""
    return _STEERS.sub("\ufffd", text)


# Windows knows no quota
_FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name))


def one_line(error: Exception) -> str:
    """What another library's error says, on one line, or its name where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def disk_errors(where: object):
    """Turn a full disk or a refused write below this block into a ``TliError`` that names ``where``."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise TliError(where, "the disk must have room for the output", "no space left", "free some space and run again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise TliError(where, "the output must be writable", (error.strerror or str(error)).lower(), "choose another folder") from error
        raise


# what asks a run to save what there is and end: Ctrl-C, a batch queue or a shutdown, a terminal that closes, a queue's warning
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
_HANGUP = getattr(signal, "SIGHUP", None)
_received: int = signal.SIGINT


@contextlib.contextmanager
def handle_stops(handle: Callable[[int, types.FrameType | None], None]) -> Iterator[None]:
    """Have ``handle`` called, as a signal's handler, for what asks a run to end, and remember which it was for the exit code.

    SIGHUP stays ignored where it is, as nohup wants it. Only the main thread may change handlers; elsewhere signals act as always.
    """

    def remember(number: int, frame: types.FrameType | None) -> None:
        global _received
        _received = number
        handle(number, frame)

    former = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.getsignal(number) for number in STOPPING}
        former = {number: handler for number, handler in former.items() if (number, handler) != (_HANGUP, signal.SIG_IGN)}
        for number in former:
            signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


def run_command(command: Callable[[], None]) -> None:
    """Run a command's body and leave with its exit code: 2 and one line for a ``TliError``, 141 for a closed pipe; 130 for Ctrl-C, 143, 129
    and 138 for SIGTERM, SIGHUP and SIGUSR1, each of which ends a run as Ctrl-C does.
    """
    try:
        with handle_stops(_interrupt):
            command()
    except TliError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        # the terminal may be gone
        with contextlib.suppress(OSError):
            print("stopped", file=sys.stderr)
        sys.exit(128 + _received)
    except BrokenPipeError:
        # who read the output has gone, as head does; nor is there anyone to flush the rest to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
