"""Files that are whole or absent, and what a kill leaves of them."""

import contextlib

import pytest

from tli.runtime.errors import TliError
from tli.runtime.files import (
    atomic_folder,
    atomic_write,
    complete,
    next_result,
    remove_unfinished,
    remove_written,
    take_place,
    write_manifest,
)


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


@pytest.mark.parametrize("renames", range(4))
def test_a_kill_between_the_renames_of_one_result_into_anothers_place_is_made_up_for(tmp_path, monkeypatch, renames):
    for name in ("adapter", "report", "only of the first", "mine.txt"):
        (tmp_path / name).write_text("first")
    place = next_result(tmp_path, anew=True)
    for name in ("adapter", "report", "only of the second"):
        (place / name).write_text("second")
    # not complete: nothing gives way
    take_place(tmp_path)
    assert (tmp_path / "adapter").read_text() == "first"
    complete(place, ["adapter", "report", "only of the first"])
    done, replace = 0, type(tmp_path).replace

    def killed(path, target):
        nonlocal done
        if done == renames:
            raise KeyboardInterrupt
        done += 1
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "replace", killed)
        with contextlib.suppress(KeyboardInterrupt):
            take_place(tmp_path)
    assert next_result(tmp_path, anew=False) == (place if renames < 3 else None)
    take_place(tmp_path)
    there = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert there == {"adapter": "second", "report": "second", "only of the second": "second", "mine.txt": "first"}


def test_no_link_is_followed_to_where_a_result_comes_to_be(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".next-by-tli").symlink_to(foreign)
    with pytest.raises(TliError, match="what is deleted must have been written by tli, got a link"):
        next_result(out, anew=True)
    take_place(out)
    assert (foreign / "thesis.tex").read_text() == "precious"
