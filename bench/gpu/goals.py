"""What the numbers of ``bench.gpu`` come to: how good the dispatch is, the goals with what was got for them, and the tables."""

import itertools
import statistics
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from bench.gpu.cases import PEFT, RANK
from bench.gpu.timing import AGAIN
from tli.commands import tune


def _of(row: dict, variant: str) -> dict:
    """A variant's part of a case's record."""
    return next((each for each in row["subjects"] if each["subject"] == variant), {"subject": variant, "failed": ""})


def dispatches(found: list[dict], table: tuple[int, int]) -> tuple[dict, list[dict]]:
    """How far the dispatch is from the fastest way: by the table in force, and by what ``tli.tune`` would make of these very numbers.

    Returns:
        the limits of both, and a row for each product and dispatch: the way that it takes, and that way's seconds / the fastest one's.
    """
    times = {}
    for row in found:
        by_way = {way: _of(row, way).get("seconds") for way in tune.WAYS}
        # what tli.tune looks at, too: one adapter, one kind of scales
        if row["op"] == "nf4_lora" and not row["dropout"] and not row["nested"] and row["rank"] == RANK and all(by_way.values()):
            times[row["name"], row["rows"], row["backward"]] = by_way
    limits = {"table": tuple(table)}
    names = {name for name, _, backward in times if backward}
    rungs = {m for _, m, backward in times if backward}
    # with a shape missing, two numbers of rows could not be compared
    rungs = sorted(m for m in rungs if all((name, m, True) in times for name in names))
    if len(rungs) > 1:
        sums = {m: {way: sum(times[name, m, True][way] for name in names) for way in tune.WAYS} for m in rungs}
        limits["tuned"] = tune.crossovers(sums)
    decode, fused, cublas = tune.WAYS
    rows = []
    for (whose, (decode_rows, fused_rows)), ((name, m, backward), by_way) in itertools.product(limits.items(), times.items()):
        way = decode if m <= decode_rows else fused if m <= fused_rows else cublas
        best = min(by_way, key=by_way.get)
        ratio = by_way[way] / by_way[best]
        rows.append({"dispatch": whose, "name": name, "rows": m, "backward": backward, "way": way, "best": best, "ratio": ratio})
    return {whose: {"decode_rows": d, "fused_rows": f} for whose, (d, f) in limits.items()}, rows


def times_faster(row: dict, ours: str, peers: tuple[str, ...]) -> float | None:
    """How many times faster ours is than the fastest of the peers: the median over rounds; None where one did not run."""
    own, others = _of(row, ours).get("rounds"), [_of(row, peer)["rounds"] for peer in peers if "rounds" in _of(row, peer)]
    if not own or not others:
        return None
    fastest = min(others, key=statistics.median)
    return statistics.median(peer / mine for peer, mine in zip(fastest, own))


def goals(found: list[dict], dispatch_rows: list[dict]) -> list[dict]:
    """Each goal with the worst number got for it, where, and the noise there; None where nothing was measured."""
    rows = []

    def add(goal: str, bound: float, at_least: bool, got: Iterable[tuple[float | None, dict]], note: str = "") -> None:
        got = [each for each in got if each[0] is not None]
        number, worst = (min if at_least else max)(got, key=lambda each: each[0], default=(None, {}))
        met = None if number is None else bool(number >= bound if at_least else number <= bound)
        noise = _of(worst, AGAIN).get("ratio_quartiles") if "subjects" in worst else None
        rows.append(
            {"goal": goal, "bound": bound, "got": number, "met": met, "where": _label(worst), "of": len(got), "noise": noise, "note": note}
        )

    def at(op: str, **wanted) -> list[dict]:
        return [row for row in found if row["op"] == op and all(row.get(key) == value for key, value in wanted.items())]

    for backward, direction in ((False, "forward"), (True, "forward + backward")):
        few = [row for row in at("nf4_lora", backward=backward) if row["rows"] <= 64]
        goal = f"decode-in-loop nf4_lora at M <= 64, {direction}: times faster than bitsandbytes + peft, at least"
        add(goal, 1.5, True, [(times_faster(row, "decode", PEFT), row) for row in few])
    for whose, said in (("table", "the table's dispatch"), ("tuned", "the dispatch that tli.tune's rule makes of this")):
        got = [(row["ratio"], row) for row in dispatch_rows if row["dispatch"] == whose]
        add(f"{said}, at any M: its way's seconds over the best way's, at most", 1.05, False, got)
    goal = "nf4_lora by dispatch at M = 4,096, forward + backward: times faster than bitsandbytes + peft, at least"
    add(goal, 1.3, True, [(times_faster(row, "dispatch", PEFT), row) for row in at("nf4_lora", backward=True, rows=4096)])
    both = "pool_norm + infonce"
    small = [row for row in at(both, width=4096) if row["pairs"] <= 1024]
    goal = f"{both} at 64 to 1,024 pairs, D = 4096: times faster than eager, at least"
    add(goal, 5, True, [(times_faster(row, "fused", ("eager",)), row) for row in small])
    for op in ("infonce", both):
        largest = at(op, pairs=65536, width=768)
        peaks = [(_of(row, "fused").get("peak_bytes"), row) for row in largest]
        add(f"{op} at 65,536 pairs, D = 768: peak GB, at most", 1.4, False, [(peak and peak / 1e9, row) for peak, row in peaks])
        note = "; ".join(dict.fromkeys(f"eager: {_of(row, 'eager')['failed']}" for row in largest if "failed" in _of(row, "eager")))
        goal = f"{op} at 65,536 pairs, D = 768: times faster than eager, at least"
        add(goal, 2, True, [(times_faster(row, "fused", ("eager",)), row) for row in largest], note)
        if note:
            fits = [row for row in at(op, width=768) if "rounds" in _of(row, "eager")]
            most = max((row["pairs"] for row in fits), default=0)
            got = [(times_faster(row, "fused", ("eager",)), row) for row in fits if row["pairs"] == most]
            add(f"{op}, the same at the most pairs that eager has the memory for, at least", 2, True, got)
    llama = [row for row in at("dequantise") if row["name"].startswith("llama-3-8b/")]
    got = [(_of(row, "ours").get("share_of_ceiling"), row) for row in llama]
    add("dequantise of Llama-3-8B's weights: share of the measured copy, at least", 0.85, True, got)
    return rows


def _label(row: dict) -> str:
    """Which case or dispatch a row is of."""
    sizes = [f"{key} {row[key]}" for key in ("rows", "rank", "dropout", "nested", "pairs", "width") if row.get(key)]
    way = [f"{row['way']}, not {row['best']}"] if "way" in row else []
    return ", ".join([*([row["name"]] if row else []), *sizes, *way, *(["backward"] if row.get("backward") and way else [])])


def show_cases(console: Console, found: list[dict]) -> None:
    """Every time, one table for each op and what stays the same in it."""
    groups: dict[tuple, list[dict]] = {}
    for row in found:
        fixed = {key: row[key] for key in ("rank", "dropout", "nested", "backward", "width", "compiled") if key in row}
        title = row["op"] if row["op"] in ("dequantise", row["name"]) else f"{row['op']}, {row['name']}"
        groups.setdefault((title, *fixed.items()), []).append(row)
    for (title, *fixed), rows in groups.items():
        names = list(dict.fromkeys(each["subject"] for row in rows for each in row["subjects"]))
        said = ", ".join([title, *(f"{key} {value}" for key, value in fixed)])
        units = "a rehearsal" if rows[0].get("rehearsal") else "ms on the GPU, share of its ceiling, peak GB; py: Python takes longer"
        table = Table("size", *names, title=f"{said}: {units}")
        for row in rows:
            size = row.get("rows") or row.get("pairs") or f"{row['name']} {row['n']} x {row['k']}"
            table.add_row(str(size), *(_cell(_of(row, name)) for name in names))
        console.print(table)


def line(row: dict) -> str:
    """A case's times on one line."""
    return "; ".join(f"{each['subject']} {_cell(each)}" for each in row["subjects"])


def _cell(one: dict) -> str:
    if "seconds" not in one:
        return one.get("failed", "ran")[:13]
    peak = f" {one['peak_bytes'] / 1e9:.2f}" if one.get("peak_bytes") else ""
    return f"{1e3 * one['seconds']:.4g} {one['share_of_ceiling']:.0%}{peak}{' py' if one['python_bound'] else ''}"


def show_goals(console: Console, limits: dict, dispatch_rows: list[dict], left_out: list[dict], reached: list[dict]) -> None:
    """How the dispatch did, what was left out, and last the goals."""
    table = Table("dispatch", "rows", "way", "over the best way", "where it is the worst", title=f"dispatch: {limits}")
    for whose, m in sorted({(row["dispatch"], row["rows"]) for row in dispatch_rows}):
        worst = max((row for row in dispatch_rows if (row["dispatch"], row["rows"]) == (whose, m)), key=lambda row: row["ratio"])
        where = f"{worst['name']}, {'forward + backward' if worst['backward'] else 'forward'}: best is {worst['best']}"
        table.add_row(whose, str(m), worst["way"], f"{worst['ratio']:.3f}", where)
    if dispatch_rows:
        console.print(table)
    for one in left_out:
        console.print("; ".join(f"{key}: {value}" for key, value in one.items()), markup=False)
    table = Table("goal", "bound", "got", "met", "the worst of", "is at", "our second time there", title="goals")
    for row in reached:
        got, met = "not measured" if row["got"] is None else f"{row['got']:.3g}", {None: "-", True: "met", False: "missed"}[row["met"]]
        noise = "" if not row["noise"] else "{:.2f} to {:.2f}".format(*row["noise"])
        table.add_row(row["goal"], f"{row['bound']:g}", got, met, str(row["of"]), row["where"] or row["note"], noise)
    console.print(table)
