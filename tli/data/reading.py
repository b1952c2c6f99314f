"""What was understood of a word list, and whatever was changed or left out, counted: what a command says once, and ``show`` in full."""

import dataclasses


@dataclasses.dataclass
class Tally:
    """How often something happened, and where it happened first."""

    count: int
    example: str
    line: int

    def __str__(self) -> str:
        return f"{self.count:,}, {'such as ' if self.count > 1 else ''}{self.example} (line {self.line})"


@dataclasses.dataclass
class Reading:
    """How a word list was read.

    name      the file, as it was given
    format    what it is: "tab-separated table"
    encoding  of its text; empty for a format that says its own
    columns   what was taken as source and target, and the optional columns
    rows      rows or entries that held something
    pairs     pairs that came of them
    merged    rows that went into the pair of an earlier one
    remarks   what was concluded about the whole list, as sentences
    changed   what was done to words, and how often
    dropped   why rows were left out, and how often
    file      the file's name and SHA-256, of the very bytes that were read: what a report says of the list
    """

    name: str
    format: str = ""
    encoding: str = ""
    columns: tuple[str, ...] = ()
    rows: int = 0
    pairs: int = 0
    merged: int = 0
    remarks: list[str] = dataclasses.field(default_factory=list)
    changed: dict[str, Tally] = dataclasses.field(default_factory=dict)
    dropped: dict[str, Tally] = dataclasses.field(default_factory=dict)
    file: dict[str, str] = dataclasses.field(default_factory=dict)

    def change(self, what: str, line: int, example: object) -> None:
        """Count something that was done to a word."""
        _count(self.changed, what, line, example)

    def drop(self, why: str, line: int, example: object) -> None:
        """Count a row that is left out."""
        _count(self.dropped, why, line, example)

    def notes(self) -> list[str]:
        """All that a user should know, one sentence each; none for a list that was taken as it stands."""
        changed = [f"{what}: {tally}" for what, tally in self.changed.items()]
        dropped = [f"left out, {why}: {tally}" for why, tally in self.dropped.items()]
        # an example may hold line breaks, and characters that steer a terminal
        notes = [*self.remarks, *changed, *dropped]
        return [" ".join("".join(letter if letter.isprintable() else " " for letter in note).split()) for note in notes]


def _count(tallies: dict[str, Tally], what: str, line: int, example: object) -> None:
    if what in tallies:
        tallies[what].count += 1
    else:
        tallies[what] = Tally(1, str(example)[:80], line)
