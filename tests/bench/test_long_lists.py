"""Memory grows with a list by little, and the benchmark of it measures real lists. No time is asserted."""

import json

import pytest

from bench import long_lists
from tli.data.word_pairs import read_pairs

pytestmark = pytest.mark.slow


def test_own_memory_grows_by_less_than_a_hundred_bytes_a_pair(make_model, tmp_path):
    rows = []
    for pairs in (20_000, 150_000):
        long_lists.write_list(tmp_path / "list.tsv", pairs)
        options = {"pairs": str(tmp_path / "list.tsv"), "model": str(make_model("llama")), "batch": 256, "layer": 1, "rank": 4}
        rows.append(long_lists.measure_in_a_process(options, steps=2))
    # text, tokens and their offsets as Python objects would take a thousand
    assert rows[1]["own_bytes_at_most"] - rows[0]["own_bytes_at_most"] < 100 * 130_000


def test_a_made_up_list_has_every_word_once(tmp_path):
    for seed in (0, 1):
        long_lists.write_list(tmp_path / f"{seed}.tsv", 5000, seed)
        pairs = read_pairs(tmp_path / f"{seed}.tsv", "swahili", "english")
        assert len({word for pair in pairs for word in (pair.source, pair.target)}) == 10_000
    assert (tmp_path / "0.tsv").read_bytes() != (tmp_path / "1.tsv").read_bytes()


def test_the_bench_writes_a_row_a_list_and_draws_it(tmp_path):
    config = long_lists.LongListsConfig(pairs="60,300", batch=16, steps=2, results=str(tmp_path), figure=str(tmp_path / "figure.png"))
    long_lists.bench(config)
    kept = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [row["pairs"] for row in kept["lists"]] == [60, 300]
    for row in kept["lists"]:
        assert set(row["seconds_per_pair"]) == set(long_lists.STAGES)
        assert row["own_bytes_at_most"] >= max(row["own_bytes"].values())
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
