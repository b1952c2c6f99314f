"""Pairs on disk are the pairs that went there, and their keys say who shares a word; long lists are read, merged and measured alike."""

import dataclasses
import functools
import itertools
import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tli import train
from tli.commands import scan
from tli.commands import train as train_module
from tli.commands.evaluate import evaluate
from tli.config import EvaluateConfig, ScanConfig, TrainConfig
from tli.data import packing, word_pairs
from tli.data.packing import tokenise
from tli.data.pair_store import Pair, as_disk_backed
from tli.data.word_pairs import read_pairs
from tli.model import lora
from tli.runtime.errors import TliError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PAIRS = st.lists(
    st.builds(Pair, TEXT, TEXT, st.lists(TEXT, max_size=3).map(tuple), TEXT, st.sampled_from([True, False, None])), max_size=12
)
WORD = st.sampled_from(["a", "A", "b", "é", "e\u0301", "É", "ß", "SS", "ss", "c"])


@hypothesis.given(PAIRS, st.data())
@hypothesis.settings(deadline=None)
def test_pairs_come_back_as_they_were_one_by_one_in_slices_and_by_number(pairs, data):
    kept = as_disk_backed(pairs)
    assert list(kept) == pairs
    assert [kept[i] for i in range(len(pairs))] == pairs
    begin, end, step = data.draw(st.tuples(st.integers(-12, 12), st.integers(-12, 12), st.sampled_from([-2, -1, 1, 3])))
    assert list(kept[begin:end:step]) == pairs[begin:end:step]
    with pytest.raises(IndexError):
        kept[len(pairs)]
    numbers = data.draw(st.lists(st.integers(0, max(0, len(pairs) - 1)), max_size=20 if pairs else 0))
    part = kept.subset(np.array(numbers, np.int64))
    assert list(part) == [pairs[i] for i in numbers]
    # a view of a view
    assert list(part[1:]) == [pairs[i] for i in numbers[1:]]
    # equal pairs, equal bytes, and the other way round
    records = list(kept.records())
    for i, j in itertools.combinations(range(len(pairs)), 2):
        assert (records[i] == records[j]) == (pairs[i] == pairs[j])


@hypothesis.given(st.lists(st.builds(Pair, WORD, WORD, st.lists(WORD, max_size=3).map(tuple)), max_size=10), st.data())
@hypothesis.settings(deadline=None)
def test_keys_are_equal_where_the_words_are(pairs, data):
    numbers = data.draw(st.lists(st.integers(0, max(0, len(pairs) - 1)), max_size=15 if pairs else 0))
    keys = as_disk_backed(pairs)[::-1].keys(np.array(numbers, np.int64))
    chosen = [pairs[::-1][i] for i in numbers]
    words = [pair.source for pair in chosen] + [gloss for pair in chosen for gloss in pair.accepted]
    found = [*keys.sources.tolist(), *keys.glosses.tolist()]
    assert len(found) == len(words)
    folded = [unicodedata.normalize("NFC", word.casefold()) for word in words]
    for (key, word), (other_key, other) in itertools.combinations(zip(found, folded), 2):
        assert (key == other_key) == (word == other)
    assert keys.gloss_owners().tolist() == [i for i, pair in enumerate(chosen) for _ in pair.accepted]
    assert np.diff(keys.indptr).tolist() == [len(pair.accepted) for pair in chosen]


@hypothesis.given(
    st.lists(st.tuples(WORD, WORD, st.sampled_from(["", "noun"]), st.sampled_from(["", "yes", "no"])), min_size=1, max_size=12)
)
@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_rows_of_one_word_become_one_pair_where_the_first_stood(tmp_path, rows):
    path = tmp_path / "words.tsv"
    path.write_text("swahili\tenglish\tclass\tloan\n" + "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    expected = {}
    for source, target, word_class, loan in rows:
        source, target = (unicodedata.normalize("NFC", word) for word in (source, target))
        pair = expected.setdefault(source.casefold(), Pair(source, target))
        if target.casefold() not in [gloss.casefold() for gloss in pair.accepted]:
            pair = dataclasses.replace(pair, synonyms=(*pair.synonyms, target))
        loan = {"yes": True, "no": False, "": None}[loan] if pair.loan is None else pair.loan
        expected[source.casefold()] = dataclasses.replace(pair, word_class=pair.word_class or word_class, loan=loan)
    assert list(read_pairs(path, "swahili", "english")) == list(expected.values())


# what is wrong stands far behind the first buffer that is read
FAR = 30_000


@pytest.mark.parametrize(
    ("name", "head", "row", "wrong", "says"),
    [
        ("words.tsv", b"\xef\xbb\xbfswahili\tenglish\n", b"a%d\tb%d\n", b"caf\xe9\tx\n", "the file must be UTF-8, got byte 0xe9"),
        ("words.txt", b"swahili\tenglish\n", b"a%d\tb%d\n", b"caf\n", "the header's 2 columns"),
        ("words.csv", b"swahili,english\r\n", b"a%d,b%d\r\n", b"a,b,c\r\n", "the header's 2 columns"),
        ("words.tsv", b"swahili\tenglish\n", b"a%d\tb%d\n", b"a\t \n", "english must hold a word"),
        ("words.jsonl", b"\n", b'{"swahili": "a%d", "english": "b%d"}\n', b"{\n", "the file must be valid JSON"),
        ("words.jsonl", b"\xef\xbb\xbf\n", b'{"swahili": "a%d", "english": "b%d"}\n', b'"\xe9"\n', "the file must be UTF-8"),
    ],
)
def test_an_error_far_into_a_list_names_its_line(tmp_path, name, head, row, wrong, says):
    path = tmp_path / name
    path.write_bytes(head + b"".join(row % (i, i) for i in range(FAR)) + wrong + row % (FAR, FAR))
    with pytest.raises(TliError) as caught:
        read_pairs(path, "swahili", "english")
    assert str(caught.value).startswith(f"{path}:{FAR + 2}: ")
    assert says in str(caught.value)


def test_words_tokenised_some_at_a_time_are_the_same_words(tokenizer, word_list, monkeypatch):
    texts = [pair.source for pair in read_pairs(word_list, "swahili", "english")]
    whole = tokenise(tokenizer, texts, 64, " ")
    monkeypatch.setattr(packing, "_CHUNK_WORDS", 7)
    parts = tokenise(tokenizer, iter(texts), 64, " ")
    for field in dataclasses.fields(whole):
        assert np.array_equal(getattr(whole, field.name), getattr(parts, field.name)), field.name
    for number, text in enumerate(texts):
        ids = [tokenizer.bos_token_id, *tokenizer(" " + text, add_special_tokens=False)["input_ids"]]
        tokens, (length,) = parts.padded(np.array([number]))
        assert parts.vocab_ids[tokens[0, :length]].tolist() == ids
    assert set(parts.vocab_ids.tolist()) == set(parts.ids.tolist())
    everything = parts.with_all_rows(len(tokenizer))
    assert everything.padded(np.arange(5))[0].max() == parts.ids[: parts.indptr[5]].max()


def few(monkeypatch, most: int) -> None:
    """Let lists of more than so many pairs count as long."""
    monkeypatch.setattr(word_pairs, "sample", functools.partial(word_pairs.sample, most=most))


@pytest.mark.slow
def test_of_a_long_list_a_sample_is_measured_and_said_to_be_one(make_model, word_list, tmp_path, monkeypatch, capsys):
    settings = {
        "model": str(make_model("llama")),
        "pairs": str(word_list),
        "rank": 4,
        "batch": 14,
        "epochs": 2,
        "warmup": 2,
        "held_out": 0.3,
        "layer": 2,
    }
    captured, plain = [], train_module.measure_layers

    def watched(checkpoint, splits, *others, **named):
        captured.append((splits, plain(checkpoint, splits, *others, **named)))
        return captured[-1][1]

    monkeypatch.setattr(train_module, "measure_layers", watched)
    whole = train(TrainConfig(**settings, output=str(tmp_path / "whole")))
    assert "random sample" not in (tmp_path / "whole" / "report.md").read_text()
    few(monkeypatch, 20)
    facts = train(TrainConfig(**settings, output=str(tmp_path / "sampled")))
    files = [(tmp_path / name / lora.ADAPTER_FILE).read_bytes() for name in ("whole", "sampled")]
    assert files[0] == files[1]
    assert facts["pairs"] == whole["pairs"]
    trained, held_out = whole["pairs"]["trained"], whole["pairs"]["held_out"]
    assert trained > 20 > held_out
    for record in facts["measurements"]:
        assert record["n"] == {"trained": 20, "held_out": held_out}[record["split"]]
    for file in ("report.md", "README.md"):
        assert "(measured: a random sample, 20 trained)" in (tmp_path / "sampled" / file).read_text()
    # a true pair's cosine does not depend on who else is measured
    (splits, (of_whole, _)), (sampled, (of_sample, _)) = captured[:2]
    listed = {split: list(pairs) for split, pairs in splits.items()}
    assert set(sampled["trained"]) < set(listed["trained"])
    for (split, *place), alignment in of_sample.items():
        among = [listed[split].index(pair) for pair in sampled[split]]
        assert alignment.cosine == pytest.approx(of_whole[split, *place].cosine[among], abs=1e-5)
    # the same pairs again where the adapter is evaluated, and where the layer is chosen
    evaluated = evaluate(EvaluateConfig(adapters=[str(tmp_path / "sampled")], layers="2", output=str(tmp_path / "evaluation")))
    assert f"trained pairs (n=20 of {trained}, drawn at random)" in " ".join(capsys.readouterr().err.split())
    for split, when in itertools.product(("trained", "held_out"), ("before", "after")):
        key = {"split": split, "when": when, "layer": 2, "metric": "gap"}
        values = [next(r["value"] for r in found["measurements"] if key.items() <= r.items()) for found in (facts, evaluated)]
        assert values[0] == pytest.approx(values[1], abs=1e-6)
    scanned = scan.scan(
        ScanConfig(split="trained", **{k: settings[k] for k in ("model", "pairs", "held_out")}, output=str(tmp_path / "scan"))
    )
    assert (scanned["pairs"]["scanned"], scanned["pairs"]["listed"]) == (20, trained)
    auto = train(TrainConfig(**{**settings, "layer": "auto"}, no_report=True, output=str(tmp_path / "auto")))
    assert auto["config"]["layer"] == scanned["choice"]["gap"]
