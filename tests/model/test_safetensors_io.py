"""Of a mapped file the kernel reads what was announced, and nothing around it."""

import mmap

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench import start
from tli.model.safetensors_io import advise_random_access, read_tensor
from tli.runtime.errors import TliError

ROWS, WIDTH = 4096, 4096


@pytest.fixture
def mapped(tmp_path) -> torch.Tensor:
    """A table of 64 MB in a file, of which nothing is in memory: row r begins with r."""
    path = tmp_path / "model.safetensors"
    table = np.zeros((ROWS, WIDTH), np.float32)
    table[:, 0] = np.arange(ROWS)
    table.tofile(path)
    try:
        start.forget(tmp_path)
    except TliError:
        pytest.skip("this file system keeps its pages, as one in memory does")
    return torch.from_numpy(np.memmap(path, np.float32, mode="c", shape=(ROWS, WIDTH)))


@pytest.mark.parametrize("rows", [[0], [5, 6, 7], [3, 700, 2900, ROWS - 1], list(range(0, ROWS, 64))])
def test_only_the_announced_rows_are_read(mapped, rows, tmp_path):
    advise_random_access(mapped, torch.tensor(rows))
    assert mapped[torch.tensor(rows)][:, 0].tolist() == rows
    assert start.cached(tmp_path) == len(rows) * WIDTH * 4


def test_rows_that_share_pages_and_none_at_all(mapped, tmp_path):
    narrow = mapped.view(-1, 16)
    advise_random_access(narrow, torch.tensor([1, 2]))
    assert narrow[torch.tensor([1, 2])].sum() == 0
    assert start.cached(tmp_path) == mmap.PAGESIZE
    advise_random_access(narrow[:0])


def test_a_small_tensor_is_read_alone_and_is_the_files_own(tmp_path):
    tensors = {"a": torch.randn(3, 5, dtype=torch.bfloat16), "b": torch.arange(4), "c": torch.randn(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(read_tensor(tmp_path / "model.safetensors", "a"), tensors["a"])
    assert torch.equal(read_tensor(tmp_path / "model.safetensors", "c"), tensors["c"])
    for name, got in (("b", "I64"), ("d", "none")):
        with pytest.raises(ValueError, match=f"^{got}$"):
            read_tensor(tmp_path / "model.safetensors", name)
