"""The step under packing is the padded step: the same loss and the same gradients, for every family."""

import numpy as np
import pytest
import torch

from tests.support.words import tokens_of
from tli.data.batch import to_batch
from tli.data.packing import tokenise
from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder, run
from tli.model.families import FAMILIES
from tli.model.pooling import Pooling, resolve_token_norm
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError
from tli.training.loss import Objective

CPU = resolve_device("cpu", "float32")
SOURCES = ["kitabu", "kitanda", "mtoto", "mtu", "maji", "nyumba"]
TARGETS = ["book", "bed", "child", "person", "water", "house"]


def padded_words(decoder, words, token_norm, checkpoint, pool_bos):
    """Word states from one row per word, by plain operations."""
    attended = torch.from_numpy(np.arange(tokens_of(words).shape[1]) < words.lengths[:, None])
    states = decoder(input_ids=torch.from_numpy(tokens_of(words)), attention_mask=attended.long(), use_cache=False).last_hidden_state
    eps = checkpoint.norm_eps
    if token_norm != "none":
        states = states / (states.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
    if token_norm == "final":
        states = states * checkpoint.final_norm()[0]
    pooled = attended.clone()
    pooled[:, 0] = pool_bos
    means = (states * pooled[..., None]).sum(dim=1) / pooled.sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(means, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("loss", "token_norm", "pool_bos"),
    [("infonce", "final", False), ("infonce", "rms", False), ("hinge", "none", True)],
    ids=["default", "rms", "paper"],
)
def test_loss_and_gradients_equal_the_padded_ones(make_model, tokenizer, family, loss, token_norm, pool_bos):
    checkpoint = open_checkpoint(str(make_model(family)))
    token_norm = "rms" if token_norm == "final" and FAMILIES[family].layer_norm else token_norm
    words = tokenise(tokenizer, SOURCES + TARGETS, window=24)
    objective = Objective(loss, temperature=0.1, margin=0.4)
    false_negatives = torch.tensor([[0, 1], [1, 0]])
    results = []
    for packed in (True, False):
        decoder = load_truncated_decoder(checkpoint, 2, words.vocab_ids, CPU)
        lora.inject(decoder, lora.LoRAConfig(rank=3, alpha=6))
        generator = torch.Generator().manual_seed(1)
        for adapter in lora.adapters(decoder).values():
            adapter.lora_B.data.normal_(std=0.05, generator=generator)
        if packed:
            batch = to_batch(words.pack(np.arange(12), pool_bos, width=12), torch.float32, CPU.device)
            states = Pooling.from_checkpoint(token_norm, checkpoint, CPU.device)(run(decoder, batch), batch)
        else:
            states = padded_words(decoder, words, token_norm, checkpoint, pool_bos)
        value = objective(states, false_negatives)
        value.backward()
        results.append((value.detach(), states.detach(), [parameter.grad for parameter in lora.trainable(decoder)]))
    (value, states, gradients), (padded_value, padded_states, padded_gradients) = results
    torch.testing.assert_close(states, padded_states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, padded_value, rtol=1e-5, atol=1e-5)
    largest = max(gradient.abs().max() for gradient in padded_gradients)
    assert largest > 0
    for gradient, padded in zip(gradients, padded_gradients, strict=True):
        assert (gradient - padded).abs().max() < 1e-4 * largest


def test_a_layer_norm_is_no_token_norm(make_model):
    checkpoint = open_checkpoint(str(make_model("gpt_neox")))
    assert resolve_token_norm("auto", checkpoint) == "rms"
    with pytest.raises(
        TliError, match="^--token-norm: the model's final norm must be an RMS norm .*, got gpt_neox's LayerNorm; choose rms"
    ):
        Pooling.from_checkpoint("final", checkpoint, CPU.device)
