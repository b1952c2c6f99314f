"""Files that are whole or absent, and what a kill leaves of them."""

import pytest

from tli.runtime.files import atomic_write, remove_unfinished


def test_what_a_kill_left_unfinished_is_removed_and_nothing_else(tmp_path):
    names = ["adapter_model.safetensors", ".training_state.safetensors", "metrics.jsonl", "list", ".list"]
    unfinished = []
    for name in names:
        with atomic_write(tmp_path / name) as temporary:
            unfinished.append(temporary)
    for path in unfinished:
        assert not path.exists()
        # as it was when the kill came
        path.write_text("half")
    others = [".gitignore", ".paper.lock", ".study.json", ".seed0.partial.json", "report.json", ".a.abcdefgh.txt"]
    for name in others:
        (tmp_path / name).write_text("whole")
    (tmp_path / ".folder.abcdefgh").mkdir()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, *others, ".folder.abcdefgh"}


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        _written_half_way(tmp_path / "file")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def _written_half_way(path):
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("half way")
