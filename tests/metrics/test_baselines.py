"""Each baseline finds what it can know, and nothing else: on lists made so that just one of them has the answer."""

import string

import numpy as np
import pytest

from tli.data.packing import TokenisedWords
from tli.data.pair_store import Pair
from tli.metrics import baseline_records
from tli.metrics.baseline_records import ALL, PLAIN, LayerMaps, judge, kinds
from tli.metrics.baselines import BASELINES, Baselines, word_classes

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def word(generator: np.random.Generator, syllables: int) -> str:
    return "".join(generator.choice(SYLLABLES, syllables))


def listed(seed: int, pairs: int, make) -> list[Pair]:
    generator, found = np.random.default_rng(seed), {}
    while len(found) < pairs:
        pair = make(generator, len(found))
        found.setdefault(pair.source, pair)
    return list(found.values())


def unrelated(generator, number: int) -> Pair:
    return Pair(word(generator, 3), word(generator, 3), word_class=("noun", "verb", "adjective")[number % 3], loan=number % 2 == 0)


def mrr(ranks) -> float:
    return float((ranks.forward.reciprocal_rank.mean() + ranks.backward.reciprocal_rank.mean()) / 2)


def chance(ranks) -> float:
    return float(ranks.forward.reciprocal_rank_chance.mean())


def test_words_spelt_alike_are_found_by_edit_distance_and_by_shared_ngrams():
    pairs = listed(0, 120, lambda g, n: Pair(w := word(g, 4), w[:-1] + g.choice(list("xyw"))))
    found = Baselines(pairs[:80], pairs[80:], 0).of_words()
    assert "class" not in found
    assert mrr(found["edit_distance"]["split"]) > 0.95
    assert mrr(found["ngrams"]["split"]) > 0.95
    assert mrr(found["length"]["split"]) < 0.15


def test_a_cipher_is_learnt_by_the_map_of_ngrams_alone():
    cipher = str.maketrans(string.ascii_lowercase, "".join(np.random.default_rng(1).permutation(list(string.ascii_lowercase))))
    pairs = listed(1, 500, lambda g, n: Pair(w := word(g, 3), w.translate(cipher)))
    found = Baselines(pairs[:400], pairs[400:], 0).of_words()
    assert mrr(found["ngram_map"]["split"]) > 0.8
    assert mrr(found["edit_distance"]["split"]) < 0.2


def test_the_class_oracle_is_at_chance_among_its_own():
    pairs = listed(2, 150, unrelated)
    found = Baselines(pairs[:90], pairs[90:], 0).of_words()["class"]
    assert mrr(found["split"]) > 2 * chance(found["split"])
    assert mrr(found["class"]) == pytest.approx(chance(found["class"]))
    # the list has more nouns than the split
    assert chance(found["list"]) < mrr(found["list"]) < mrr(found["split"])


@pytest.mark.parametrize("relation", ["shift", "rotation", "linear"])
def test_states_related_by_a_map_are_found_by_that_map(relation):
    generator = np.random.default_rng(3)
    pairs = listed(3, 300, unrelated)
    source = generator.normal(size=(300, 12))
    rotation = np.linalg.qr(generator.normal(size=(12, 12)))[0]
    # by very different factors along its directions
    stretched = rotation @ np.diag(np.logspace(0, 2, 12)) @ np.linalg.qr(generator.normal(size=(12, 12)))[0]
    matrix = {"shift": np.eye(12), "rotation": rotation, "linear": stretched}
    target = source @ matrix[relation] + 20 * (relation == "shift")
    found = Baselines(pairs[:200], pairs[200:], 0).of_states(source, target)
    finds = {name: mrr(ranks["split"]) > 0.9 for name, ranks in found.items()}
    assert finds == {
        "centred": relation == "shift",
        "procrustes": relation != "linear",
        "ridge": True,
        "cca": True,
        "cca_spelling": finds["cca_spelling"],
    }


def test_nothing_is_found_where_there_is_nothing():
    generator, pairs = np.random.default_rng(4), listed(4, 260, unrelated)
    baselines = Baselines(pairs[:200], pairs[200:], 0)
    found = baselines.of_words() | baselines.of_states(*generator.normal(size=(2, 260, 20)))
    # the last is that of an adapter
    assert [*found, "map"] == list(BASELINES)
    for name, ranks in found.items():
        if name != "class":
            assert mrr(ranks["split"]) < 2.2 * chance(ranks["split"]), name


def test_wide_states_are_reduced_and_a_list_of_few_words_has_an_answer(monkeypatch):
    monkeypatch.setattr("tli.metrics.baselines._STATE_COMPONENTS", 8)
    pairs, generator = listed(5, 14, unrelated), np.random.default_rng(5)
    baselines = Baselines(pairs[:4], pairs[4:], 0)
    found = baselines.of_words() | baselines.of_states(*generator.normal(size=(2, 14, 30)).astype(np.float32))
    assert all(np.isfinite(mrr(ranks["split"])) for ranks in found.values())


def test_wide_states_lose_nothing_that_their_components_hold(monkeypatch):
    monkeypatch.setattr("tli.metrics.baselines._STATE_COMPONENTS", 8)
    generator, pairs = np.random.default_rng(9), listed(9, 200, unrelated)
    # thirty dimensions, of which six are used
    meaning = generator.normal(size=(200, 6)) @ generator.normal(size=(6, 30))
    found = Baselines(pairs[:150], pairs[150:], 0).of_states(meaning, meaning + 5)
    assert all(mrr(found[name]["split"]) > 0.9 for name in ("centred", "procrustes", "ridge", "cca"))


def test_classes_are_known_where_half_the_list_says_them():
    named = [Pair(str(i), str(i), word_class=name) for i, name in enumerate(["noun", "Noun", "", "verb"])]
    assert word_classes(named).tolist() == [0, 0, -1, 1]
    assert word_classes([*named, *(Pair(f"{i}x", "y") for i in range(3))]) is None


def test_kinds_of_pairs_are_the_lists_or_guessed():
    told = [Pair(f"w{i}", f"g{i}", loan=[True, False, None][i % 3], field="food" if i < 10 else "law") for i in range(30)]
    found = kinds(told)
    assert {name: int(group.sum()) for name, group in found.items()} == {
        ALL: 30, "loan words": 10, "no loan words": 10, "field: food": 10, "field: law": 20,
    }  # fmt: skip
    # 12 pairs with a token in common, of whole words 1, 2, 3 ..., and the others without
    own = np.arange(1, len(told) + 1)
    ids = np.concatenate([own, np.where(own <= 12, own, 100 + own)])
    words = TokenisedWords(ids, np.arange(len(ids) + 1), np.zeros(len(ids), np.int64), np.unique(ids))
    found = kinds(told, lambda pairs: words)
    assert np.flatnonzero(found["share a sub-token"]).tolist() == list(range(12))
    assert (found["share none"] == ~found["share a sub-token"]).all()
    guessed = kinds([Pair("redio", "radio")] * 10 + [Pair("paka", "cat")] * 12)
    assert {name: int(group.sum()) for name, group in guessed.items()} == {ALL: 22, "spelt alike": 10, "not spelt alike": 12}


def test_records_and_tests_say_what_the_ranks_are():
    pairs, generator = listed(6, 160, unrelated), np.random.default_rng(6)
    splits = {"trained": pairs[:120], "held_out": pairs[120:]}
    baselines = Baselines(*splits.values(), 0)
    frozen = tuple(generator.normal(size=(2, 160, 10)))
    trained = frozen[0], frozen[0] + 2 * generator.normal(size=(160, 10))
    states = {("before", 2): frozen, ("after", 2): trained, ("before", "output"): frozen}
    fitted = baselines.best_map(*trained).linear
    records, tests, listed_pairs, of_each = judge(splits, states, 0, {("after", 2): fitted}).values()
    of = {(r["way"], r["stream"], r["layer"], r["candidates"], r["group"], r["metric"]): r for r in records}
    assert len(of) == len(records)
    ours, theirs = (of[PLAIN, stream, 2, "split", ALL, "mrr"] for stream in ("after", "before"))
    assert ours["value"] == pytest.approx(mrr(baselines.plain(*trained)["split"]))
    assert ours["low"] < ours["value"] < ours["high"]
    assert ours["n"] == 40
    assert of["length", None, None, "list", "loan words", "p_at_1"]["chance"] == pytest.approx(1 / 160, rel=0.1)
    assert ("cca_spelling", "before", "output", "split", ALL, "mrr") not in of
    assert ("ridge", "after", 2, "split", ALL, "mrr") not in of
    assert of["map", "after", 2, "split", ALL, "mrr"]["value"] == pytest.approx(mrr(baselines.behind(fitted, *trained)["split"]))
    assert listed_pairs == [[pair.source, pair.target] for pair in splits["held_out"]]
    for one in of_each:
        assert np.mean(one["values"]) == pytest.approx(of[one["way"], one["stream"], one["layer"], "split", ALL, "mrr"]["value"], abs=1e-6)
    whole = {"candidates": "split", "group": ALL, "layer": 2, "way": PLAIN}
    change = next(t for t in tests if t["trained"] == PLAIN and whole.items() <= t.items())
    assert change["mean_gain"] == pytest.approx(ours["value"] - theirs["value"])
    assert change["low"] > 0.1
    assert {t["way"] for t in tests} == {PLAIN, *BASELINES} - {"map"}
    assert {t["trained"] for t in tests} == {PLAIN, "map", "cca_spelling"}
    assert {(t["stream"], t["layer"]) for t in tests} == {("after", 2)}
    assert judge({"trained": pairs, "held_out": pairs[:3]}, states, 0) is judge({"trained": pairs}, states, 0) is None
    assert change["p_sign_flip"] <= change["p_sign_flip_holm"] <= 1


def test_maps_show_in_which_layer_a_model_holds_what_it_does_not_show():
    generator, pairs = np.random.default_rng(8), listed(8, 150, unrelated)
    maps = LayerMaps(pairs, 0, "families")
    meaning = generator.normal(size=(150, 12))
    rotation = np.linalg.qr(generator.normal(size=(12, 12)))[0]
    maps.see("base", 0, *generator.normal(size=(2, 150, 12)))
    maps.see("base", 1, meaning, meaning @ rotation)
    maps.see("base", "output", meaning, meaning)
    found = maps.records()
    assert (found["fitted"], found["judged"]) == (120, 30)
    value = {(r["way"], r["layer"]): r["value"] for r in found["records"] if r["metric"] == "mrr"}
    assert {key for key, mrr in value.items() if mrr > 0.9} == {
        ("procrustes", 1), ("cca", 1), ("plain", "output"), ("procrustes", "output"), ("cca", "output"),
    }  # fmt: skip
    assert all(mrr < 0.35 for (_, layer), mrr in value.items() if layer == 0)
    assert value["plain", 1] < 0.35
    # in the order of the list the judged pairs are not the last ones
    assert sorted(maps.order) == list(range(150)) != maps.order.tolist()


def test_a_group_of_one_word_has_no_interval_and_no_record(monkeypatch):
    monkeypatch.setattr(baseline_records, "_FEWEST", 1)
    pairs = listed(7, 60, lambda g, n: Pair(word(g, 3), word(g, 3), loan=n == 59))
    found = judge({"trained": pairs[:40], "held_out": pairs[40:]}, {}, 0)
    assert {record["group"] for record in found["records"]} == {ALL, "no loan words"}
