"""Other people's text on a terminal: it is shown, and steers nothing."""

import io

import pytest

from tli.runtime.console import layer_bar, open_console
from tli.runtime.errors import TliError, printable, run_command

HOSTILE = ["\x1b[31mred", "\x1b]0;title\x07", "a\rb", "\x9b2J", "\u202egnp.exe", "\x00", "\x1b[2J\x1b[H"]
STEERS = ("\x1b", "\x07", "\x9b", "\u202e", "\x00", "\r")


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_nothing_of_a_name_steers_the_terminal(text, capsys):
    from rich.table import Table
    from rich.text import Text

    console = open_console(stderr=False)
    console.print(f"in {text}", soft_wrap=True)
    console.print(Text(text))
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console.print(table)
    with pytest.raises(SystemExit):
        run_command(lambda: _raise(text))
    said = "".join(capsys.readouterr())
    assert not [mark for mark in STEERS if mark in said]


def _raise(text: str) -> None:
    raise TliError(text, "it must hold", text, text)


def test_what_people_write_is_shown_as_it_is():
    # joiners and marks of direction belong to words; line breaks and tabs to text
    for text in ("maji\twater\n", "می\u200cخواهم", "क्\u200dष", "שלום\u200f", "[v2] [/x] :smile:", "ʻokina", "é", "日本"):
        assert printable(text) == text


def test_a_terminal_has_its_colours_and_bars():
    console = open_console()
    console.file, console._force_terminal = io.StringIO(), True
    console._color_system = console._color_system or 1
    console.print("bold", style="bold")
    with layer_bar(console, 2, "measuring \x1b]0;x\x07") as done:
        done()
    shown = console.file.getvalue()
    assert "\x1b[1mbold" in shown
    assert "\x1b]0" not in shown
    assert "1/2" in shown
