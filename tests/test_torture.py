"""A share of ``python -m tests.torture``: mutated files to every reader, a training killed and resumed."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests import torture

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("only", "minutes"), [(" ", 0.8), ("kills", 0.2)], ids=["files", "kills"])
def test_nothing_is_a_traceback_and_nothing_is_lost(tmp_path, only, minutes):
    flags = [f"--minutes={minutes}", "--seed=11", f"--keep={tmp_path}", "--only", only]
    environment = {**os.environ, "TLI_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 with other bytes" in done.stdout or " files " in done.stdout


def test_a_fault_is_found_and_kept(tmp_path, monkeypatch):
    """A reader that raises something else, one that is slow, and one that says more than a line."""
    from tli.runtime.errors import TliError

    def raises(folder):
        raise KeyError("x")

    def goes_on(folder):
        while True:
            pass

    def says_two_lines(folder):
        raise TliError("a\nb", "c", "d", "e")

    monkeypatch.setattr(torture, "_MOST_S", 0.2)
    for read, said in ((raises, "KeyError"), (goes_on, "more than"), (says_two_lines, "a\nb: c")):
        result, told, _ = torture.try_one(torture.Reader("one", "file", read), tmp_path)
        assert (result, said in told) == ("fault", True)
    assert torture.try_one(torture.Reader("one", "file", lambda folder: None), tmp_path)[0] == "taken"
