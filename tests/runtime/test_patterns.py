"""Regular expressions of users and of other people's files."""

import contextlib
import time

import pytest

from tli.runtime.errors import TliError
from tli.runtime.patterns import Pattern, pattern

PATH = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize("text", [r".*\.q_proj", r"layers\.[0-3]\.(self_attn|mlp)\.\w+", r"(?:.*\.)?(q|v)_proj"])
def test_it_matches_as_pythons_own(text):
    import re

    for path in (PATH, "layers.7.mlp.up_proj", "q_proj", ""):
        assert pattern(text, "--targets").fullmatch(path) == (re.fullmatch(text, path) is not None)


@pytest.mark.parametrize("text", ["(a+)+$", "(a|a)*b", "(a|aa)+b", r"(\w+\.?)+x", r"(.*)*\1x", r"(?:(?:a*)*)*b", r"(a?){60}a{60}"])
def test_none_goes_on_for_ever(text):
    began = time.monotonic()
    for path in ("a" * 58 + "!", PATH * 4):
        with contextlib.suppress(TliError):
            assert pattern(text, "--targets").fullmatch(path) is False
    assert time.monotonic() - began < 30


def test_one_that_takes_too_long_and_one_that_is_none_are_one_line_each(monkeypatch):
    slow = Pattern("(a+)+$", "adapter_config.json")

    class Slow:
        def fullmatch(self, text, timeout):
            raise TimeoutError

    monkeypatch.setattr(slow, "_compiled", Slow())
    with pytest.raises(
        TliError, match=r"^adapter_config.json: a regular expression must be matched within a second, got \(a\+\)\+\$; write it"
    ):
        slow.fullmatch(PATH)
    for text in ("(", "[", "a{2,1}", "*" * 3, "(" * 5000):
        with pytest.raises(TliError, match="^--targets: the text must be a regular expression, got "):
            Pattern(text, "--targets")
