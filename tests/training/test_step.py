"""A step that is recorded and replayed is the step as it is written: its batch, rate and dropout come out of memory."""

import dataclasses
import functools
import itertools

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
from tli.model.decoder import load_truncated_decoder, run
from tli.model.families import FAMILIES
from tli.model.pooling import Pooling, resolve_token_norm
from tli.model.text_windows import read_kept_texts
from tli.runtime import ops
from tli.runtime.device import DeviceConfig, resolve_device
from tli.runtime.errors import TliError
from tli.training.kept_text import KeptText
from tli.training.loss import Objective
from tli.training.step import CapturedStep, OptimiserSettings, TrainStep, _padded

pytestmark = pytest.mark.slow


class Replayed(TrainStep):
    """Records without a GPU: what stands for a graph takes the step from the memory that a graph would read."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.use_cuda_graphs = True

    def _capture(self, micro_batches, false_negatives):
        recording = CapturedStep(self, [micro_batch.clone() for micro_batch in micro_batches], false_negatives.clone(), torch.zeros(5))
        recording.graph = type("Graph", (), {"replay": lambda _: self._again(recording)})()
        return recording

    def _again(self, recording):
        recording.measured.copy_(self._update(self._gradients(recording.micro_batches, recording.false_negatives)))


def make(stepper, model: str, word_list: str, device_config: DeviceConfig, **options):
    """A stepper over a model of two blocks, and the batches of an epoch of 20 pairs; ``options`` in place of those of a training."""
    config = TrainConfig(**{"batch": 7, "dropout": 0.0, "warmup": 2, "epochs": 3, **options})
    checkpoint, pairs = open_checkpoint(model), list(read_pairs(word_list, "swahili", "english"))[:20]
    words = tokenise(checkpoint.tokenizer(), [p.source for p in pairs] + [p.target for p in pairs], 64, " ")
    texts = [] if config.keep is None else read_kept_texts(config.keep, checkpoint)
    vocab_ids = functools.reduce(np.union1d, (windows.vocab_ids for windows in texts), words.vocab_ids)
    words = dataclasses.replace(words, vocab_ids=vocab_ids)
    decoder = load_truncated_decoder(checkpoint, 2, vocab_ids, device_config)
    lora.inject(decoder, lora.LoRAConfig(rank=4, alpha=8.0, targets=config.targets, dropout=config.dropout))
    keep = KeptText(lambda batch: run(decoder, batch), texts, vocab_ids, device_config, 100.0, 0) if texts else None
    pool = Pooling.from_checkpoint(resolve_token_norm("auto", checkpoint), checkpoint, device_config.device, device_config.ops)
    batches = BatchLoader(words, pairs, device_config, batch=config.batch, epochs=config.epochs, micro_batch=config.micro_batch)
    objective = Objective(config.loss, config.temperature, config.margin, device_config.ops)
    optimiser = OptimiserSettings(config.lr, config.weight_decay, config.clip, config.warmup, config.schedule, batches.total)
    embed = lambda micro_batch: pool(run(decoder, micro_batch), micro_batch)  # noqa: E731
    return stepper(decoder.train(), embed, objective, optimiser, keep=keep), batches


def taken(steps: TrainStep, batches: BatchLoader) -> list[tuple[float, float, float]]:
    """Loss, learning rate and gradient norm of an epoch's steps, each batch twice: where there are graphs, the second time is a replay."""
    results, epoch = [], itertools.islice(batches.steps(), batches.per_epoch)
    twice = (batch for batch in prefetch(epoch, batches.device_config.device) for _ in range(2))
    for position, batch in enumerate(twice):
        steps(position, *batch)
        results += map(dataclasses.astuple, steps.pop_results(wait=True))
    return results


@pytest.fixture
def interpreted():
    """Few steps by the fused ops, in the interpreter."""
    return resolve_device("cpu", "float32", impl="fused")


@pytest.mark.skipif(not checks.interpreted(), reason="on a GPU the real thing is tested")
@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.2}, {"micro_batch": 4, "loss": "hinge", "targets": "q_proj,v_proj"}, {"dropout": 0.2, "keep": "habari za leo"}],
    ids=str,
)
def test_replays_are_the_steps_as_written(make_model, word_list, interpreted, options, tmp_path):
    if "keep" in options:
        # a window and a half, of which a step takes both
        (tmp_path / "kept.txt").write_text(options["keep"] * 15)
        options = {**options, "keep": str(tmp_path / "kept.txt")}
    pairs = [make(kind, str(make_model("llama")), str(word_list), interpreted, **options) for kind in (TrainStep, Replayed)]
    plain, replayed = (taken(*pair) for pair in pairs)
    assert pairs[1][0].graphs
    np.testing.assert_allclose(replayed, plain, rtol=1e-5)
    assert "keep" not in options or plain[-1][-1] > 0
    for one, other in zip(pairs[0][0].parameters, pairs[1][0].parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not checks.interpreted(), reason="on a GPU the real thing is tested")
def test_a_replay_drops_other_entries_each_time_and_every_shape_has_its_recording(make_model, word_list, interpreted):
    steps, batches = make(Replayed, str(make_model("llama")), str(word_list), interpreted, dropout=0.5, lr=1e-12, weight_decay=0.0)
    # B is zero at the start: nothing would come of what is dropped
    for adapter in steps.adapters.values():
        adapter.lora_B.data.normal_(std=0.3)
    (micro_batches, false_negatives), (others, other_same) = list(batches.epoch(0))[:2]
    for position in range(3):
        steps(position, micro_batches, false_negatives)
    assert not steps.graphs
    losses = []
    for position in (3, 4, 4):
        steps(position, micro_batches, false_negatives)
        losses.append(list(steps.pop_results())[-1].loss)
    assert losses[0] != losses[1] == losses[2]
    # a shape that is new is not captured before its kernels are there
    steps(5, others, other_same)
    assert len(steps.graphs) == 1
    steps(6, others, other_same)
    shapes = {
        tuple(tensor.shape for tensor in tensors_of(*_padded(*batch))) for batch in ((micro_batches, false_negatives), (others, other_same))
    }
    assert set(steps.graphs) == shapes


@pytest.mark.skipif(not checks.interpreted(), reason="compares with the plain ops on the CPU")
def test_a_padded_batch_has_the_loss_and_gradients_of_the_batch(make_model, word_list, interpreted):
    found = {}
    for name, step in (("plain", 1), ("padded", 16)):
        steps, batches = make(TrainStep, str(make_model("qwen3")), str(word_list), interpreted)
        batches.device_config = dataclasses.make_dataclass("Wide", ["dtype", "device", "width_step"])(
            torch.float32, torch.device("cpu"), step
        )
        micro_batches, false_negatives = next(iter(batches.epoch(0)))
        # a pair that is no negative, twice over, is what filling up makes of one
        false_negatives = torch.cat([false_negatives, torch.tensor([[6, 3]])])
        if name == "padded":
            micro_batches, false_negatives = _padded(micro_batches, false_negatives)
            assert micro_batches[0].input_ids.shape[1] % 16 == 0 == len(micro_batches[0].indices) % 256 == len(false_negatives) % 16
        loss = steps._gradients(micro_batches, false_negatives)
        found[name] = loss, [parameter.grad for parameter in steps.parameters]
    torch.testing.assert_close(found["padded"][0], found["plain"][0], rtol=1e-5, atol=0)
    for got, right in zip(found["padded"][1], found["plain"][1], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", *(name for name, of in FAMILIES.items() if of.kept_inside is not None)],
)
@pytest.mark.parametrize(
    "options", [{}, {"loss": "hinge", "micro_batch": 8, "weights": "nf4", "dropout": 0.1}], ids=["infonce", "hinge-nf4"]
)
def test_nothing_in_a_gpus_step_waits_for_the_gpu(make_model, word_list, family, options):
    """A tensor without memory has no value to wait for: asking for one raises."""
    model = str(make_model(family, hidden_size=64, intermediate_size=128))
    device_config = DeviceConfig(torch.bfloat16, torch.device("meta"), options.get("weights", "full"))
    cpu = DeviceConfig(torch.bfloat16, torch.device("cpu"), device_config.weights, ops.fused())
    steps, batches = make(TrainStep, model, str(word_list), cpu, **options)
    micro_batches, false_negatives = next(iter(batches.epoch(0)))
    micro_batches = [dataclasses.replace(micro_batch.clone(), **moved(micro_batch)) for micro_batch in micro_batches]
    steps.decoder.to("meta")
    for module in steps.decoder.modules():
        if isinstance(getattr(module, "weight", None), ops.NF4Weight):
            module.weight = module.weight.to(torch.device("meta"))
    for adapter in steps.adapters.values():
        adapter.seed = torch.zeros(1, dtype=torch.int64, device="meta")
    pool = Pooling.from_checkpoint("rms", open_checkpoint(model), torch.device("meta"), ops.fused())
    steps.embed = lambda micro_batch: pool(run(steps.decoder, micro_batch), micro_batch)
    parameters = lora.trainable(steps.decoder)
    with launch.recording(90) as launches:
        loss = steps._gradients(micro_batches, false_negatives.to("meta"))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert loss.is_meta
    assert all(parameter.grad is not None for parameter in parameters)
    assert {"_down_kernel", "_outer_kernel"} < {launch.kernel.fn.__name__ for launch in launches}


def moved(micro_batch) -> dict:
    *plain, node_indptr, words = (tensor.to("meta") for tensor in micro_batch.tensors())
    names = ("input_ids", "position_ids", "mask", "indptr", "indices", "sinks")
    return {**dict(zip(names, plain, strict=True)), "transposed": (node_indptr, words)}


def test_a_loss_that_is_not_finite_changes_nothing(make_model, word_list):
    steps, batches = make(TrainStep, str(make_model("llama")), str(word_list), resolve_device("cpu", "float32"))
    micro_batches, false_negatives = next(iter(batches.epoch(0)))
    steps(0, micro_batches, false_negatives)
    before = [parameter.detach().clone() for parameter in steps.parameters]
    steps.decoder.embed_tokens.weight[0] = float("nan")
    with pytest.raises(TliError, match="^step 2: the loss must be finite, got nan; lower --lr"):
        steps(1, micro_batches, false_negatives)
    assert all(torch.equal(one, other) for one, other in zip(before, steps.parameters, strict=True))


def spoil_gradients(steps: TrainStep) -> None:
    """From now on one of them is infinite."""

    def spoil(parameter: torch.Tensor) -> None:
        parameter.grad.data.fill_(float("inf"))

    steps.parameters[-1].register_post_accumulate_grad_hook(spoil)


def test_a_gradient_that_is_not_finite_changes_nothing(make_model, word_list, monkeypatch):
    steps, batches = make(TrainStep, str(make_model("llama")), str(word_list), resolve_device("cpu", "float32"))
    micro_batches, false_negatives = next(iter(batches.epoch(0)))
    steps(0, micro_batches, false_negatives)
    before = [parameter.detach().clone() for parameter in steps.parameters]
    # the loss is as it should be
    spoil_gradients(steps)
    with pytest.raises(TliError, match="^step 2: the gradient norm must be finite, got inf; lower --lr"):
        steps(1, micro_batches, false_negatives)
    assert all(torch.equal(one, other) for one, other in zip(before, steps.parameters, strict=True))


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_a_result_tells_the_learning_rate_and_the_norm_of_the_gradients_before_they_are_clipped(make_model, word_list, clip):
    steps, batches = make(TrainStep, str(make_model("llama")), str(word_list), resolve_device("cpu", "float32"), clip=clip, lr=3e-3)
    micro_batches, false_negatives = next(batches.epoch(0))
    truth = []
    for position in range(2):
        steps._gradients(micro_batches, false_negatives)
        truth.append(sum(parameter.grad.double().square().sum() for parameter in steps.parameters).sqrt().item())
        steps(position, micro_batches, false_negatives)
        clipped = sum(parameter.grad.double().square().sum() for parameter in steps.parameters).sqrt().item()
        assert clipped == pytest.approx(clip or truth[-1], rel=1e-3)
    results = list(steps.pop_results())
    assert [result.grad_norm for result in results] == pytest.approx(truth, rel=1e-5)
    # two steps of warm-up
    assert [result.lr for result in results] == pytest.approx([1.5e-3, 3e-3])


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["full", "nf4"])
def test_graphs_on_a_gpu_take_the_steps_as_written(make_model, word_list, weights):
    device_config = resolve_device("cuda", "float32", weights, "fused")
    model = str(make_model("llama", hidden_size=64, intermediate_size=128))
    (as_written, same_batches), (steps, batches) = (make(TrainStep, model, str(word_list), device_config, dropout=0.2) for _ in range(2))
    as_written.use_cuda_graphs = False
    np.testing.assert_allclose(taken(steps, batches), taken(as_written, same_batches), rtol=1e-4)
    assert steps.graphs


@pytest.mark.gpu
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_on_a_gpu_what_is_not_finite_changes_nothing_from_then_on(make_model, word_list, bad):
    steps, batches = make(TrainStep, str(make_model("llama")), str(word_list), resolve_device("cuda", "float32", impl="fused"))
    micro_batches, false_negatives = next(iter(batches.epoch(0)))
    for position in range(5):
        steps(position, micro_batches, false_negatives)
    before = [parameter.detach().clone() for parameter in steps.parameters]
    if bad == "loss":
        steps.decoder.embed_tokens.weight[0] = float("nan")
    else:
        # captured anew, with the hook in it
        steps.graphs.clear()
        spoil_gradients(steps)
    steps(5, micro_batches, false_negatives)
    last = list(steps.pop_results(wait=True))[-1]
    assert not np.isfinite(last.loss if bad == "loss" else last.grad_norm)
    assert all(torch.equal(one, other) for one, other in zip(before, steps.parameters, strict=True))
