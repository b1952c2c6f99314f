"""Does the model know the language at all? A translation prompt with sixteen examples, and how often it is answered by an accepted gloss.

No text is generated: a gloss is what greedy decoding gives if each of its tokens, and the line break behind it, is the likeliest one after
those before it, which one pass tells of all glosses at once. The prompts share their examples, so all of them are one trie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tli.data.batch import to_batch
from tli.data.packing import TokenisedWords, sink_token
from tli.data.pair_store import Pair
from tli.metrics.perplexity import head_name, log_probabilities, read_head
from tli.model.checkpoint import Checkpoint, context_length
from tli.model.hidden_states import stream_layers
from tli.runtime.device import DeviceConfig

SHOTS, ASKED = 16, 64
_WIDTH = 1024


def draw(trained: Sequence[Pair], held_out: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Sixteen trained pairs as examples, and up to 64 held-out ones to ask for."""
    generator = np.random.default_rng([seed, 16])
    examples, asked = ([pairs[i] for i in generator.permutation(len(pairs))[:n]] for pairs, n in ((trained, SHOTS), (held_out, ASKED)))
    return examples, asked


@torch.no_grad()
def probe(
    checkpoint: Checkpoint,
    examples: Sequence[Pair],
    asked: Sequence[Pair],
    source: str,
    target: str,
    device_config: DeviceConfig,
    done: Callable[[], None] = lambda: None,
) -> np.ndarray | None:
    """Ask the model for translations, ``Swahili: maji``, ``English: water`` and a line break for each example.

    Args:
        checkpoint:      an open checkpoint
        examples, asked  pairs; any accepted gloss of an asked one is right
        source, target:  the languages' names
        device_config:   dtype, device and rounding of the weights
        done:            called after each layer

    Returns:
        bool [B]: whether greedy decoding gives an accepted gloss of each asked pair; None where the model's files are not all here, where
        it has no head, or where a prompt is longer than its context.
    """
    prompt = "".join(_line(pair, source, target) + f" {pair.target}\n" for pair in examples)
    owners = np.repeat(np.arange(len(asked)), [len(pair.accepted) for pair in asked])
    texts = [(prompt + _line(pair, source, target), f" {gloss}\n") for pair in asked for gloss in pair.accepted]
    words, tokens = _tokenised(checkpoint.tokenizer(), texts)
    longest = int(words.lengths.max())
    if longest > context_length(checkpoint) or head_name(checkpoint) is None:
        return None
    packed = words.pack(np.arange(len(texts)), width=max(_WIDTH, longest))
    batch = to_batch(packed, device_config.dtype, device_config.device)
    outputs: list[Tensor] = []

    def visit(layer: int | str, states: Sequence[Tensor]) -> None:
        if layer == "output":
            outputs.extend(states)
        done()

    if stream_layers(checkpoint, batch, words.vocab_ids, device_config, [None], visit) is not None:
        return None
    head = read_head(checkpoint, device_config)
    likeliest = log_probabilities(outputs[0][batch.indices], head, checkpoint.config, device_config.ops.linear).argmax(1).cpu().numpy()
    given = np.zeros(len(asked), bool)
    for owner, wanted, begin in zip(owners, tokens, batch.indptr.tolist()):
        # the first node is the last of the question, whose likeliest token is the first of the answer
        given[owner] |= (likeliest[begin : begin + len(wanted)] == wanted).all()
    return given


def rate(given: np.ndarray) -> dict:
    """How many were right, of how many, and the share with its exact 95 % interval (Clopper and Pearson 1934)."""
    import scipy.stats

    right, asked = int(given.sum()), len(given)
    interval = scipy.stats.binomtest(right, asked).proportion_ci(0.95)
    return {"shots": SHOTS, "asked": asked, "right": right, "value": right / asked, "low": interval.low, "high": interval.high}


def _line(pair: Pair, source: str, target: str) -> str:
    return f"{source.capitalize()}: {pair.source}\n{target.capitalize()}:"


def _tokenised(tokenizer, texts: Sequence[tuple[str, str]]) -> tuple[TokenisedWords, list[np.ndarray]]:
    """Questions with their answers behind one sink; a word's own tokens are the answer's and the one before them."""
    encoded = tokenizer(["".join(text) for text in texts], add_special_tokens=False, return_offsets_mapping=True)
    ids, indptr, starts, answers = [], [0], [], []
    for (question, _), tokens, spans in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        own = sum(end > len(question) for _, end in spans)
        ids += [sink_token(tokenizer), *tokens]
        indptr.append(len(ids))
        # the sink stands in front
        starts.append(len(tokens) - own)
        answers.append(np.array(tokens[len(tokens) - own :], np.int64))
    every = np.array(ids, np.int32)
    return TokenisedWords(every, np.array(indptr), np.array(starts, np.int32), np.unique(every)), answers
