"""One language by many names."""

import pytest

from tli.data.formats.languages import is_column_name, same


@pytest.mark.parametrize("found", ["sw", "swa", "swh", "Swahili", "SW", "swahili", "Kiswahili", "sw-TZ", "swh_Latn"])
@pytest.mark.parametrize("asked", ["swahili", "sw", "swh", "SWA"])
def test_one_language_by_many_names(asked, found):
    assert same(asked, found)


@pytest.mark.parametrize(
    ("asked", "found"), [("swahili", "sv"), ("en", "enm"), ("pt-BR", "pt-PT"), ("english", "zz"), ("x", "y"), ("", "en")]
)
def test_languages_that_differ(asked, found):
    assert not same(asked, found)


def test_what_names_a_column():
    assert all(map(is_column_name, ["sw", "English", "word", "source word", "Deutsch", "Translation"]))
    assert not any(map(is_column_name, ["kitabu", "book", "bei", "and", "zz"]))
