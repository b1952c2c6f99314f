"""Tensors of a mapped file: have the kernel read what is wanted and nothing around it.

Where a page of a mapped file is missing, the kernel reads ahead, some megabytes on some machines, since most who want a page want the
next ones, too. For a few rows spread over an embedding table that comes to most of the table.
"""

import ctypes
import mmap
import os

from torch import Tensor

_RANDOM, _WILLNEED = (getattr(mmap, name, None) for name in ("MADV_RANDOM", "MADV_WILLNEED"))


def read_no_more(tensor: Tensor, rows: Tensor | None = None) -> None:
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

    advise(tensor.data_ptr(), tensor.nbytes, _RANDOM)
    row_bytes = tensor.nbytes // tensor.shape[0]
    for row in range(tensor.shape[0]) if rows is None else rows.tolist():
        # one by one: of a longer stretch the kernel reads only the beginning
        advise(tensor.data_ptr() + row * row_bytes, row_bytes, _WILLNEED)
