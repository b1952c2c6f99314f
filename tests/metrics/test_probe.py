"""The probe against transformers' own greedy decoding, on questions of which the starter answers some: copying a word."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tli.data import word_pairs
from tli.data.packing import sink_token
from tli.data.pair_store import Pair
from tli.metrics.probe import ASKED, SHOTS, draw, probe, rate
from tli.model import starter
from tli.model.checkpoint import open_checkpoint
from tli.runtime.device import resolve_device

CPU = resolve_device("cpu", "float32")


def test_examples_are_trained_and_questions_held_out():
    trained, held_out = ([Pair(f"{side}{i}", f"gloss{i}") for i in range(90)] for side in "th")
    examples, asked = draw(trained, held_out, 0)
    assert (len(examples), len(asked)) == (SHOTS, ASKED)
    assert set(examples) <= set(trained)
    assert set(asked) <= set(held_out)
    assert draw(trained, held_out, 0) == (examples, asked) != draw(trained, held_out, 1)
    assert [len(part) for part in draw(trained[:3], [], 0)] == [3, 0]


def test_a_rate_has_an_exact_interval():
    found = rate(np.array([True] * 3 + [False] * 17))
    assert (found["right"], found["asked"], found["value"]) == (3, 20, 0.15)
    # Clopper and Pearson's, by the beta distribution
    assert (found["low"], found["high"]) == pytest.approx((0.03207094, 0.37892682), abs=1e-6)


# the second has a window and caps its logits
@pytest.mark.parametrize(("family", "sizes"), [("llama", {}), ("gemma2", {"sliding_window": 512})])
def test_a_small_models_answers_are_those_of_greedy_decoding(family, sizes, make_model):
    folder = str(make_model(family, **sizes))
    check(folder, [Pair("paka", "cat"), Pair("mbwa", "dog")], [Pair(f"w{i}", "c", ("d", "e")) for i in range(5)], "swahili", "english")


@pytest.mark.slow
@pytest.mark.network
def test_the_starters_answers_are_those_of_greedy_decoding():
    words = [pair.target for pair in list(word_pairs.read_pairs(None, "swahili", "english"))[:60:2]]
    pairs = [Pair(word, word[::-1], (word,)) for word in words]
    given = check(starter.locate(None), [Pair(word, word) for word in words[:8]], pairs[8:], "word", "copy")
    # it copies nearly all of them, and reverses none
    assert given.any()
    assert not check(
        starter.locate(None), [Pair(word, word) for word in words[:8]], [Pair(w, w[::-1]) for w in words[8:]], "word", "copy"
    ).any()


def check(folder: str, examples: list[Pair], asked: list[Pair], source: str, target: str) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    given = probe(checkpoint, examples, asked, source, target, CPU)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), checkpoint.tokenizer()
    prompt = "".join(f"{source.capitalize()}: {pair.source}\n{target.capitalize()}: {pair.target}\n" for pair in examples)
    for pair, right in zip(asked, given, strict=True):
        question = f"{prompt}{source.capitalize()}: {pair.source}\n{target.capitalize()}:"
        ids = torch.tensor([[sink_token(tokenizer), *tokenizer(question, add_special_tokens=False)["input_ids"]]])
        answers = [tokenizer(f"{question} {gloss}\n", add_special_tokens=False)["input_ids"][ids.shape[1] - 1 :] for gloss in pair.accepted]
        # any end-of-text token is a token as others
        said = model.generate(ids, max_new_tokens=max(map(len, answers)), do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
        assert right == any(said[: len(answer)] == answer for answer in answers), pair
    return given


def test_a_prompt_that_is_longer_than_the_context_is_not_asked(make_model):
    checkpoint = open_checkpoint(str(make_model("llama")))
    many = [Pair("paka" * 40, "cat" * 40)] * 400
    assert probe(checkpoint, many, [Pair("mbwa", "dog")], "swahili", "english", CPU) is None
