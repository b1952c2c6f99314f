"""Files that are complete or absent, the cache folder, and hashes."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

# one folder for tli and its kernels
from tli_kernels.cache_folder import cache_folder  # noqa: F401

from tli.runtime.errors import TliError, disk_errors

# "schema" in every report and --json output: raised when a key goes or changes its meaning
SCHEMA = 1
# mkstemp's names in ``atomic_write``: the name of what is written, eight characters, its suffix again
_UNFINISHED = re.compile(r"\.(.+)\.[a-z0-9_]{8}(\.\w+)?")
_HASH_CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block ends well, else delete it.

    A kill at any moment leaves the old file or the new one, never a part. A full disk becomes a ``TliError``.
    """
    path = pathlib.Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = pathlib.Path(name)
        try:
            yield temporary
            # mkstemp makes the file private; a result is as readable as any other file of the user's
            temporary.chmod(0o666 & ~_umask())
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Delete what ``atomic_write`` was writing into the folder when its process was killed; no other may be at work there."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        written = _UNFINISHED.fullmatch(path.name)
        if written and path.is_file() and pathlib.Path(written[1]).suffix == (written[2] or ""):
            path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, completely or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, facts: dict[str, Any]) -> None:
    """Write ``facts``, plain JSON values without a NaN, to ``path``, completely or not at all."""
    write_text(path, json.dumps(facts, indent=1, allow_nan=False) + "\n")


def sha256(path: str | os.PathLike) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def prepare_output_dir(folder: pathlib.Path, overwrite: bool) -> None:
    """Make ``folder`` for a run's output; one that holds something already is refused unless ``overwrite`` is set.

    Nothing in it is deleted: a run with ``overwrite`` replaces file by file as its own results come to be.
    """
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise TliError("--output", "the output must be a folder", f"the file {folder}", "name another")
        if not overwrite and folder.is_dir() and any(folder.iterdir()):
            raise TliError("--output", "the output folder must be new or empty", folder, "add --overwrite or name another with --output")
        folder.mkdir(parents=True, exist_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
