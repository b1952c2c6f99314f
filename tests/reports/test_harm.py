"""What training cost the language model, in a table and a sentence."""

import pytest

from tli.reports.harm import cost, harm_table


def measured(value: float, interval: bool = True) -> dict:
    return {"value": value, "low": value * 0.9 if interval else None, "high": value * 1.1 if interval else None}


def harm_of(name: str, ratio: float, interval: bool = True) -> dict:
    after = {
        "perplexity": measured(1000 * ratio),
        "perplexity_ratio": measured(ratio, interval),
        "kl": measured(0.5),
        "total_variation": measured(0.2),
    }
    text = {"name": name, "tokens": 100, "tokens_in_file": 2000, "windows": 1, "width": 100}
    return {"text": text, "before": {"perplexity": measured(1000.0)}, "after": [harm_of_none(), after] if name == "second" else [after]}


def harm_of_none() -> dict:
    return {name: measured(1.0) for name in ("perplexity", "perplexity_ratio", "kl", "total_variation")}


def test_harm_is_named_text_by_text():
    said = cost({"harm": [harm_of("a.txt", 1.01), harm_of("b.txt", 2.5)]})
    assert said.startswith(
        "It did harm to the language model: 1.010 [0.909, 1.111] times the base's perplexity on a.txt (1,000.0 -> 1,010.0); "
    )
    assert "2.500 [2.250, 2.750] times the base's perplexity on b.txt (1,000.0 -> 2,500.0)" in said


def test_little_harm_is_called_so():
    assert cost({"harm": [harm_of("a.txt", 1.01)]}).startswith("It left the language model about as it was: 1.010 [")


@pytest.mark.parametrize("report", [{}, {"harm": []}, {"harm": None}])
def test_what_was_not_measured_is_not_spoken_of(report):
    assert cost(report) == ""


def test_the_table_says_how_much_of_the_text_was_read_and_where_no_interval_is():
    table = harm_table(harm_of("second", 2.0, interval=False), 1, "run: ")
    assert table.title == "run: language model on second: the first 100 of 2,000 tokens in 1 window of 100"
    assert table.rows[2] == ["times the base's", "2.000", "-"]
    assert table.rows[0] == ["perplexity of the base", "1,000.00", "[900.00, 1,100.00]"]
