"""A batch in parts has the gradients of the batch at once, and the memory of a part."""

import pytest
import torch

from tli.commands import train as train_module
from tli.config import TrainConfig
from tli.data.loader import BatchLoader
from tli.data.packing import tokenise
from tli.data.word_pairs import read_pairs
from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder, run
from tli.model.pooling import Pooling
from tli.runtime.device import resolve_device
from tli.training import grad_cache
from tli.training.loss import Objective

LOSSES = {"infonce": ("infonce", 0.1, 0.4), "hinge": ("hinge", 0.1, 0.4)}


class Step:
    """The first batch of an epoch of the 60 words, in parts of ``micro_batch`` pairs, for a model of two blocks with adapters."""

    def __init__(self, model: str, word_list: str, micro_batch: int | None, dropout: float = 0.0):
        checkpoint, device_config = open_checkpoint(model), resolve_device("cpu", "float32")
        pairs = read_pairs(word_list, "swahili", "english")
        words = tokenise(checkpoint.tokenizer(), [p.source for p in pairs] + [p.target for p in pairs], 64, " ")
        self.decoder = load_truncated_decoder(checkpoint, 2, words.vocab_ids, device_config)
        lora.inject(self.decoder, lora.LoRAConfig(rank=4, alpha=8.0, dropout=dropout))
        generator = torch.Generator().manual_seed(0)
        for adapter in lora.adapters(self.decoder).values():
            # at the start B is zero, and A without a gradient
            adapter.lora_B.data.normal_(std=0.1, generator=generator)
            adapter.seed = 7
        self.decoder.train()
        batches = BatchLoader(words, pairs, device_config, batch=32, micro_batch=micro_batch)
        self.parts, self.false_negatives = next(batches.epoch(0))
        self.pool = Pooling.from_checkpoint("final", checkpoint, device_config.device)

    def vectors(self, part):
        return self.pool(run(self.decoder, part), part)

    def backward(self, loss: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        objective = Objective(*LOSSES[loss])
        value = grad_cache.backward(self.parts, self.vectors, lambda vectors: objective(vectors, self.false_negatives))
        return value, [parameter.grad for parameter in lora.trainable(self.decoder)]


@pytest.fixture(scope="module")
def model(make_model) -> str:
    return str(make_model("llama"))


@pytest.mark.parametrize("micro_batch", [1, 7, 16])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_are_those_of_the_whole_batch(model, word_list, loss, micro_batch):
    whole, parts = (Step(model, str(word_list), size) for size in (None, micro_batch))
    assert len(whole.parts) == 1
    assert len(parts.parts) == -(-30 // micro_batch)
    (expected, gradients), (value, in_parts) = whole.backward(loss), parts.backward(loss)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    scale = max(gradient.abs().max() for gradient in gradients)
    assert scale > 0
    for got, right in zip(in_parts, gradients, strict=True):
        assert (got - right).abs().max() <= 1e-5 * scale


def test_a_part_drops_the_same_entries_both_times(model, word_list):
    step, seen = Step(model, str(word_list), 8, dropout=0.5), {}
    plain = step.vectors

    def watched(part):
        seen.setdefault(id(part), []).append(plain(part).detach().clone())
        return plain(part)

    step.vectors = watched
    step.backward("infonce")
    assert len(seen) == len(step.parts) == 4
    for first, second in seen.values():
        assert torch.equal(first, second)
    assert not torch.equal(seen[id(step.parts[0])][0], Step(model, str(word_list), 8).vectors(step.parts[0]))


def test_no_more_than_a_part_is_held(model, word_list):
    def held(step: Step) -> int:
        """The most bytes that the graph held at one time."""
        now, most = 0, 0

        class Kept:
            def __init__(self, tensor):
                nonlocal now, most
                self.tensor = tensor
                now += tensor.nbytes
                most = max(most, now)

            def __del__(self):
                nonlocal now
                now -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            step.backward("infonce")
        return most

    whole, parts = (held(Step(model, str(word_list), size)) for size in (None, 4))
    assert parts < whole / 3


def test_a_run_in_parts_learns_what_the_whole_does(model, word_list, tmp_path):
    options = {
        "model": model,
        "pairs": str(word_list),
        "rank": 4,
        "batch": 27,
        "epochs": 3,
        "warmup": 2,
        "dropout": 0.0,
        "no_report": True,
        "dtype": "float32",
    }
    runs = [
        train_module.train(TrainConfig(**options, output=str(tmp_path / str(size)), micro_batch=size))["training"] for size in (None, 5)
    ]
    assert runs[0]["steps"] == runs[1]["steps"] == 6
    assert runs[1]["loss_last"] == pytest.approx(runs[0]["loss_last"], rel=1e-4)
    adapters = [lora.load(tmp_path / str(size)).factors for size in (None, 5)]
    for path, (_, b) in adapters[0].items():
        torch.testing.assert_close(adapters[1][path][1], b, rtol=1e-2, atol=1e-5)
