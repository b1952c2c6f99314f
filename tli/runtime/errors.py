"""The one form in which tli says that something is wrong, and how a command ends when it does."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable


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


def run_command(command: Callable[[], None]) -> None:
    """Run a command's body and leave with its exit code: 2 and one line for a ``TliError``, 130 for Ctrl-C, 141 for a closed pipe."""
    try:
        command()
    except TliError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # who read the output has gone, as head does; nor is there anyone to flush the rest to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
