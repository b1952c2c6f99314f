"""What a report says of training beside what needs none, on made-up numbers whose order is known."""

import pytest

from tli.metrics.baseline_records import ALL, BEFORE, PLAIN
from tli.reports.baselines import baseline_table, bought


def record(way, stream, value, candidates="split", group=ALL, metric="mrr", layer=2):
    where = {"way": way, "stream": stream, "layer": layer if stream else None, "candidates": candidates, "group": group, "metric": metric}
    return {**where, "value": value, "low": value - 0.01, "high": value + 0.01, "n": 50, "clusters": 50, "chance": 0.03}


def report(trained: float, gain: float, width: float = 0.01, best: float = 0.1) -> dict:
    records = [
        record(PLAIN, BEFORE, 0.031),
        record("class", None, 0.5),
        record("edit_distance", None, 0.04),
        record("cca", BEFORE, best),
        record(PLAIN, "after", trained),
        record("cca", "after", 0.9),
        record("cca", "after", 0.2, "class", "no loan words"),
        record(PLAIN, BEFORE, 0.7, layer="output"),
    ]
    ways = [(way["way"]) for way in records[:4]]
    where = {"stream": "after", "layer": 2, "candidates": "split", "group": ALL}
    tests = [{"way": way, **where, "test": "paired", "mean_gain": gain, "low": gain - width, "high": gain + width} for way in ways]
    pairs = {"trained": 90, "held_out": 10, "split": "words", "with_relative": 3}
    return {"pairs": pairs, "baselines": {"records": records, "tests": tests}}


@pytest.mark.parametrize(
    ("trained", "gain", "said"),
    [
        (0.15, 0.05, "At layer 2, training adds +0.050 [.040, .060] beyond the best that needs none, CCA of states: held-out MRR 0.100"),
        (0.105, 0.005, "training is not shown to add anything to CCA of states, which needs none"),
        (0.05, -0.05, "CCA of states finds more without any training: held-out MRR 0.100 [.090, .110] against 0.050 [.040, .060]"),
    ],
)
def test_the_sentence_is_about_the_best_that_needs_no_training_and_is_no_oracle(trained, gain, said):
    assert said in bought(report(trained, gain), 2)


def test_chance_is_no_achievement():
    assert "neither training nor anything that needs none" in bought(report(0.03, 0.0, best=0.031), 2)


@pytest.mark.parametrize("none", [{}, {"baselines": None}])
def test_without_baselines_nothing_is_said_of_them(none):
    assert bought(none, 2) == ""
    assert baseline_table(none, 2) is None


def test_the_table_holds_every_way_of_the_layer_the_best_first():
    table = baseline_table(report(0.05, -0.05), 2)
    names = ["CCA of trained states", "word class (oracle)", "CCA of states", "adapters (cosine)", "edit distance"]
    assert [row[0] for row in table.rows] == [*names, "frozen model (cosine)", "chance"]
    assert table.rows[0][1:] == ["0.900", "[.890, .910]", "", "", "0.200 [.190, .210]", ""]
    assert table.rows[-1][1] == "0.030"
    assert "no\nloans" in table.head
    assert baseline_table(report(0.05, -0.05), 2, intervals=False).rows[0][5] == "0.200"
    # there the adapters were not measured
    assert baseline_table(report(0.05, -0.05), "output") is None
