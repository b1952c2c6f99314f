"""What training cost the language model, on running text: a table, and a sentence for the verdict."""

from __future__ import annotations

import typing

from tli.reports.tables import Table
from tli.reports.wording import UNDEFINED

# less than this is called no harm
_HARMLESS = 1.05


def harm_table(harm: dict, adapter: int = 0, of: str = "") -> Table:
    """Perplexity of base and adapter, and how far apart their next-token distributions are.

    harm      what ``perplexity.harm`` gave, of one text
    adapter   which of its adapters
    of        what the title begins with
    """
    text, after = harm["text"], harm["after"][adapter]
    part = f"{text['tokens']:,}"
    if text["tokens_in_file"] is None:
        part = f"the first {text['tokens']:,}"
    elif text["tokens"] < text["tokens_in_file"]:
        part = f"the first {text['tokens']:,} of {text['tokens_in_file']:,}"
    windows = f"{text['windows']} window{'s' * (text['windows'] > 1)} of {text['width']}"
    shown = (
        ("perplexity of the base", harm["before"]["perplexity"], 2),
        ("perplexity with the adapter", after["perplexity"], 2),
        ("times the base's", after["perplexity_ratio"], 3),
        ("KL from the base, nats", after["kl"], 4),
        ("total variation", after["total_variation"], 4),
    )
    rows = [[name, _number(record["value"], digits), _interval(record, digits)] for name, record, digits in shown]
    return Table(f"{of}language model on {text['name']}: {part} tokens in {windows}", ["", "mean", "95 % interval"], rows)


def cost(report: dict) -> str:
    """What training cost the language model, in a sentence; empty where it was not measured."""
    found = [(one["text"]["name"], one["before"]["perplexity"], one["after"][0]) for one in report.get("harm") or []]
    if not found:
        return ""
    told = "; ".join(
        f"{_number(after['perplexity_ratio']['value'], 3)} {_interval(after['perplexity_ratio'], 3)} times the base's perplexity on {name} "
        f"({_number(before['value'], 1)} -> {_number(after['perplexity']['value'], 1)})"
        for name, before, after in found
    )
    worst = max(after["perplexity_ratio"]["value"] for _, _, after in found)
    if worst <= _HARMLESS:
        return f"It left the language model about as it was: {told}."
    return f"It did harm to the language model: {told}."


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def _interval(record: dict[str, typing.Any], digits: int) -> str:
    return UNDEFINED if record["low"] is None else f"[{_number(record['low'], digits)}, {_number(record['high'], digits)}]"
