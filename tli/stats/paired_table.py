"""A table of per-pair values, before and after, from any source: reading it, and the statistics of it alone.

CSV or TSV, UTF-8 with or without a byte order mark; commas, semicolons or tabs, whichever the header has most of. Between semicolons and
tabs numbers may have decimal commas. Rows in which a value is missing are left out, and counted; everything else that is not a number is
an error with its line. Nothing here imports torch.
"""

import csv
import dataclasses
import io
import itertools
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from tli.runtime.errors import TliError
from tli.runtime.files import sha256
from tli.stats.bootstrap import sample_std
from tli.stats.tests import P_VALUES, add_holm, compare_groups, compare_paired, paired_differences

# what R, pandas, SQL and people write where there is no value
_MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "nil", "missing", "-", "--", "\u2013", "\u2014", ".", "?", "#null!"}


@dataclasses.dataclass(frozen=True)
class PairedTable:
    """The rows of a table that have both values.

    before, after  float64 [n]
    group          [n] the group's name of each row, or None without groups
    cluster        [n] what each row is drawn together by, or None: each alone
    left_out       lines of the rows without a value
    """

    before: np.ndarray
    after: np.ndarray
    group: np.ndarray | None
    cluster: np.ndarray | None
    left_out: list[int]


def read_table(path: str | os.PathLike, before: str, after: str, group: str | None = None, cluster: str | None = None) -> PairedTable:
    """The columns of these names.

    Raises:
        TliError: with the file and the line of what is wrong.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TliError(f"{path}:{line}", "the file must be UTF-8", f"byte 0x{error.object[error.start]:02x}", "save it as UTF-8") from error
    except OSError as error:
        got = (error.strerror or str(error)).lower()
        raise TliError(path, "the path must be that of a readable file", got, "name a table with --from-csv") from error
    delimiter = max(",;\t", key=text.lstrip("\r\n").partition("\n")[0].count)
    rows = _rows(path, text, delimiter)
    _, header = next(rows, (1, []))
    asked = {"--before": before, "--after": after, "--group": group, "--cluster": cluster}
    wanted = {flag: name for flag, name in asked.items() if name is not None}
    for flag, name in wanted.items():
        if header.count(name) != 1:
            there = ", ".join(map(repr, header)) or "none"
            raise TliError(f"{path}:1", f"the header must have the column {name!r} once", f"the columns {there}", f"name one with {flag}")
    places = {flag: header.index(name) for flag, name in wanted.items()}
    values, names, left_out = [], [], []
    for line, fields in rows:
        if len(fields) != len(header):
            got = f"{len(fields)}: {', '.join(map(repr, fields))[:80]}"
            raise TliError(
                f"{path}:{line}", f"the row must have the header's {len(header)} columns", got, "mend the row, or quote its fields"
            )
        shown = [fields[places[flag]] for flag in ("--before", "--after")]
        # where commas divide the columns, none divides a number
        shown = shown if delimiter == "," else [field.replace(",", ".") if field.count(",") == 1 else field for field in shown]
        numbers = [_number(f"{path}:{line}", wanted[flag], field) for flag, field in zip(("--before", "--after"), shown)]
        if None in numbers:
            left_out.append(line)
            continue
        values.append(numbers)
        names.append([fields[places[flag]] if flag in places else "" for flag in ("--group", "--cluster")])
    columns = np.array(values, np.float64).reshape(-1, 2).T
    groups, clusters = np.array(names, object).reshape(-1, 2).T
    return PairedTable(columns[0], columns[1], None if group is None else groups, None if cluster is None else clusters, left_out)


def compare_table(table: PairedTable, seed: int = 0, margin: float | None = None) -> dict:
    """Each group's change, tested, and each two groups' changes against one another; corrected by Holm over groups, and over twos.

    margin   the largest difference of mean gains that counts as none, for the equivalence test; None: no such test

    Returns:
        ``groups``, a record each in the order of the table, and ``between``, a record for each two groups. What a group with one
        row, or with the same gain in all, cannot tell is None.

    Raises:
        TliError: no group can be tested.
    """
    labels = np.full(len(table.before), "", object) if table.group is None else table.group
    groups, gains = [], {}
    for name in dict.fromkeys(labels):
        here = labels == name
        before, after = table.before[here], table.after[here]
        clusters = None if table.cluster is None else np.unique(table.cluster[here].astype(str), return_inverse=True)[1]
        change = compare_paired(before[None], after[None], seed, clusters)[0]
        means = {"mean_before": float(before.mean()), "mean_after": float(after.mean())}
        groups.append({"group": None if table.group is None else name, **means, **change})
        gains[name] = paired_differences(before, after) if len(before) > 1 else after - before
    _require_testable(gains)
    add_holm(groups, P_VALUES)
    between = []
    for first, second in itertools.combinations(gains, 2):
        between.append({"first": first, "second": second, **compare_groups(gains[first], gains[second], margin)})
    add_holm(between, ("p",))
    if margin is not None:
        add_holm([record["equivalence"] for record in between], ("p",))
    return {"groups": groups, "between": between}


def describe(path: str | os.PathLike, table: PairedTable) -> dict:
    """What the table was, for a report."""
    rows, left_out = len(table.before), table.left_out
    return {
        "name": pathlib.Path(path).name,
        "sha256": sha256(path),
        "rows": rows,
        "rows_left_out": len(left_out),
        "lines_left_out": left_out,
    }


def _rows(path: pathlib.Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The first line and the fields of every row that is not empty; the header comes first, its names stripped."""
    reader, line, is_header = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1, True
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield line, [field.strip() for field in fields]
                is_header = False
            line = reader.line_num + 1
    except csv.Error as error:
        raise TliError(f"{path}:{line}", "the row must be well-formed", str(error), "close or double its quotation marks") from error
    if is_header:
        raise TliError(f"{path}:1", "the table must have a header and rows", "none", "name another with --from-csv")


def _number(where: str, column: str, field: str) -> float | None:
    """The value of a field, or None for a missing one."""
    if field.lower() in _MISSING:
        return None
    try:
        # Python's own numbers may hold underscores
        value = float(field.replace("_", "?"))
    except ValueError:
        value = None
    if value is None or not np.isfinite(value):
        remedy = "write it with a decimal point, or leave it empty if it is missing"
        raise TliError(where, f"{column} must be a finite number", repr(field), remedy)
    return value


def _require_testable(gains: dict[str, np.ndarray]) -> None:
    if any(len(values) > 1 and sample_std(values) > 0 for values in gains.values()):
        return
    longest = max(gains.values(), key=len, default=np.empty(0))
    if len(longest) < 2:
        got = f"{len(longest)} in each of {len(gains)} groups" if len(gains) > 1 else len(longest)
        raise TliError("--from-csv", "a test needs at least two rows with both values", got, "measure more pairs, or name another --group")
    got = f"{longest[0]:.6g} in all {len(longest)} rows{' of a group' if len(gains) > 1 else ''}"
    raise TliError("--from-csv", "the gains, after - before, must vary", got, "check that --before and --after name the right columns")
