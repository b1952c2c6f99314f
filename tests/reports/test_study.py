"""What a study says of made-up cells: every sentence, table and figure by its rule."""

import pytest

from tli.commands.grid import Cell
from tli.reports import study as study_report
from tli.reports import study_results
from tli.reports.figures.study import draw_bought, draw_costs, draw_ranks
from tli.reports.wording import interval, number
from tli.stats.across_runs import seed_interval


def made_up(early: list, full: list, shuffled: float = 0.03, free: float | None = None, trained: list | None = None) -> dict:
    """Results of a study of three ranks, as if held-out MRR had been so, by rank and seed.

    free      what needs no training finds
    trained   by rank: every measure of the trained pairs; as of the held-out ones otherwise
    """
    reports = []
    for arm, by_rank in (("early", early), ("full", full)):
        for rank, by_seed in zip((1, 4, 16), by_rank, strict=True):
            for control in (False, True) if rank == 16 else (False,):
                for seed, mrr in enumerate(by_seed):
                    options = {"arm": arm, "rank": rank, "shuffle_pairs": control, "seed": seed}
                    measurements = [
                        {"split": split, "when": when, "layer": layer, "metric": metric, "value": value, "chance": 0.02}
                        for split in ("trained", "held_out")
                        for when in ("before", "after")
                        for layer in (2, "output")
                        for metric in study_results.METRICS
                        for known in [trained[(1, 4, 16).index(rank)] + 0.001 * seed if trained and split == "trained" else mrr]
                        for value in [(shuffled + 0.001 * seed if control else known) if when == "after" else 0.02]
                    ]
                    report = {
                        "config": {"arm": arm, "layer": 2},
                        "model": {"name": "a/model", "blocks": 4},
                        "pairs": {"trained": 90, "held_out": 10, "split": "families", "with_relative": 0},
                        "measurements": measurements,
                        "training": {"steps": 8, "seconds": 2.0 if arm == "early" else 9.0, "peak_bytes": 1 << 30, "chance_loss": 4.0}
                        | {"loss_last": 2.0 if arm == "early" else 3.9},
                        "adapter": {"parameters": rank * 100 * (1 if arm == "early" else 3), "bytes": rank * 400},
                        "versions": {},
                        "machine": {},
                    }
                    if free is not None:
                        ways = {("cca", "before", 2): free, ("cca", "before", "output"): 0.01, ("ngrams", None, None): 0.02}
                        ways |= {("class", None, None): 0.9, ("plain", "before", 2): 0.9, ("cca", "after", 2): 0.9}
                        told = {"candidates": "split", "group": "all pairs", "metric": "mrr"}
                        records = [
                            {"way": way, "stream": stream, "layer": layer, **told, "value": value + 0.001 * seed, "chance": 0.02}
                            for (way, stream, layer), value in ways.items()
                        ]
                        own_class = {"candidates": "class", "group": "no loan words"}
                        records += [
                            {**records[0], **own_class, "value": 0.15 + 0.001 * seed},
                            {**records[0], **own_class, "way": "plain", "stream": "after", "value": 0.1 * (1 + mrr) + 0.001 * seed},
                            {**records[0], "way": "map", "stream": "after", "value": 10 * mrr},
                        ]
                        report["baselines"] = {"records": records + [{**records[0], "candidates": "list", "value": 0.9}]}
                        report["harm"] = [{"text": {"name": "a.txt"}, "after": [{"perplexity_ratio": {"value": 1.0 + rank}}]}]
                    reports.append((Cell("", options), report))
    config = {"layer": 2, "search_rank": 16, "jobs": 1, "batch": 4, "alpha_rule": "2R"}
    search = {arm: {"chosen": 1e-3, "tried": []} for arm in ("early", "full")}
    return study_results.assemble(config, search, reports)


FREE = "CCA of states without any training: held-out MRR"


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (0.02, f"The early arm finds more than {FREE} 0.021 [.019, .023] at layer 2, at ranks 4, 16"),
        (0.2, f"The early arm finds less than {FREE} 0.201 [.199, .203] at layer 2 (-0.170 at rank 1"),
        (0.031, "The early arm is not shown to find more, at any rank, than CCA of states"),
    ],
)
def test_a_study_says_what_training_bought_over_what_needs_none(free, said):
    early = [[0.03, 0.031, 0.032], [0.05, 0.052, 0.051], [0.06, 0.062, 0.061]]
    if free == 0.031:
        early = [[0.03, 0.04, 0.03], [0.02, 0.05, 0.03], [0.02, 0.04, 0.035]]
    results = made_up(early, [[0.02, 0.021, 0.022]] * 3, free=free)
    text = study_report.in_words(results)
    assert text.startswith(said)
    # at the output the words alone find more than a map of the states
    assert f"than {FREE.replace('CCA of states', 'character n-grams')} 0.021 [.019, .023] at the output" in text
    cost = next(table for table in study_report.tables(results) if table.title.startswith("Cost"))
    assert cost.head[-1] == "perplexity,\na"
    assert [row[-1] for row in cost.rows] == ["2.00", "5.00", "17.00"] * 2
    drawn = {
        draw: {line.get_label() for panel in draw(results).axes for line in panel.lines} for draw in (draw_ranks, draw_costs, draw_bought)
    }
    assert "best without training" in drawn[draw_ranks]
    assert "best without training, layer 2" in drawn[draw_costs]
    assert "best without training, where the early arm's loss was" in drawn[draw_bought]


def test_a_study_asks_what_class_and_loans_cannot_win_and_what_a_map_finds():
    early = [[0.03, 0.031, 0.032], [0.05, 0.052, 0.051], [0.06, 0.062, 0.061]]
    results = made_up(early, [[0.02, 0.021, 0.022]] * 3, free=0.2)
    said = study_report.in_words(results)
    at_first, at_last = (seed_interval([0.1 * (1 + mrr) + 0.001 * seed for seed, mrr in enumerate(early[at])]) for at in (0, -1))
    assert (
        f"Among words of the same class, loans left out the early arm's is {told(at_first)} at rank 1 and {told(at_last)} at rank 16, "
        f"against {told(seed_interval([0.15, 0.151, 0.152]))} without training (CCA of states): less at ranks 1, 4, 16."
    ) in said
    # behind the map 10 times as much as by cosine: more than the frozen states' .2 from rank 1 on
    assert "Behind a map fitted afterwards the early arm's is 0.310" in said
    assert "without training (CCA of states): more at ranks 1, 4, 16." in said
    # no cell knows a map with n-grams, and none knows the output's classes
    assert "states and n-grams the" not in said
    assert "the full arm's is" not in said
    harm = "perplexity is on a.txt 2.000 [2.000, 2.000] times the base's at rank 1 and 17.000 [17.000, 17.000] at rank 16 (Page's p"
    assert said.count(harm) == 2
    table = next(table for table in study_report.tables(results) if table.title.startswith("Where each arm's loss was"))
    assert [head.replace("\n", " ") for head in table.head] == [
        "rank",
        "cosine",
        "own class, no loans",
        "behind a map",
        "map with n-grams",
        "trained",
    ]
    best, first = table.rows[1:3]
    assert [cell.split("\n")[0] for cell in best] == ["best without", "0.201", "0.151", "0.201", ""]
    assert [cell.split("\n")[0] for cell in first] == ["1", "0.031", "0.104", "0.310", "", "0.031"]


def told(record: dict) -> str:
    return f"{number(record['value'])} {interval(record)}"


@pytest.mark.parametrize(
    ("held_out", "trained", "said"),
    [
        (
            "same",
            [0.1, 0.4, 0.9],
            "0.901 [.899, .903] at rank 16 (Page's p 0.009, rho +0.95): more rank buys memory of them, and no alignment",
        ),
        ("rising", [0.1, 0.4, 0.9], "more rank buys both memory of them and alignment of new words."),
        ("falling", [0.1, 0.4, 0.9], "more rank buys memory of them, and new words lose by it."),
        ("rising", [0.1, 0.1, 0.1], "more rank was not seen to buy memory of them."),
    ],
)
def test_a_study_says_whether_rank_buys_alignment_or_memory(held_out, trained, said):
    values = {"same": SAME, "rising": RISING, "falling": RISING[::-1]}[held_out]
    text = study_report.in_words(made_up(values, SAME, trained=trained))
    early = text.split("The full arm, at the output")[0]
    assert said in early


def test_a_study_of_reports_without_baselines_says_nothing_of_them():
    results = made_up([[0.03, 0.031, 0.032]] * 3, [[0.02, 0.021, 0.022]] * 3)
    assert "without any training" not in study_report.in_words(results)
    assert all(len(row) == 5 for row in next(t for t in study_report.tables(results) if t.title.startswith("Cost")).rows)


SAME = [[0.100, 0.110, 0.105]] * 3
RISING = [[0.100, 0.110, 0.105], [0.150, 0.158, 0.151], [0.200, 0.212, 0.204]]


def test_the_paragraph_says_what_was_not_found():
    said = study_report.in_words(made_up(SAME, [[0.106, 0.104, 0.103]] * 3))
    assert "no trend over the ranks was found" in said
    assert "Between the arms, each where its loss was, no difference of held-out MRR was found at any rank" in said
    assert "rises with" not in said
    assert "higher in" not in said


def test_the_paragraph_says_what_was_found():
    said = study_report.in_words(made_up(RISING, SAME))
    early, full = said.split("The full arm, at the output")
    assert "The early arm, at layer 2" in early
    assert "it rises with the rank" in early
    assert "no trend over the ranks was found" in full
    assert "higher in the early arm at ranks 4 (+0.048), 16 (+0.100), p after Holm below .05; at the other 1 no difference" in said
    assert "4.5 times the early one's time" in said
    assert "3.0 times as large" in said
    assert "and that part is alignment" in said
    assert "The full arm's loss ended at 3.90 at the best, at rank 1, where chance is 4.00: in 8 steps it learnt little" in said
    assert "The early arm's loss" not in said


def test_the_paragraph_says_where_the_control_is_as_good():
    said = study_report.in_words(made_up(RISING, SAME, shuffled=0.25))
    assert "not shown to be less than on true pairs" in said
    assert "that part is alignment" not in said


def test_a_rate_at_the_edge_of_the_search_is_said():
    results = made_up(RISING, SAME)
    tried = [{"rate": rate, "value": 0.1, "low": 0.1, "high": 0.1, "n": 3} for rate in (1e-4, 1e-3, 1e-2)]
    results["search"] = {"early": {"chosen": 1e-3, "tried": tried}, "full": {"chosen": 1e-4, "tried": tried}}
    said = study_report.in_words(results)
    assert "The best learning rate of the full arm, 0.0001, is the lowest that was tried: a lower one may do better." in said
    assert "learning rate of the early arm" not in said


def test_one_seed_claims_nothing_of_another():
    results = made_up([[0.1], [0.2], [0.3]], [[0.1], [0.1], [0.1]])
    said = study_report.in_words(results)
    assert "cannot be compared with so few seeds" in said
    assert "With one seed nothing is known" in said
    assert study_report.markdown(results).count("[") == study_report.markdown(results).count("]")


def test_no_score_stands_without_its_control():
    results = made_up(RISING, SAME)
    for table in study_report.tables(results)[: len(results["layers"])]:
        head = [name.replace("\n", " ") for name in table.head]
        assert head[1:4] == ["CLIP-S, true", "CLIP-S, mism.", "gap"]
        rows = [row[0] for row in table.rows]
        assert rows[0] == "before"
        assert rows.count("16\nshuffled") == 2
