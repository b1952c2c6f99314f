"""Files that are whole or absent, and what a kill leaves of them."""

import pytest

from tli.runtime.errors import TliError
from tli.runtime.files import atomic_folder, atomic_write, remove_unfinished, remove_written, write_manifest


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


def test_a_folder_is_built_whole_or_not_at_all(tmp_path):
    with atomic_folder(tmp_path / "out", "OUTPUT") as folder:
        (folder / "one.txt").write_text("1")
        assert not (tmp_path / "out").exists()
        with pytest.raises(TliError, match="^OUTPUT: one process at a time may write to it"), atomic_folder(tmp_path / "out", "OUTPUT"):
            pass
    assert (tmp_path / "out" / "one.txt").read_text() == "1"
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "other", "OUTPUT"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_this_program_did_not_write_is_not_deleted(tmp_path):
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    with pytest.raises(TliError, match="what is deleted must have been written by tli, got a.txt; "):
        remove_written(folder)
    write_manifest(folder)
    (folder / "mine.txt").write_text("mine")
    for names in (None, ["a.txt"]):
        with pytest.raises(TliError, match="mine.txt; move it elsewhere"):
            remove_written(folder, names)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(TliError, match="got link; "):
        remove_written(tmp_path / "link")
    assert {path.name for path in folder.iterdir()} >= {"a.txt", "mine.txt"}
    (folder / "mine.txt").unlink()
    # a folder of a file's name is nobody's
    (folder / "a.txt").unlink()
    (folder / "a.txt").mkdir()
    with pytest.raises(TliError, match="got a.txt"):
        remove_written(folder)
    (folder / "a.txt").rmdir()
    remove_written(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
