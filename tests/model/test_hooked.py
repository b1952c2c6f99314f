"""The arms that run the whole model: equal to the early arm where they must be, and to transformers with peft where they differ."""

import collections
import functools
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.model.test_decoder import relative_error, whole_states
from tests.support.words import tokens_of
from tli.data.batch import to_batch
from tli.data.packing import tokenise
from tli.model import lora
from tli.model.checkpoint import Checkpoint, open_checkpoint
from tli.model.decoder import capture_output, enable_gradient_checkpointing, load_full_decoder, load_truncated_decoder, run, run_hooked
from tli.model.families import FAMILIES
from tli.model.pooling import Pooling, resolve_token_norm
from tli.runtime import ops
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError
from tli.training.loss import Objective

# six pairs: sources, then targets
WORDS = ["kitabu", "kitanda", "mtoto", "kiti", "mtu", "maji", "book", "bed", "child", "chair", "person", "water"]
NO_SYNONYMS = torch.zeros(0, 2, dtype=torch.int64)
CPU = resolve_device("cpu", "float32")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURE = 0.1
INFONCE = Objective("infonce", TEMPERATURE, 0.0)


class Setting:
    """A checkpoint, and the twelve words as its batch."""

    def __init__(self, folder, device=CPU.device):
        self.folder, self.checkpoint = folder, open_checkpoint(str(folder))
        self.words = tokenise(self.checkpoint.tokenizer(), WORDS, window=24)
        self.batch = to_batch(self.words.pack(np.arange(len(WORDS)), width=24), torch.float32, device)

    def decoder(self, arm: str, layer: int, dropout: float = 0.0, device_config=CPU):
        """The arm's model in training, with adapters as if some steps had been taken."""
        early = arm == "early"
        decoder = (
            load_truncated_decoder(self.checkpoint, layer, self.words.vocab_ids, device_config)
            if early
            else load_full_decoder(self.checkpoint, self.words.vocab_ids, device_config)
        )
        lora.inject(decoder, lora.LoRAConfig(rank=3, alpha=6.0, dropout=dropout), None if arm == "full" else range(layer))
        for number, adapter in enumerate(lora.adapters(decoder).values()):
            adapter.seed = 1000 + number
            adapter.lora_B.data.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
        return decoder.train()

    def step(self, decoder, states=run, token_norm: str | None = None) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss, and the gradient of every factor by its name."""
        device, token_norm = self.batch.indptr.device, token_norm or resolve_token_norm("auto", self.checkpoint)
        loss = INFONCE(
            Pooling.from_checkpoint(token_norm, self.checkpoint, device)(states(decoder, self.batch), self.batch), NO_SYNONYMS.to(device)
        )
        loss.backward()
        adapters = lora.adapters(decoder)
        return loss.item(), {f"{path}.{name}": getattr(a, name).grad for path, a in adapters.items() for name in ("lora_A", "lora_B")}


def assert_equal_steps(one, other, tolerance: float) -> None:
    """Losses and each gradient are equal, relative to the gradient's own length."""
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        assert gradient.any(), name
        assert (one[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_full_hook_has_the_early_arms_loss_and_gradients(make_model, family, dropout):
    setting = Setting(make_model(family))
    for layer in (1, 2, 4):
        early = setting.step(setting.decoder("early", layer, dropout))
        hooked = setting.step(setting.decoder("full-hook", layer, dropout), functools.partial(run_hooked, layer=layer))
        assert len(early[1]) == 2 * len(FAMILIES[family].linear) * layer
        assert_equal_steps(hooked, early, tolerance=1e-5)


@pytest.mark.slow
def test_full_hook_has_the_early_arms_loss_and_gradients_on_the_starter(starter):
    setting = Setting(starter)
    early = setting.step(setting.decoder("early", 2))
    hooked = setting.step(setting.decoder("full-hook", 2), functools.partial(run_hooked, layer=2))
    assert_equal_steps(hooked, early, tolerance=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_model_gives_transformers_output(make_model, family):
    setting = Setting(make_model(family, tied=False, shards=True))
    expected = whole_states(setting.folder, setting.words.vocab_ids[tokens_of(setting.words)], setting.words.lengths)[-1]
    with torch.no_grad():
        states = run(load_full_decoder(setting.checkpoint, setting.words.vocab_ids, CPU), setting.batch)
    assert relative_error(states, expected, setting.batch, setting.words.lengths) < 2e-5


def peft_step(setting: Setting, adapter, states_of) -> tuple[float, dict[str, torch.Tensor]]:
    """The step as transformers and peft take it: padded words, the whole causal LM, and a loss written out."""
    base = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    lengths = torch.from_numpy(setting.words.lengths)
    ids = torch.from_numpy(setting.words.vocab_ids[tokens_of(setting.words)])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    states = states_of(
        model.base_model.model.get_decoder(), model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    )
    # the first position, the sink, is left out
    pooled = torch.stack([states[word, 1:length].mean(dim=0) for word, length in enumerate(lengths)])
    source, target = torch.nn.functional.normalize(pooled).chunk(2)
    scores = source @ target.T / TEMPERATURE
    own = torch.arange(len(source))
    loss = (torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(scores.T, own)) / 2
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    inside = f"base_model.model.{setting.checkpoint.family.causal_lm}."
    return loss.item(), {name.removeprefix(inside).removesuffix(".default.weight"): grad for name, grad in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_arm_is_peft_on_the_whole_model(make_model, tmp_path, family):
    setting = Setting(make_model(family))
    decoder = setting.decoder("full", 2)
    lora.save(decoder, lora.LoRAConfig(rank=3, alpha=6.0), tmp_path, str(setting.folder))
    ours = setting.step(decoder, token_norm="none")
    assert len(ours[1]) == 2 * len(FAMILIES[family].linear) * 4
    assert_equal_steps(ours, peft_step(setting, tmp_path, lambda decoder, states: states[-1]), tolerance=2e-5)


def test_the_hooked_arm_is_peft_on_the_whole_model(make_model, tmp_path):
    setting = Setting(make_model("llama"))
    decoder = setting.decoder("full-hook", 2)
    lora.save(decoder, lora.LoRAConfig(rank=3, alpha=6.0), tmp_path, str(setting.folder))
    ours = setting.step(decoder, functools.partial(run_hooked, layer=2))
    assert_equal_steps(ours, peft_step(setting, tmp_path, lambda decoder, states: decoder.norm(states[2])), tolerance=2e-5)


def hooks(decoder) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in decoder.modules())


def test_hooks_are_gone_whatever_happens(make_model, monkeypatch):
    setting = Setting(make_model("llama"))
    decoder = setting.decoder("full-hook", 2)
    run_hooked(decoder, setting.batch, 2)
    assert hooks(decoder) == 0

    def fail(*arguments, **named):
        assert hooks(decoder) == 1
        raise KeyboardInterrupt

    # behind the hook, in front of it, in the context itself
    for index in (3, 0):
        with monkeypatch.context() as patched:
            patched.setattr(decoder.layers[index].mlp, "forward", fail)
            with pytest.raises(KeyboardInterrupt):
                run_hooked(decoder, setting.batch, 2)
        assert hooks(decoder) == 0
    with pytest.raises(ZeroDivisionError), capture_output(decoder.layers[0]):
        raise ZeroDivisionError
    assert hooks(decoder) == 0


@pytest.mark.parametrize("arm", ["full", "full-hook", "early"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_recomputing_keeps_every_gradient_and_less_memory(make_model, arm, family):
    setting = Setting(make_model(family))
    states = functools.partial(run_hooked, layer=2) if arm == "full-hook" else run
    steps, kept, passes = [], [], []
    for checkpointing in (False, True):
        decoder = setting.decoder(arm, 2, dropout=0.3)
        if checkpointing:
            enable_gradient_checkpointing(decoder)
        count = collections.Counter()
        decoder.layers[1].mlp.register_forward_pre_hook(lambda *_, count=count: count.update(["mlp"]))
        bytes_kept = 0

        def keep(tensor):
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states(decoder, setting.batch)
        kept.append(bytes_kept)
        count.clear()
        steps.append(setting.step(decoder, states))
        passes.append(count["mlp"])
    assert passes == [1, 2]
    assert kept[1] < 0.2 * kept[0]
    assert_equal_steps(steps[1], steps[0], tolerance=1e-6)


@pytest.mark.parametrize("arm", ["full", "full-hook"])
def test_the_checkpoint_is_read_once(make_model, monkeypatch, arm):
    setting = Setting(make_model("llama", shards=True))
    read = collections.Counter()
    tensor = Checkpoint._tensor
    monkeypatch.setattr(
        Checkpoint, "_tensor", lambda self, shard, file, name, shape: (read.update([name]), tensor(self, shard, file, name, shape))[1]
    )
    setting.decoder(arm, 2)
    assert set(read) == {name.removeprefix("model.") for name in setting.checkpoint.shard_of}
    assert set(read.values()) == {1}


def test_nf4_weights_are_rounded_in_every_block(make_model):
    setting = Setting(make_model("llama", hidden_size=64, intermediate_size=128))
    rounded = load_full_decoder(setting.checkpoint, setting.words.vocab_ids, resolve_device("cpu", "float32", "nf4"))
    plain = load_full_decoder(setting.checkpoint, setting.words.vocab_ids, CPU)
    for path, module in plain.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = rounded.layers.get_submodule(path).weight
            assert 0 < (weight - module.weight).norm() < 0.2 * module.weight.norm()
            assert all(len(block.unique()) <= 16 for block in weight.reshape(-1, 64))
    assert torch.equal(rounded.norm.weight, plain.norm.weight)
    early = setting.step(setting.decoder("early", 2, device_config=resolve_device("cpu", "float32", "nf4")))
    hooked = setting.step(
        setting.decoder("full-hook", 2, device_config=resolve_device("cpu", "float32", "nf4")), functools.partial(run_hooked, layer=2)
    )
    assert_equal_steps(hooked, early, tolerance=1e-5)


@pytest.mark.slow
def test_the_whole_model_computes_from_packed_weights_where_the_fused_ops_do(make_model):
    setting = Setting(make_model("llama", hidden_size=64, intermediate_size=128, blocks=2), DEVICE)
    steps = []
    for impl in ("reference", "fused", "fused"):
        decoder = setting.decoder("full", 1, dropout=0.2, device_config=resolve_device(DEVICE.type, "float32", "nf4", impl))
        packed = [isinstance(adapter.weight, ops.NF4Weight) for adapter in lora.adapters(decoder).values()]
        assert packed == [impl == "fused"] * 14
        if len(steps) == 2:
            enable_gradient_checkpointing(decoder)
        steps.append(setting.step(decoder, token_norm="none"))
    assert_equal_steps(steps[1], steps[0], tolerance=1e-4)
    assert_equal_steps(steps[2], steps[1], tolerance=1e-6)


def test_an_absent_shard_is_one_clear_line(make_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama", shards=True), folder)
    setting = Setting(folder)
    absent = setting.checkpoint.shard_of["model.layers.3.mlp.up_proj.weight"]
    (folder / absent).unlink()
    with pytest.raises(TliError, match=f"the folder must hold {absent}, got none; "):
        load_full_decoder(setting.checkpoint, setting.words.vocab_ids, CPU)
