"""Tables of text, on the console and as Markdown."""

from __future__ import annotations

import json
import os
import re
import typing

from tli.runtime.errors import printable
from tli.runtime.files import write_text

if typing.TYPE_CHECKING:
    import rich.console


# where HTML would begin
_HTML = re.compile(r"<(?=[a-zA-Z/!?])")


class Table(typing.NamedTuple):
    """A title, a head and rows of text; a row of one cell is a heading within the table."""

    title: str
    head: list[str]
    rows: list[list[str]]


def show(tables: list[Table], console: rich.console.Console) -> None:
    """Print the tables, each below its title; two spaces between their columns where all then fit the console, else one."""
    from rich.text import Text

    shown, unbounded = [_as_rich(table, padding=1) for table in tables], console.options.update(width=10_000)
    if any(console.measure(one, options=unbounded).maximum > console.width for one in shown):
        shown = [_as_rich(table, padding=0) for table in tables]
    for table, one in zip(tables, shown):
        # a table's own title would be as narrow as the table
        console.print(Text(table.title, style="italic"))
        console.print(one)
        console.print()


def _as_rich(table: Table, padding: int) -> rich.table.Table:
    """The table with ``padding`` spaces between columns beside the one that a border takes."""
    from rich import box
    from rich.table import Table as Shown
    from rich.text import Text

    shown = Shown(box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0), show_edge=False, pad_edge=False)
    for i, head in enumerate(table.head):
        shown.add_column(Text(head), justify="right" if i else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*map(Text, row), style="bold" if len(row) == 1 else "")
    return shown


def as_markdown(table: Table) -> str:
    """The table without its title; a line break in a cell becomes a space."""
    rows = [row + [""] * (len(table.head) - len(row)) for row in [table.head, *table.rows]]
    lines = ["| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|").strip() for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(table.head) - 1) + "|", *lines[1:]])


def write_markdown(path: str | os.PathLike, text: str) -> None:
    """Write a page, completely or not at all; what other people's names hold is text in it, not HTML, and steers no terminal."""
    # code stands as it is, between fences
    parts = [part if i % 2 else _HTML.sub("&lt;", part) for i, part in enumerate(printable(text).split("```"))]
    write_text(path, "```".join(parts))


def to_repeat(facts: dict, *said: str) -> str:
    """The last section of a report: what a repetition needs, as JSON, after what is ``said`` of it."""
    block = "```json\n" + json.dumps(facts, indent=1, allow_nan=False) + "\n```"
    return "\n\n".join(["## To repeat it", *said, block]) + "\n"


def once(rows: list[list[str]]) -> list[list[str]]:
    """The rows with their first cell empty where it repeats the one above; a heading stays."""
    return [row if i == 0 or len(row) == 1 or row[0] != rows[i - 1][0] else ["", *row[1:]] for i, row in enumerate(rows)]
