"""Files that are complete or absent, the cache folder, and hashes."""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

# one folder for tli and its kernels
from tli_kernels.cache_folder import cache_folder  # noqa: F401

from tli.runtime.errors import TliError, disk_errors

# "schema" in every report and --json output: raised when a key goes or changes its meaning
SCHEMA = 1
# mkstemp's names in ``atomic_write``: the name of what is written, eight characters, its suffix again
_UNFINISHED = re.compile(r"\.(.+)\.[a-z0-9_]{8}(\.\w+)?")
_HASH_CHUNK_BYTES = 1 << 20
# ends the name of a folder that is being built, and what in it says that this program builds it, and whether it still does
_BUILDING, _BUILDER = ".building", ".tli-building.lock"
# the names of all files that this program wrote into a folder
_MANIFEST = ".written-by-tli.json"
# in a folder with an earlier result, where the next one comes to be; and what says there that it is complete
_NEXT, _COMPLETE = ".next-by-tli", ".complete"


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


@contextlib.contextmanager
def atomic_folder(folder: pathlib.Path, where: str) -> Iterator[pathlib.Path]:
    """Yield a folder that takes the place of ``folder``, which is absent or empty, if the block ends well, and is gone if it does not.

    It lies in a new folder beside ``folder``, of a name that nobody can foretell, which has room for what is made on the way; no link is
    followed. What a killed process left of its own is deleted first.

    Args:
        folder:  to be made
        where:   the option that named it, for the error

    Raises:
        TliError: another process is building the same folder.
    """
    import filelock

    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*{_BUILDING}"):
            if left.is_symlink() or not (left / _BUILDER).is_file():
                continue
            try:
                with filelock.FileLock(left / _BUILDER, blocking=False):
                    shutil.rmtree(left, ignore_errors=True)
            except filelock.Timeout as error:
                must = "one process at a time may write to it"
                raise TliError(where, must, "another that is running", "wait, or name another") from error
        building = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=_BUILDING, dir=folder.parent))
        with filelock.FileLock(building / _BUILDER):
            try:
                result = building / "result"
                result.mkdir()
                yield result
                result.replace(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)


def write_manifest(folder: pathlib.Path) -> None:
    """Note in ``folder`` what is in it, so that ``remove_written`` may delete it again."""
    write_json(folder / _MANIFEST, {"files": sorted(path.name for path in folder.iterdir())})


def require_written(folder: pathlib.Path, names: Iterable[str] | None = None) -> set[str]:
    """The names of the files in ``folder``, if it holds none but these, None: those of its manifest.

    Raises:
        TliError: it is a link, has no manifest, or holds what this program did not write.
    """
    if names is None:
        try:
            names = [_MANIFEST, *json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            names = []
    with disk_errors(folder):
        there = {path.name: path.is_dir() and not path.is_symlink() for path in folder.iterdir()}
    others = [folder.name] if folder.is_symlink() else sorted(name for name, is_folder in there.items() if is_folder or name not in names)
    if others:
        must = "what is deleted must have been written by tli"
        raise TliError(folder, must, ", ".join(others), "move it elsewhere, or name another folder with --output")
    return set(there)


def remove_written(folder: pathlib.Path, names: Iterable[str] | None = None) -> None:
    """Delete ``folder`` with its files, which must be as for ``require_written``: nothing else is ever deleted, and no link followed."""
    with disk_errors(folder):
        for name in require_written(folder, names):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def next_result(folder: pathlib.Path, anew: bool) -> pathlib.Path | None:
    """The folder inside ``folder`` in which the result comes to be that takes the place of an earlier one; made if ``anew``, else None
    where there is none.

    Raises:
        TliError: a link in its place.
    """
    place = folder / _NEXT
    with disk_errors(folder):
        if place.is_symlink():
            raise TliError(place, "what is deleted must have been written by tli", "a link", "move it elsewhere")
        if anew:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
    return place if place.is_dir() else None


def take_place(folder: pathlib.Path) -> None:
    """Put a complete ``next_result`` where the earlier one is; nothing happens where none is, or none is complete.

    Two results are never mixed for longer than a few renames, and if a kill comes between these, the next call makes up for it.
    """
    place = folder / _NEXT
    if place.is_symlink() or not (place / _COMPLETE).is_file():
        return
    with disk_errors(folder):
        for name in json.loads((place / _COMPLETE).read_text(encoding="utf-8")):
            (folder / name).unlink(missing_ok=True)
        for path in sorted(place.iterdir()):
            if path.name != _COMPLETE:
                path.replace(folder / path.name)
        shutil.rmtree(place)


def complete(place: pathlib.Path, outdated: Iterable[str]) -> None:
    """Say of a ``next_result`` that it is complete, and which files of an earlier one go, if it has none of the same name."""
    # now, as afterwards some may have taken their places
    write_text(place / _COMPLETE, json.dumps(sorted(set(outdated) - {path.name for path in place.iterdir()})))


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


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path) -> Iterator[None]:
    """Make ``folder`` if it is not there, and keep other processes that ask for it out of it while the context is open.

    The lock is on the folder itself, leaves no file, and dies with its process. Where a system locks no folders there is none.

    Raises:
        TliError: another process has it, or it is no folder.
    """
    with contextlib.ExitStack() as held:
        with disk_errors(folder), contextlib.suppress(ModuleNotFoundError):
            _require_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            held.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                must = "one run at a time may write to the folder"
                raise TliError("--output", must, f"another that is writing to {folder}", "wait, or name another folder") from error
        yield


def prepare_output_dir(folder: pathlib.Path, overwrite: bool) -> None:
    """Make ``folder`` for a run's output; one that holds something already is refused unless ``overwrite`` is set.

    Nothing in it is deleted: a run with ``overwrite`` replaces file by file as its own results come to be.
    """
    with disk_errors(folder):
        _require_folder(folder)
        if not overwrite and folder.is_dir() and any(folder.iterdir()):
            raise TliError("--output", "the output folder must be new or empty", folder, "add --overwrite or name another with --output")
        folder.mkdir(parents=True, exist_ok=True)


def _require_folder(folder: pathlib.Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise TliError("--output", "the output must be a folder", f"the file {folder}", "name another")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
