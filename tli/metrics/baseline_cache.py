"""The ranks that baselines gave, kept between runs: cells of a study that share words, split and frozen model compute them once.

An entry is named by a hash of all that it was computed from, word states and this code included, so it is never stale; a file that cannot
be read or written is as if it were not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tli.metrics import baselines, candidates
from tli.metrics.candidates import Ranks
from tli.metrics.retrieval import Retrieval
from tli.model import linear_map
from tli.runtime.errors import TliError
from tli.runtime.files import atomic_write, cache_folder

# of fewer words they are computed in no time
_LEAST_PAIRS = 500
_LIBRARIES = ("numpy", "scipy", "scikit-learn", "rapidfuzz")

Found = Mapping[str, Mapping[str, Ranks]]


def cached(pairs: int, parts: Iterable[bytes], compute: Callable[[], Found]) -> Found:
    """What ``compute`` returns, by way and set of candidates; from the cache where the same ``parts`` were computed from before.

    pairs   how many words' ranks these are
    parts   all that the ranks depend on beside the code and its libraries
    """
    if pairs < _LEAST_PAIRS:
        return compute()
    file = cache_folder() / "baselines" / f"{_name(parts)}.npz"
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return _read(file)
    found = compute()
    with contextlib.suppress(TliError, OSError), atomic_write(file) as temporary:
        _write(temporary, found)
    return found


def _name(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    code = "".join(map(inspect.getsource, (baselines, candidates, linear_map)))
    libraries = [importlib.metadata.version(name) for name in _LIBRARIES]
    for part in (code.encode(), repr(libraries).encode(), *parts):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _write(file: pathlib.Path, found: Found) -> None:
    arrays: dict[str, Any] = {}
    for way, by_set in found.items():
        for candidate_set, ranks in by_set.items():
            arrays[f"{way}/{candidate_set}/pairs"] = ranks.pairs
            for direction in ("forward", "backward"):
                retrieval = getattr(ranks, direction)
                arrays |= {f"{way}/{candidate_set}/{direction}/{f.name}": getattr(retrieval, f.name) for f in dataclasses.fields(retrieval)}
    with file.open("wb") as opened:
        np.savez_compressed(opened, **arrays)


def _read(file: pathlib.Path) -> Found:
    found: dict[str, dict[str, Ranks]] = {}
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        for way, candidate_set, *rest in (name.split("/") for name in arrays.files):
            if rest == ["pairs"]:
                start = f"{way}/{candidate_set}"
                ways = [
                    Retrieval(**{f.name: arrays[f"{start}/{direction}/{f.name}"] for f in dataclasses.fields(Retrieval)})
                    for direction in ("forward", "backward")
                ]
                found.setdefault(way, {})[candidate_set] = Ranks(arrays[f"{start}/pairs"], *ways)
    return found
