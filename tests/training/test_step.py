"""A step that is recorded and replayed is the step as it is written: its batch, rate and dropout come out of memory."""

import dataclasses

import numpy as np
import pytest
import torch
from tli_kernels import checks, launch

from tli.config import TrainConfig
from tli.data.loader import BatchLoader, prefetch, tensors_of
from tli.data.packing import tokenise
from tli.data.word_pairs import read_pairs
from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import run, truncate
from tli.model.pooling import pooling
from tli.runtime import ops
from tli.runtime.device import Placement, place
from tli.runtime.errors import TliError
from tli.training.step import CapturedStep, TrainStep, _padded

pytestmark = pytest.mark.slow


class Replayed(TrainStep):
    """Records without a GPU: what stands for a graph takes the step from the memory that a graph would read."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.record = True

    def _recorded(self, parts, same):
        recording = CapturedStep(self, [part.clone() for part in parts], same.clone(), torch.zeros(()))
        recording.graph = type("Graph", (), {"replay": lambda _: self._again(recording)})()
        return recording

    def _again(self, recording):
        loss = self._gradients(recording.parts, recording.same)
        self._update(loss)
        recording.loss.copy_(loss)


def make(stepper, model: str, word_list: str, placement: Placement, **options):
    """A stepper over a model of two blocks, and the batches of an epoch of 20 pairs."""
    config = TrainConfig(model=model, pairs=word_list, **{"rank": 4, "batch": 7, "dropout": 0.0, "warmup": 2, "epochs": 3, **options})
    checkpoint, pairs = open_checkpoint(model), list(read_pairs(word_list, "swahili", "english"))[:20]
    words = tokenise(checkpoint.tokenizer(), [p.source for p in pairs] + [p.target for p in pairs], 64, " ")
    decoder = truncate(checkpoint, 2, words.rows, placement)
    lora.inject(decoder, lora.LoRAConfig(rank=4, alpha=8.0, targets=config.targets, dropout=config.dropout))
    pool = pooling("final", checkpoint, placement.device, placement.ops)
    batches = BatchLoader(config, words, np.arange(len(pairs)), pairs, placement)
    return stepper(config, decoder.train(), lambda part: pool(run(decoder, part), part), batches.total, placement), batches


def taken(steps: TrainStep, batches: BatchLoader) -> list[float]:
    """The losses of two epochs' steps."""
    losses = []
    for epoch in range(2):
        for parts, same in prefetch(batches.epoch(epoch), batches.placement.device):
            steps.take(epoch * batches.per_epoch + len(losses) % batches.per_epoch, parts, same)
            losses += steps.finished(wait=True)
    return losses


@pytest.fixture
def interpreted():
    """Few steps by the fused ops, in the interpreter."""
    return place("cpu", "float32", impl="fused")


@pytest.mark.skipif(not checks.interpreted(), reason="on a GPU the real thing is tested")
@pytest.mark.parametrize("options", [{"dropout": 0.2}, {"micro_batch": 4, "loss": "hinge", "targets": "q_proj,v_proj"}], ids=str)
def test_replays_are_the_steps_as_written(make_model, word_list, interpreted, options):
    pairs = [make(kind, str(make_model("llama")), str(word_list), interpreted, **options) for kind in (TrainStep, Replayed)]
    plain, replayed = (taken(*pair) for pair in pairs)
    assert pairs[1][0].recordings
    np.testing.assert_allclose(replayed, plain, rtol=1e-5)
    for one, other in zip(pairs[0][0].parameters, pairs[1][0].parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not checks.interpreted(), reason="on a GPU the real thing is tested")
def test_a_replay_drops_other_entries_each_time_and_every_shape_has_its_recording(make_model, word_list, interpreted):
    steps, batches = make(Replayed, str(make_model("llama")), str(word_list), interpreted, dropout=0.5, lr=1e-12, weight_decay=0.0)
    # B is zero at the start: nothing would come of what is dropped
    for adapter in steps.adapters.values():
        adapter.lora_B.data.normal_(std=0.3)
    (parts, same), (others, other_same) = list(batches.epoch(0))[:2]
    for position in range(3):
        steps.take(position, parts, same)
    assert not steps.recordings
    losses = []
    for position in (3, 4, 4):
        steps.take(position, parts, same)
        losses += list(steps.finished())[-1:]
    assert losses[0] != losses[1] == losses[2]
    steps.take(5, others, other_same)
    shapes = {tuple(tensor.shape for tensor in tensors_of(*_padded(*batch))) for batch in ((parts, same), (others, other_same))}
    assert set(steps.recordings) == shapes


@pytest.mark.skipif(not checks.interpreted(), reason="compares with the plain ops on the CPU")
def test_a_padded_batch_has_the_loss_and_gradients_of_the_batch(make_model, word_list, interpreted):
    found = {}
    for name, step in (("plain", 1), ("padded", 16)):
        steps, batches = make(TrainStep, str(make_model("qwen3")), str(word_list), interpreted)
        batches.placement = dataclasses.make_dataclass("Wide", ["dtype", "device", "width_step"])(torch.float32, torch.device("cpu"), step)
        parts, same = next(iter(batches.epoch(0)))
        # a pair that is no negative, twice over, is what filling up makes of one
        same = torch.cat([same, torch.tensor([[6, 3]])])
        if name == "padded":
            parts, same = _padded(parts, same)
            assert parts[0].input_ids.shape[1] % 16 == 0 == len(parts[0].indices) % 256 == len(same) % 16
        loss = steps._gradients(parts, same)
        found[name] = loss, [parameter.grad for parameter in steps.parameters]
    torch.testing.assert_close(found["padded"][0], found["plain"][0], rtol=1e-5, atol=0)
    for got, right in zip(found["padded"][1], found["plain"][1], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(
    "options", [{}, {"loss": "hinge", "micro_batch": 8, "weights": "nf4", "dropout": 0.1}], ids=["infonce", "hinge-nf4"]
)
def test_nothing_in_a_gpus_step_waits_for_the_gpu(make_model, word_list, family, options):
    """A tensor without memory has no value to wait for: asking for one raises."""
    model = str(make_model(family, hidden_size=64, intermediate_size=128))
    placement = Placement(torch.bfloat16, torch.device("meta"), options.get("weights", "full"))
    cpu = Placement(torch.bfloat16, torch.device("cpu"), placement.weights, ops.fused())
    steps, batches = make(TrainStep, model, str(word_list), cpu, **options)
    parts, same = next(iter(batches.epoch(0)))
    parts = [dataclasses.replace(part.clone(), **moved(part)) for part in parts]
    steps.decoder.to("meta")
    for module in steps.decoder.modules():
        if isinstance(getattr(module, "weight", None), ops.NF4Weight):
            module.weight = module.weight.to(torch.device("meta"))
    for adapter in steps.adapters.values():
        adapter.seed = torch.zeros(1, dtype=torch.int64, device="meta")
    pool = pooling("rms", open_checkpoint(model), torch.device("meta"), ops.fused())
    steps.vectors_of = lambda part: pool(run(steps.decoder, part), part)
    parameters = lora.trainable(steps.decoder)
    with launch.recording(90) as launches:
        loss = steps._gradients(parts, same.to("meta"))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert loss.is_meta
    assert all(parameter.grad is not None for parameter in parameters)
    assert {"_down_kernel", "_outer_kernel"} < {launch.kernel.fn.__name__ for launch in launches}


def moved(part) -> dict:
    *plain, node_indptr, words = (tensor.to("meta") for tensor in part.tensors())
    names = ("input_ids", "position_ids", "mask", "indptr", "indices", "sinks")
    return {**dict(zip(names, plain, strict=True)), "transposed": (node_indptr, words)}


def test_a_loss_that_is_not_finite_changes_nothing(make_model, word_list):
    steps, batches = make(TrainStep, str(make_model("llama")), str(word_list), place("cpu", "float32"))
    parts, same = next(iter(batches.epoch(0)))
    steps.take(0, parts, same)
    before = [parameter.detach().clone() for parameter in steps.parameters]
    steps.decoder.embed_tokens.weight[0] = float("nan")
    with pytest.raises(TliError, match="^step 2: the loss must be finite, got nan; lower --lr"):
        steps.take(1, parts, same)
    assert all(torch.equal(one, other) for one, other in zip(before, steps.parameters, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["full", "nf4"])
def test_graphs_on_a_gpu_take_the_steps_as_written(make_model, word_list, weights):
    model, placement = str(make_model("llama", hidden_size=64, intermediate_size=128)), place("cuda", "float32", weights, "fused")
    (as_written, same_batches), (steps, batches) = (make(TrainStep, model, str(word_list), placement, dropout=0.2) for _ in range(2))
    as_written.record = False
    np.testing.assert_allclose(taken(steps, batches), taken(as_written, same_batches), rtol=1e-4)
    assert steps.recordings


@pytest.mark.gpu
def test_on_a_gpu_a_loss_that_is_not_finite_changes_nothing_from_then_on(make_model, word_list):
    steps, batches = make(TrainStep, str(make_model("llama")), str(word_list), place("cuda", "float32", impl="fused"))
    parts, same = next(iter(batches.epoch(0)))
    for position in range(5):
        steps.take(position, parts, same)
    before = [parameter.detach().clone() for parameter in steps.parameters]
    steps.decoder.embed_tokens.weight[0] = float("nan")
    steps.take(5, parts, same)
    assert not np.isfinite(list(steps.finished(wait=True))[-1])
    assert all(torch.equal(one, other) for one, other in zip(before, steps.parameters, strict=True))
