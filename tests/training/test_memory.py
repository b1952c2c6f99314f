"""The memory that a run takes: the arithmetic against what torch allocates, the command, the refusal before loading, the profile."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from tests.support.fake_hub import serving
from tli import train
from tli.commands.memory import memory
from tli.config import MemoryConfig, TrainConfig
from tli.data import word_pairs
from tli.data.loader import BatchLoader
from tli.data.packing import tokenise
from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import build_decoder, run_hooked
from tli.model.decoder import run as run_model
from tli.model.families import FAMILIES, blocks_of, embedding_of
from tli.model.pooling import Pooling
from tli.model.shape import Shape
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError
from tli.training import grad_cache
from tli.training.loss import Objective
from tli.training.memory import estimate, fit
from tli.training.memory import profile as profiling
from tli.training.memory.budget import needed as memory_needed

ROOT = pathlib.Path(__file__).parent.parent.parent
# wide beside the batch, as real models are: what has the size of a vocabulary or of a word list must not decide
WIDE = {"hidden_size": 192, "intermediate_size": 640, "head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2}


class Step:
    """A run as ``train`` sets it up, to be stepped and watched."""

    def __init__(
        self, model: pathlib.Path, pairs: pathlib.Path, impl: str = "auto", dtype: str = "float32", attention: str | None = None, **options
    ):
        self.config = config = TrainConfig(
            **{"layer": 2, **options}, model=str(model), pairs=str(pairs), impl=impl, dtype=dtype, output="unused"
        )
        checkpoint, self.pairs = open_checkpoint(str(model)), word_pairs.read_pairs(str(pairs), "swahili", "english")
        texts = [pair.source for pair in self.pairs] + [pair.target for pair in self.pairs]
        words, device_config = tokenise(checkpoint.tokenizer(), texts, 64, " "), resolve_device("cpu", dtype, config.weights, impl)
        if attention is not None:
            # whichever of the two is the faster here: elsewhere it is the other one
            device_config = dataclasses.replace(device_config, attention=attention)
        sizes = {"batch": config.batch, "micro_batch": config.micro_batch, "pool_bos": config.pool_bos}
        own = {name: getattr(config, name) for name in ("arm", "layer", "rank", "targets", "dropout", "checkpointing")}
        needed = memory_needed(checkpoint, words, len(self.pairs), device_config, **sizes, **own)
        arm = {name: own[name] for name in ("arm", "layer", "checkpointing")}
        self.decoder = build_decoder(checkpoint, words.vocab_ids, device_config, **arm).train()
        adapter = lora.LoRAConfig(rank=config.rank, alpha=config.alpha, targets=config.targets, dropout=config.dropout)
        lora.inject(self.decoder, adapter, None if config.arm == "full" else range(config.layer))
        self.batches = BatchLoader(words, self.pairs, device_config, epochs=config.epochs, seed=config.seed, **sizes)
        (self.parts, self.false_negatives), *_ = self.batches.epoch(0)
        # of these words, not of others as many
        largest = max(self.parts, key=lambda part: part.input_ids.numel())
        part = estimate.Part(len(largest.sinks) // 2, *largest.input_ids.shape)
        self.needed = dataclasses.replace(needed, part=part, batch=sum(len(one.sinks) // 2 for one in self.parts))
        norm = Pooling(torch.ones(checkpoint.config.hidden_size), 1e-6, device_config.ops)
        self.pool = norm.for_layer("output") if config.arm == "full" else norm
        self.ops, self.parameters = device_config.ops, lora.trainable(self.decoder)
        self.optimiser = torch.optim.AdamW(self.parameters)

    def __call__(self) -> None:
        config, objective = self.config, Objective(self.config.loss, 0.1, 0.4, self.ops)
        aligned = (lambda part: run_hooked(self.decoder, part, config.layer)) if config.arm == "full-hook" else None
        states = aligned or (lambda part: run_model(self.decoder, part))
        self.optimiser.zero_grad()
        grad_cache.backward(self.parts, lambda part: self.pool(states(part), part), lambda words: objective(words, self.false_negatives))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()

    def peak(self, folder: pathlib.Path) -> int:
        """The most that a step, after others, allocates: every block that torch's allocator gives and takes back."""
        self()
        self.optimiser.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self()
        found.export_chrome_trace(str(folder / "trace.json"))
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
        return int(np.cumsum([size for _, size in changes]).max())

    def predicted(self, **changes) -> int:
        """The same by the arithmetic: what comes and goes with a step."""
        needed = dataclasses.replace(self.needed, **changes)
        of = estimate.predict(needed)
        return sum(of[name] for name in ("activations", "workspace", "gradients and optimiser")) - 12 * needed.parameters


CASES = {
    "plain": {},
    "no-dropout": {"dropout": 0.0},
    "attention-only": {"targets": "q_proj,v_proj"},
    "one-block": {"layer": 1},
    "nf4": {"weights": "nf4"},
    "parts": {"batch": 30, "micro_batch": 10},
    "full": {"arm": "full", "batch": 40},
    "full-hook": {"arm": "full-hook", "batch": 40},
    "recomputed": {"arm": "full", "batch": 40, "checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16-nf4": {"dtype": "bfloat16", "weights": "nf4", "dropout": 0.0},
    "high-rank": {"rank": 32, "batch": 8},
}


def check_prediction(step: Step, folder: pathlib.Path, tolerance: float = 0.05, **changes) -> None:
    predicted, measured = step.predicted(**changes), step.peak(folder)
    if step.needed.shape.traits.kept_inside is None:
        assert predicted == pytest.approx(measured, rel=tolerance)
    else:
        assert measured <= predicted <= 1.5 * measured


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_steps_allocations_are_predicted(options, attention, make_model, word_list, tmp_path):
    if options.get("dtype") == "bfloat16":
        # in 16 bits sdpa is the slower one wherever it was timed; what dropout takes in passing would be the largest moment
        attention = None
    check_prediction(Step(make_model("llama", **WIDE), word_list, attention=attention, **{"rank": 4, "batch": 60, **options}), tmp_path)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_steps_allocations_are_predicted_for_every_family(family, attention, make_model, word_list, tmp_path):
    check_prediction(Step(make_model(family, **WIDE), word_list, attention=attention, rank=4, batch=60, layer=3), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "weights"), [("llama", "full"), ("qwen3", "nf4"), ("gemma2", "full")])
def test_what_the_fused_ops_allocate_is_what_is_predicted_of_a_gpu(family, weights, make_model, word_list, tmp_path):
    # the same tensors that a GPU would hold, counted on a CPU; of AdamW and clipping a GPU has other temporaries
    step = Step(make_model(family, **WIDE), word_list, impl="fused", dtype="float16", rank=4, batch=8, dropout=0.1, weights=weights)
    constant = estimate._kept_workspace(dataclasses.replace(step.needed, device="gpu"))
    measured = step.peak(tmp_path)
    assert step.predicted(device="gpu") - constant == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["full", "nf4"])
def test_weights_and_rows_are_what_the_model_holds(family, weights, make_model, word_list):
    step = Step(make_model(family, **WIDE), word_list, rank=4, weights=weights)
    predicted, rows = estimate.predict(step.needed), embedding_of(step.decoder).weight.nbytes
    held = sum(tensor.nbytes for tensor in profiling._frozen(step.decoder)) - rows
    tables = [blocks_of(step.decoder)[0].get_submodule(path).weight for path in FAMILIES[family].tables]
    assert predicted["embedding rows"] == rows + sum(table.products.nbytes for table in tables)
    # the token norm's weight is the pool's
    assert predicted["weights"] == held + 4 * 192
    assert step.needed.parameters == sum(parameter.numel() for parameter in step.parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family):
    from transformers import AutoConfig

    full, aliases = AutoConfig.for_model(family).get_text_config(), FAMILIES[family].aliases
    least = {"model_type": family}
    for common in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        own = aliases.get(common, common) if hasattr(full, aliases.get(common, common)) else common
        # a size that is a multiple of another need not stand there
        if hasattr(full, own) and not (family.startswith("gemma3") and common in ("num_attention_heads", "vocab_size")):
            least[own] = getattr(full, own)
    assert Shape.from_config(least, "x") == Shape.from_config(full.to_dict(), "x")


def some_run(**changes) -> estimate.Run:
    shape = Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, ())
    run = estimate.Run(shape=shape, part=estimate.Part(64, 2, 111), batch=64, list_pairs=2019, rows=3500)
    return dataclasses.replace(run, **changes)


RUNS = st.fixed_dictionaries(
    {
        "arm": st.sampled_from(("early", "full")),
        "weights": st.sampled_from(("full", "nf4")),
        "checkpointing": st.booleans(),
        "rank": st.integers(1, 128),
        # from the part's own pairs on: of fewer no bin is full, and their number says nothing
        "batch": st.integers(64, 4096),
        "dropout": st.sampled_from((0.0, 0.2)),
    }
)


@given(RUNS, st.sampled_from((("cpu", 4), ("cpu", 2), ("gpu", 2))), st.integers(2, 512))
@settings(max_examples=60, deadline=None)
def test_what_is_to_save_memory_does(options, device, size):
    run = some_run(**options, device=device[0], element=device[1])

    def need(**changes) -> int:
        return estimate.total(estimate.predict(dataclasses.replace(run, **changes)))

    whole = need()
    assert need(arm="early") <= whole
    assert need(rank=2 * run.rank) > whole
    # bitsandbytes and a decoded weight are what it costs
    assert estimate.predict(dataclasses.replace(run, weights="nf4"))["weights"] <= estimate.predict(run)["weights"]
    assert need(checkpointing=True) <= whole * 1.001
    if run.batch > 4 * size:
        # what it costs at most: the batch's vectors with their gradients and the adapters' gradients from the first part on
        cost = 3 * 2 * run.batch * run.shape.width * 4 + 4 * run.parameters
        assert need(micro_batch=size) <= whole + 1.2 * cost
    assert need(batch=2 * run.batch) >= whole


@given(RUNS, st.floats(1e8, 3e10))
@settings(max_examples=40, deadline=None)
def test_the_options_that_are_named_are_enough(options, available):
    run = some_run(**options)
    available = int(available)
    changed = fit.change_to_fit(run, available)
    if changed is None:
        assert estimate.total(estimate.predict(dataclasses.replace(run, arm="early", batch=8, weights="nf4"))) > available
    else:
        assert estimate.total(estimate.predict(dataclasses.replace(run, **changed))) <= available
        assert changed or estimate.total(estimate.predict(run)) <= available


def test_a_run_that_will_not_fit_is_refused_before_its_model_is_loaded(make_model, word_list, tmp_path, monkeypatch):
    model = make_model("llama", **WIDE)
    options = {"model": str(model), "pairs": str(word_list), "layer": 2, "rank": 4, "batch": 54, "epochs": 1, "dtype": "float32"}
    options |= {"no_report": True, "keep_weight": 0.0}
    needed = Step(model, word_list, rank=4, batch=54).needed
    beside = estimate.total(estimate.predict(needed)) - estimate.process_bytes(needed)
    part = estimate.total(estimate.predict(dataclasses.replace(needed, micro_batch=13))) - estimate.process_bytes(needed)
    assert part < beside
    monkeypatch.setattr("tli.runtime.environment.available_bytes", lambda: (part + beside) // 2)

    def load(*_, **__):
        raise AssertionError("a weight was read")

    with monkeypatch.context() as patch:
        patch.setattr("tli.commands.train.build_decoder", load)
        with pytest.raises(TliError, match="memory: .* must be free for this run .*; add --micro-batch [0-9]+$") as refused:
            train(TrainConfig(**options, output=str(tmp_path / "refused")))
    size = int(str(refused.value).rsplit(" ", 1)[1])
    # what it names is taken
    done = train(TrainConfig(**options, micro_batch=size, output=str(tmp_path / "taken")))
    assert done["training"]["steps"] == 1
    monkeypatch.setattr("tli.runtime.environment.available_bytes", lambda: 1000)
    with pytest.raises(TliError, match="use a smaller model, or a machine with more memory"):
        train(TrainConfig(**options, output=str(tmp_path / "never")))


def command(*flags: str, environment: dict | None = None, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    code = (
        "import runpy, sys; sys.argv = ['memory', *sys.argv[1:]]; runpy.run_module('tli.memory', run_name='__main__'); "
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules], file=sys.stderr)"
    )
    there = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.run([sys.executable, "-c", code, *flags], env=there, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_the_command_needs_config_alone_and_no_torch(make_model, word_list, tmp_path):
    (tmp_path / "config.json").write_text((make_model("qwen3") / "config.json").read_text())
    began = time.monotonic()
    done = command("--model", str(tmp_path), "--pairs", str(word_list), "--batch=32", "--json")
    assert done.returncode == 0, done.stderr
    # two seconds are the promise; a busy machine may take longer
    assert time.monotonic() - began < 20
    assert done.stderr.splitlines()[-1] == "[]"
    facts = json.loads(done.stdout)
    assert not facts["counted"]
    assert [(run["device"], run["weights"]) for run in facts["runs"]] == [
        (d, w) for d in ("cpu fp32", "cpu bf16", "gpu bf16") for w in ("full", "nf4")
    ]
    for run in facts["runs"]:
        assert run["total"] == sum(run["bytes"].values())


def test_nodes_and_tokens_are_counted_where_the_tokenizer_is_at_hand(make_model, word_list):
    model = make_model("llama", **WIDE)
    facts = memory(MemoryConfig(model=str(model), pairs=str(word_list), batch=60, held_out=0.0, rank=4))
    step = Step(model, word_list, rank=4, batch=60)
    assert facts["counted"]
    assert facts["rows"] == step.needed.rows
    assert facts["nodes"] == step.needed.part.nodes


def test_a_hub_name_costs_its_config_alone(make_model, word_list, tmp_path):
    with serving("someone/model", make_model("gemma2")) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = command("--model", "someone/model", "--pairs", str(word_list), "--json", environment=environment)
        assert done.returncode == 0, done.stderr
        assert {name for name, size in hub.sent.items() if name and size} == {"config.json"}
    assert done.stderr.splitlines()[-1] == "[]"
    assert json.loads(done.stdout)["model"]["family"] == "gemma2"


def test_the_starter_is_not_fetched_for_it(tmp_path):
    done = command("--json", environment={"TLI_CACHE": str(tmp_path / "empty")})
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "empty").exists()
    facts = json.loads(done.stdout)
    assert not facts["counted"]
    from tli.model import starter

    assert facts["model"]["hidden"] == starter.SIZES["intermediate_size"]


def test_the_starters_sizes_are_its_configs(starter):
    from tli.model.starter import SIZES

    config = json.loads((starter / "config.json").read_text())
    assert {name: config[name] for name in SIZES} == SIZES


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "must be JSON"), ("[]", "must be an object"), ('{"model_type": "mpt"}', "family"), ('{"model_type": "llama"}', "sizes")],
)
def test_a_broken_config_is_one_line(content, said, tmp_path):
    (tmp_path / "config.json").write_text(content)
    done = command("--model", str(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_profile_leaves_a_trace_a_figure_and_the_numbers(make_model, word_list, tmp_path, dtype):
    options = {"model": str(make_model("llama", **WIDE)), "pairs": str(word_list), "rank": 4, "batch": 54, "epochs": 3, "dtype": dtype}
    plain = train(TrainConfig(**options, no_report=True, output=str(tmp_path / "plain")))
    facts = train(TrainConfig(**options, profile=True, output=str(tmp_path / "profiled")))
    assert facts["adapter"]["sha256"] == plain["adapter"]["sha256"]
    folder = tmp_path / "profiled"
    events = json.loads((folder / profiling.TRACE_FILE).read_text())["traceEvents"]
    names = {event["name"] for event in events if event.get("ph") == "X"}
    assert {profiling.FORWARD, profiling.LOSS, profiling.OPTIMISER, "aten::embedding"} <= names
    assert any(event["name"] == "[memory]" for event in events)
    assert (folder / profiling.FIGURE_FILE).read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "report.json").read_text())["memory"]
    assert found == facts["memory"]
    assert found["predicted"].keys() == found["measured"].keys()
    for name in ("weights", "embedding rows", "gradients and optimiser"):
        assert found["predicted"][name] == pytest.approx(found["measured"][name], rel=0.1, abs=30_000)
    # in 16 bits what is an activation, and what is at work, part elsewhere
    moving = ("activations", "workspace")
    for names in [[name] for name in moving] if dtype == "float32" else [moving]:
        predicted, measured = (sum(found[side][name] for name in names) for side in ("predicted", "measured"))
        assert predicted == pytest.approx(measured, rel=0.1, abs=30_000)


def test_a_steps_curves_tell_what_stays_from_what_goes():
    def change(at: int, address: int, size: int) -> dict:
        return {"ph": "i", "name": "[memory]", "ts": at, "args": {"Addr": address, "Bytes": size, "Device Type": 0}}

    spans = [{"ph": "X", "cat": "user_annotation", "name": "forward", "ts": 10, "dur": 10}]
    saved, gone = [change(11, 1, 100), change(31, 1, -100)], [change(12, 2, 7), change(13, 2, -7)]
    # the address of what is gone, used again
    gradient, temporary = [change(32, 2, 50)], [change(33, 3, 9), change(34, 3, -9)]
    curves = profiling.step_curves([*temporary, *spans, *saved, *gradient, *gone, change(5, 9, -1000)], gradients={2})
    order = ("activations", "gradients", "workspace")
    at = {5 + round(ms * 1e3): [int(curves[name][place]) for name in order] for place, ms in enumerate(curves["ms"])}
    assert at[11] == at[13] == [100, 0, 0]
    assert at[12] == [100, 0, 7]
    assert at[31] == [0, 0, 0]
    assert at[32] == at[34] == [0, 50, 0]
    assert at[33] == [0, 50, 9]
