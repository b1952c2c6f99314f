"""Of a mapped file the kernel reads what was announced, and nothing around it."""

import json
import mmap
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench import start
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder
from tli.model.safetensors_io import advise_random_access, read_tensor
from tli.runtime.device import resolve_device
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


def header(entry, length: int | None = None) -> bytes:
    text = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 269060552\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "that is no safetensors|Expecting value"),
        (b"\x05\0\0", "Expecting value"),
        (POINTER, "a header of"),
        (b"<!DOCTYPE html><html>not found</html>", "a header of"),
        (header([GOOD]), "a header that is no safetensors'"),
        (header({"a": 3}), "a header that is no safetensors'"),
        (header({"a": {"shape": [2], "data_offsets": [0, 8]}}), "a header that is no safetensors'"),
        (header({"a": {**GOOD, "shape": "two"}}), "a header that is no safetensors'"),
        (header({"a": {**GOOD, "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}), "0 of its 4000000000000 bytes"),
        (header({"a": {**GOOD, "data_offsets": [-8, 0]}}), "8 bytes of a tensor of 2"),
        (header({"a": {**GOOD, "data_offsets": [0]}}), "not enough values"),
        (header({"a": GOOD}), "0 of its 8 bytes"),
        (header({"a": GOOD}, 10**7), "0 of its 8 bytes"),
        (header(b"[" * 100_000), "a header that is no safetensors'"),
    ],
)
def test_what_is_no_safetensors_file_is_said_and_nothing_is_taken_for_a_tensor(tmp_path, content, said):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_tensor(tmp_path / "model.safetensors", "a")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "got a Git LFS pointer, which stands for the weights; run git lfs pull in the repository, or download the file"),
        (b"\n<!doctype HTML>\n<html>", "got a web page; download the file itself, not the page about it"),
        (b"", "got an empty file; download it again"),
        (b"\xff" * 99, "the file must be whole safetensors, got .*; download it again"),
    ],
    ids=["pointer", "page", "empty", "noise"],
)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_what_stands_where_weights_should_be_is_named(make_model, tmp_path, content, said, shards):
    folder = shutil.copytree(make_model("llama", shards=shards), tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.write_bytes(content)
    with pytest.raises(TliError, match=said):
        load_truncated_decoder(open_checkpoint(str(folder)), 1, None, resolve_device("cpu", "float32"))


def test_an_index_that_leads_out_of_its_folder_is_refused(make_model, tmp_path):
    folder = shutil.copytree(make_model("llama", shards=True), tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    for stray in ("../secret.safetensors", "/etc/secret.safetensors", "deeper/model.safetensors"):
        told["weight_map"][next(iter(told["weight_map"]))] = stray
        index.write_text(json.dumps(told))
        with pytest.raises(TliError, match=f"every file of the index must lie beside it, got '{stray}'"):
            open_checkpoint(str(folder))
