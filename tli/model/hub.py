"""What tli asks of a hub beside whole files: whether it is there, and one tensor out of a file.

An 8B model's final norm is 8 KB in a shard of gigabytes, and three requests for ranges of bytes fetch it alone.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
import socket
import typing
import urllib.parse
import urllib.request

from tli.runtime.errors import TliError, one_line
from tli.runtime.files import atomic_write, cache_folder

if typing.TYPE_CHECKING:
    from torch import Tensor

_TIMEOUT_S = 30.0
_LOOK_S = 3.0


@functools.cache
def go_offline_if_unreachable() -> None:
    """Set ``HF_HUB_OFFLINE`` where the hub does not answer at once: huggingface_hub would try each file for half a minute first."""
    from huggingface_hub import constants

    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies().get(hub.scheme):
        # what lies behind a proxy only the proxy knows
        return
    try:
        socket.create_connection((hub.hostname, hub.port or {"http": 80}.get(hub.scheme, 443)), timeout=_LOOK_S).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def cached(name: str, file: str) -> pathlib.Path | None:
    """The local path of a file of this repository that is on disk already, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return pathlib.Path(found) if isinstance(found, str) else None


@functools.cache
def download(name: str, file: str, optional: bool = False) -> pathlib.Path | None:
    """The local path of one file of the repository ``name``, fetched where it is not in the cache; None for an ``optional`` one it lacks.

    Raises:
        TliError: no connection, no such repository, or no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    go_offline_if_unreachable()
    try:
        return pathlib.Path(hf_hub_download(name, file))
    except EntryNotFoundError as error:
        # also what a machine without a connection says of a file that it never fetched
        if optional:
            return None
        if isinstance(error, LocalEntryNotFoundError):
            raise TliError(
                "--model", "the model must be in reach", f"no folder {name} and no hub connection", "check the path or the network"
            ) from error
        remedy = f"choose a repository with safetensors; of another, hf download {name} --local-dir FOLDER, and name that folder"
        raise TliError(name, f"the repository must hold {file}", "none", remedy) from error
    except Exception as error:
        raise TliError(
            "--model", "the model must be a folder or a hub name in reach", one_line(error), "check the name and the network"
        ) from error


def fetch_tensor(repository: str, revision: str, file: str, name: str) -> Tensor:
    """The tensor ``name`` of a safetensors file on the hub, by three requests for ranges of its bytes; kept in the cache folder.

    Args:
        repository: ``owner/name``
        revision:   the commit; what is cached is of that commit
        file:       the file within the repository
        name:       the tensor's name in the file

    Raises:
        TliError: no connection, a server that sends no ranges, or a file without this tensor.
    """
    from safetensors.torch import load, save

    from tli.model.safetensors_io import parse_tensor

    # a tensor's name is whatever the repository says, and must be no path
    kept = (
        cache_folder()
        / "tensors"
        / repository.replace("/", "--")
        / revision
        / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
    )
    if kept.is_file():
        return load(kept.read_bytes())[name]
    try:
        tensor = parse_tensor(functools.partial(_fetch_range, repository, revision, file), name)
    except ValueError as error:
        must = f"the file must hold {name} as floating-point numbers"
        raise TliError(f"{repository}/{file}", must, error, "choose another model") from error
    with atomic_write(kept) as temporary:
        pathlib.Path(temporary).write_bytes(save({name: tensor}))
    return tensor


def _fetch_range(repository: str, revision: str, file: str, start: int, end: int) -> bytes:
    """Bytes start .. end - 1 of a file on the hub."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    remedy = "connect to the hub, or take another --token-norm"
    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
    try:
        url = hf_hub_url(repository, file, revision=revision)
        reply = get_session().get(url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S)
    except Exception as error:
        raise TliError(f"{repository}/{file}", "the final norm must be in reach", one_line(error), remedy) from error
    if reply.status_code != 206 or len(reply.content) != end - start:
        got = f"status {reply.status_code} and {len(reply.content)} bytes"
        raise TliError(f"{repository}/{file}", f"the hub must send the {end - start} bytes that were asked for", got, remedy)
    return reply.content
