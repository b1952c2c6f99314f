"""Prefix-trie packing: every word keeps its own path, sees its own prefix and nothing else, and nothing is computed twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tli.data.packing import pack, tokenise
from tli.runtime.errors import TliError

SINK = 7

word_lists = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=40)


def padded(words: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([1 + len(word) for word in words])
    # what stands behind a word must not matter
    tokens = np.random.default_rng(0).integers(0, 4, (len(words), lengths.max()))
    for row, word in zip(tokens, words, strict=True):
        row[: 1 + len(word)] = [SINK, *word]
    return tokens, lengths


@settings(deadline=None, max_examples=150)
@given(words=word_lists, width=st.integers(1, 24), pool_bos=st.booleans())
def test_each_word_is_its_own_path_and_sees_exactly_itself(words, width, pool_bos):
    tokens, lengths = padded(words)
    packed = pack(tokens, lengths, np.full(len(words), 0 if pool_bos else 1), width)
    used_width = packed.input_ids.shape[1]
    assert used_width <= max(width, lengths.max())
    ids, depths = packed.input_ids.ravel(), packed.position_ids.ravel()
    for number, word in enumerate(words):
        nodes = packed.indices[packed.indptr[number] : packed.indptr[number + 1]]
        path = nodes if pool_bos else np.concatenate([[packed.sinks[number]], nodes])
        assert ids[path].tolist() == [SINK, *word]
        assert depths[path].tolist() == list(range(1 + len(word)))
        assert path[0] == packed.sinks[number]
        assert len(set(path // used_width)) == 1
        for depth, node in enumerate(path):
            seen = np.flatnonzero(packed.attention_mask[node // used_width, node % used_width])
            assert sorted(seen) == sorted(path[: depth + 1] % used_width)


@settings(deadline=None, max_examples=100)
@given(words=word_lists)
def test_one_wide_bin_holds_each_distinct_prefix_once(words):
    tokens, lengths = padded(words)
    packed = pack(tokens, lengths, np.ones(len(words), int), width=10_000)
    prefixes = {tuple(word[:end]) for word in words for end in range(len(word) + 1)}
    assert packed.nodes == packed.input_ids.size == len(prefixes)


@settings(deadline=None, max_examples=100)
@given(words=word_lists, width=st.integers(7, 24))
def test_padding_sees_itself_alone_and_belongs_to_no_word(words, width):
    tokens, lengths = padded(words)
    packed = pack(tokens, lengths, np.zeros(len(words), int), width)
    padding = np.setdiff1d(np.arange(packed.input_ids.size), packed.indices)
    assert len(padding) == packed.input_ids.size - packed.nodes
    attention_mask = packed.attention_mask.reshape(-1, packed.input_ids.shape[1])[padding]
    assert (attention_mask.sum(axis=1) == 1).all()
    assert attention_mask[np.arange(len(padding)), padding % packed.input_ids.shape[1]].all()


def test_bins_of_real_words_are_well_filled(tokenizer):
    from tli.data import word_pairs

    pairs = word_pairs.read_pairs(None, "swahili", "english")[:256]
    words = tokenise(tokenizer, [pair.source for pair in pairs] + [pair.target for pair in pairs], window=64)
    packed = words.pack(np.arange(512))
    assert packed.nodes / packed.input_ids.size > 0.95
    # the point of it all
    assert packed.input_ids.size < 512 * words.lengths.max() / 2


def test_tokens_come_behind_one_sink_whatever_the_tokenizer_adds(tokenizer):
    words = tokenise(tokenizer, ["kitabu", "book"], window=64)
    for begin, end, text in zip(words.indptr, words.indptr[1:], ["kitabu", "book"]):
        ids = words.ids[begin:end]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize("prefix", ["", " ", "neno: "])
def test_the_words_own_tokens_begin_where_they_reach_into_it(tokenizer, prefix):
    words = tokenise(tokenizer, ["kitabu", "mtu"], window=64, prefix=prefix)
    packed = words.pack(np.arange(2))
    for number, text in enumerate(["kitabu", "mtu"]):
        own = packed.input_ids.ravel()[packed.indices[packed.indptr[number] : packed.indptr[number + 1]]]
        assert tokenizer.decode(words.vocab_ids[own]).strip() == text
        assert tokenizer.decode(words.ids[words.indptr[number] + 1 : words.indptr[number + 1]]) == prefix + text


@pytest.mark.parametrize(("word", "got"), [("a" * 500, "500"), ("", "0")])
def test_a_word_beyond_the_window_or_without_tokens_is_named(tokenizer, word, got):
    with pytest.raises(TliError, match=rf"^word '{word[:40]}.*must have 1 to 63 tokens .*, got {got}; ") as error:
        tokenise(tokenizer, ["fine", word], window=64)
    assert len(str(error.value)) < 200
