"""Read single rows or tensors of a memory-mapped safetensors file without the kernel's read-ahead (``madvise``).

Where a page of a mapped file is missing, the kernel reads ahead, some megabytes on some machines, since most who want a page want the
next ones, too. For a few rows spread over an embedding table that comes to most of the table; for one small tensor it is all in vain.
"""

import ctypes
import json
import mmap
import os
import pathlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# bytes; the format's own limit
_LONGEST_HEADER = 100_000_000

_RANDOM, _WILLNEED = (getattr(mmap, name, None) for name in ("MADV_RANDOM", "MADV_WILLNEED"))


def advise_random_access(tensor: Tensor, rows: Tensor | None = None) -> None:
    """Announce that of a mapped tensor these rows will be read, or all of it, and nothing else; no more than advice.

    Args:
        tensor:  a contiguous view of a mapped file
        rows:    int64 [V], rows of its first dimension; None is all
    """
    if os.name != "posix" or _RANDOM is None or tensor.numel() == 0:
        return
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def advise(begin: int, size: int, advice: int) -> None:
        # the kernel takes whole pages
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        libc.madvise(page, begin + size - page, advice)

    # a system has both or neither
    assert _WILLNEED is not None
    advise(tensor.data_ptr(), tensor.nbytes, _RANDOM)
    row_bytes = tensor.nbytes // tensor.shape[0]
    numbers: Iterable[int] = range(tensor.shape[0]) if rows is None else rows.tolist()
    for row in numbers:
        # one by one: of a longer stretch the kernel reads only the beginning
        advise(tensor.data_ptr() + row * row_bytes, row_bytes, _WILLNEED)


def parse_tensor(fetch: Callable[[int, int], bytes], name: str) -> Tensor:
    """The tensor ``name`` of a safetensors file of which ``fetch(start, end)`` gives the bytes start .. end - 1, three times.

    Raises:
        ValueError: the file has no such tensor of floating-point numbers, or is no safetensors; it says what was there instead.
    """
    length = int.from_bytes(fetch(0, 8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    try:
        entry = json.loads(fetch(8, 8 + length)).get(name)
        if entry is None or entry["dtype"] not in _DTYPES:
            raise ValueError("none" if entry is None else entry["dtype"])
        dtype, shape = _DTYPES[entry["dtype"]], torch.Size(entry["shape"])
        start, end = map(int, entry["data_offsets"])
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("a header that is no safetensors'") from error
    # what is not there is not asked for
    if start < 0 or end - start != shape.numel() * dtype.itemsize:
        raise ValueError(f"{end - start} bytes of a tensor of {shape.numel()} numbers")
    data = bytearray(fetch(8 + length + start, 8 + length + end))
    if len(data) != end - start:
        raise ValueError(f"{len(data)} of its {end - start} bytes")
    return torch.frombuffer(data, dtype=dtype).view(shape)


def describe(path: pathlib.Path) -> tuple[str, str] | None:
    """What a file is that stands where weights should be, and what to do; None where that cannot be seen."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, which stands for the weights", "run git lfs pull in the repository, or download the file"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page", "download the file itself, not the page about it"
    return None if head else ("an empty file", "download it again")


def read_tensor(path: pathlib.Path, name: str) -> Tensor:
    """One small tensor of a file on disk, without a page around it; raises as ``parse_tensor``."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

        size = os.fstat(file.fileno()).st_size

        def fetch(start: int, end: int) -> bytes:
            file.seek(start)
            # memory is taken for what is there, not for what is said to be
            return file.read(max(0, min(end, size) - start))

        return parse_tensor(fetch, name)
