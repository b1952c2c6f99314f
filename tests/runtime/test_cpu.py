"""Threads by the quota, the dtype by a measurement that is kept, and a run in bf16 as true as transformers' own."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from tli_kernels import cpu

from tests.support.fidelity import assert_faithful
from tli.commands.train import train
from tli.config import TrainConfig
from tli.data.loader import BatchLoader
from tli.data.packing import tokenise
from tli.data.word_pairs import read_pairs
from tli.model import lora, token_table
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder, run, use_eager_attention
from tli.model.pooling import Pooling
from tli.runtime import cpu as processor
from tli.runtime import ops
from tli.runtime.cpu import Ways
from tli.runtime.device import DeviceConfig, resolve_device
from tli.training.loss import Objective
from tli.training.state import STATE_FILE

ROOT = pathlib.Path(__file__).parent.parent.parent
PLAIN = Ways("float32", dict.fromkeys(processor.DTYPES, "torch"), dict.fromkeys(processor.DTYPES, "sdpa"))
OTHER = dataclasses.replace(PLAIN, attention=dict.fromkeys(processor.DTYPES, "eager"))


def forget() -> None:
    processor._known.clear()


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """An answer in place of this processor's, and how often it was measured."""
    taken = []
    monkeypatch.setattr(processor, "_known", {})
    monkeypatch.setattr(processor, "measure", lambda: taken.append(1) or PLAIN)
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "cache"))
    return taken


def test_what_was_measured_is_kept_for_this_processor(measured, tmp_path, monkeypatch):
    assert processor.ways() == PLAIN
    forget()
    assert processor.ways() == PLAIN
    assert len(measured) == 1
    file = tmp_path / "cache" / "processor.json"
    (key,) = json.loads(file.read_text())
    assert torch.__version__ in key
    # another instruction set, or other threads, is another processor, and the first one's answer stays
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2" if os.environ.get("ONEDNN_MAX_CPU_ISA") == "SSE41" else "SSE41")
    assert processor.ways() == PLAIN
    assert len(measured) == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        processor.ways()
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == len(json.loads(file.read_text())) == 3


KEPT = {
    "cut short": lambda whole, key: whole[:-20],
    "of an earlier version": lambda whole, key: json.dumps({key: "bfloat16"}),
    "a list": lambda whole, key: "[1]",
    "an unknown dtype": lambda whole, key: whole.replace('"fastest": "float32"', '"fastest": "int8"'),
    "an unknown library": lambda whole, key: whole.replace('"torch"', '"cublas"'),
    "an unknown attention": lambda whole, key: whole.replace('"sdpa"', '"flash"'),
    "a missing dtype": lambda whole, key: whole.replace('"float16"', '"int16"'),
    "binary": lambda whole, key: "\0\1",
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_kept_answer_that_is_none_is_measured_anew(measured, tmp_path, kind):
    processor.ways()
    file = tmp_path / "cache" / "processor.json"
    file.write_text(KEPT[kind](file.read_text(), processor.key()))
    forget()
    assert processor.ways() == PLAIN
    assert len(measured) == 2
    forget()
    processor.ways()
    assert len(measured) == 2


def test_a_kept_answer_that_does_not_run_here_is_measured_anew(measured, monkeypatch):
    def refuses(*_):
        raise RuntimeError("could not create a primitive descriptor for the inner product forward propagation primitive")

    by_onednn = dataclasses.replace(PLAIN, fastest="bfloat16", matmul=dict.fromkeys(processor.DTYPES, "onednn"))
    monkeypatch.setattr(processor, "measure", lambda: by_onednn)
    monkeypatch.setitem(cpu.LIBRARIES, "onednn", torch.nn.functional.linear)
    assert processor.ways() == by_onednn
    monkeypatch.setitem(cpu.LIBRARIES, "onednn", refuses)
    monkeypatch.setattr(processor, "measure", lambda: OTHER)
    forget()
    assert processor.ways() == OTHER


def test_where_the_cache_cannot_be_written_each_run_measures(measured, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    for _ in range(2):
        forget()
        assert processor.ways() == PLAIN
    assert len(measured) == 2


def refuses(x, weight, bias=None):
    raise RuntimeError("could not create a primitive descriptor")


def is_wrong(x, weight, bias=None):
    return torch.nn.functional.linear(x, weight, bias) * 1.1


def gives_nan(x, weight, bias=None):
    return torch.nn.functional.linear(x, weight, bias) * torch.nan


def has_a_wrong_gradient(x, weight, bias=None):
    # the backward product has the transposed weight
    return torch.nn.functional.linear(x, weight, bias) * (1 if weight.is_contiguous() else 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("library", [refuses, is_wrong, gives_nan, has_a_wrong_gradient], ids=lambda library: library.__name__)
@pytest.mark.parametrize("dtype", processor.DTYPES)
def test_a_library_that_fails_its_try_is_never_taken(monkeypatch, library, dtype):
    monkeypatch.setitem(cpu.LIBRARIES, "onednn", library)
    assert not processor.runs(ops.Matmul("onednn"), dtype)
    assert processor.runs(ops.Matmul("torch"), dtype)
    assert "onednn" not in " ".join(processor.measure().matmul.values())


@pytest.mark.slow
def test_an_attention_that_fails_its_try_is_never_taken(monkeypatch):
    def wrong_gradient(q, k, v, mask):
        return processor._eager(q, k.detach(), v, mask)

    for broken in (refuses, wrong_gradient, lambda *qkv: processor._sdpa(*qkv) * 1.1, lambda *qkv: processor._sdpa(*qkv) * torch.nan):
        monkeypatch.setitem(processor.ATTENTION, "sdpa", broken)
        assert not processor.attends("sdpa", "float32")
        assert set(processor.measure().attention.values()) == {"eager"}
        assert processor._read(dataclasses.asdict(PLAIN)) is None
    assert processor.attends("eager", "float32")


def test_a_way_that_fails_only_when_it_is_timed_is_slower_than_any():
    def fails():
        raise MemoryError

    least = processor.least_seconds({("a", "fails"): fails, ("a", "runs"): lambda: None})
    assert least["a", "fails"] == float("inf") > least["a", "runs"]
    assert processor._first_unless(least, "a", 1.3) == "runs"


def seconds_of(**least: float) -> dict[tuple[str, str], float]:
    names = {
        "fp32_onednn": ("float32", "onednn"),
        "fp32": ("float32", "torch"),
        "bf16_onednn": ("bfloat16", "onednn"),
        "bf16": ("bfloat16", "torch"),
    }
    return {names[name]: value for name, value in least.items()}


@pytest.mark.parametrize(
    ("seconds", "fastest", "float32"),
    [
        ({"fp32_onednn": 1.0, "fp32": 1.2, "bf16_onednn": 0.5, "bf16": 0.5}, "bfloat16", "onednn"),
        ({"fp32_onednn": 1.0, "fp32": 1.2, "bf16_onednn": 0.72, "bf16": 9}, "float32", "onednn"),
        # two that are alike must not change places with the noise
        ({"fp32_onednn": 1.0, "fp32": 0.9, "bf16_onednn": 3, "bf16": 9}, "float32", "onednn"),
        ({"fp32_onednn": 1.0, "fp32": 0.4, "bf16_onednn": 0.35, "bf16": 9}, "float32", "torch"),
        ({"fp32": 1.0, "bf16": 0.7}, "bfloat16", "torch"),
    ],
    ids=str,
)
def test_the_fastest_that_runs_is_taken(monkeypatch, seconds, fastest, float32):
    halves = {("float16", "torch"): 1.0}
    attention = {
        (dtype, way): {"sdpa": 1.0, "eager": 0.9 if dtype == "float32" else 0.5}[way]
        for dtype in processor.DTYPES
        for way in ("sdpa", "eager")
    }
    answers = iter([seconds_of(**seconds) | halves, attention])
    monkeypatch.setattr(processor, "least_seconds", lambda tasks: next(answers))
    ways = processor.measure()
    assert (ways.fastest, ways.matmul["float32"]) == (fastest, float32)
    assert ways.attention == {"float32": "sdpa", "bfloat16": "eager", "float16": "eager"}


def test_this_processor_is_measured():
    threads = torch.get_num_threads()
    ways = processor.measure()
    assert ways.fastest in ("float32", "bfloat16")
    assert all(processor.runs(ways.matmul_for(getattr(torch, dtype)), dtype) for dtype in processor.DTYPES)
    assert processor._read(dataclasses.asdict(ways)) == ways
    assert torch.get_num_threads() == threads


def test_a_slow_task_is_left_out_after_its_first_rounds():
    ran = {"fast": 0, "slow": 0}

    def task(name, seconds):
        ran[name] += 1
        processor.time.sleep(seconds)

    least = processor.least_seconds({("a", "fast"): lambda: task("fast", 0.001), ("a", "slow"): lambda: task("slow", 0.05)})
    assert ran["fast"] > 10 > ran["slow"]
    assert least["a", "fast"] < 0.05 <= least["a", "slow"]


@pytest.mark.slow
def test_the_key_knows_what_onednn_was_told():
    code = "import torch, tli; from tli.runtime import cpu as processor; print(processor.key())"
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT), **limit},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for limit in ({}, {"ONEDNN_MAX_CPU_ISA": "SSE41"}, {"ATEN_CPU_CAPABILITY": "default"}, {"OMP_NUM_THREADS": "1"})
    }
    assert len(keys) == 4 - (torch.get_num_threads() == 1)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 7),
        ({"cpu.max": "9900000 100000"}, 7),
        ({"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}, 3),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 7),
        ({}, 7),
        ({"cpu.max": "nonsense"}, 7),
    ],
    ids=str,
)
def test_no_more_threads_than_the_quota(files, expected, monkeypatch, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(processor, "_QUOTAS", (tmp_path / "cpu.max", tmp_path / "cpu.cfs_quota_us"))
    threads = [7]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.__setitem__(0, number))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert processor.set_cpu_threads() == expected
    threads[0] = 7
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert processor.set_cpu_threads() == 7


@pytest.mark.parametrize("matmul", ["onednn", "torch", "torch in float32"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loss_and_gradients_in_bfloat16_are_as_true_as_transformers_own(make_model, word_list, family, matmul):
    """Truth: the same weights, rounded to bf16 once, in fp64."""
    if not processor.runs(ops.Matmul.named(matmul), "bfloat16"):
        pytest.skip("this processor has no such product")
    checkpoint = open_checkpoint(str(make_model(family)))
    pairs = read_pairs(str(word_list), "swahili", "english")
    words = tokenise(checkpoint.tokenizer(), [p.source for p in pairs] + [p.target for p in pairs], 64, " ")

    def found(dtype: torch.dtype, fast: bool) -> list[torch.Tensor]:
        chosen = ops.on_cpu(ops.Matmul.named(matmul)) if fast else ops.REFERENCE
        device_config = DeviceConfig(torch.bfloat16, torch.device("cpu"), ops=chosen)
        decoder = load_truncated_decoder(checkpoint, 2, words.vocab_ids, device_config).to(dtype)
        if fast:
            token_table.precompute_qkv(decoder)
            use_eager_attention(decoder)
        lora.inject(decoder, lora.LoRAConfig(rank=4, alpha=8.0))
        generator = torch.Generator().manual_seed(0)
        for adapter in lora.adapters(decoder).values():
            adapter.lora_B.data.normal_(std=0.05, generator=generator)
        batches = BatchLoader(words, pairs, DeviceConfig(dtype, torch.device("cpu")), batch=30)
        (part,), false_negatives = next(iter(batches.epoch(0)))
        pool = Pooling.from_checkpoint("final", checkpoint, torch.device("cpu"))
        loss = Objective("infonce", 0.1, 0.4)(pool(run(decoder.train(), part), part), false_negatives)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in lora.trainable(decoder))]

    names = ["loss", *(f"gradient {number}" for number in range(100))]
    for name, got, eager, truth in zip(names, found(torch.bfloat16, True), found(torch.bfloat16, False), found(torch.float64, False)):
        if name == "loss":
            # one number of eager's may be lucky
            assert abs(got - truth) <= max(2 * abs(eager - truth), 2**-9 * abs(truth))
        else:
            assert_faithful(got, eager, truth, 48, name)


@pytest.mark.slow
def test_a_run_in_bfloat16_learns_and_is_measured_in_float32(make_model, word_list, tmp_path):
    options = {"model": str(make_model("llama")), "pairs": str(word_list), "rank": 4, "batch": 27, "epochs": 6, "warmup": 2}
    runs = {dtype: train(TrainConfig(**options, dtype=dtype, output=str(tmp_path / dtype))) for dtype in ("bfloat16", "auto", "float32")}
    assert runs["bfloat16"]["machine"]["dtype"] == "bfloat16"
    assert runs["auto"]["machine"]["dtype"] == processor.ways().fastest
    before = [
        {(m["split"], str(m["layer"]), m["metric"]): m["value"] for m in runs[dtype]["measurements"] if m["when"] == "before"}
        for dtype in ("auto", "float32")
    ]
    assert before[0] == before[1]
    for facts in runs.values():
        assert facts["training"]["loss_last"] == pytest.approx(runs["float32"]["training"]["loss_last"], rel=0.05)
        assert facts["training"]["loss_last"] < facts["training"]["loss_first"] - 0.1


@pytest.fixture
def stopped(make_model, word_list, tmp_path, monkeypatch):
    """``stopped(dtype)``: a run that was stopped in its middle, and its options."""

    def stop(dtype: str) -> dict:
        options = {"model": str(make_model("llama")), "pairs": str(word_list), "rank": 4, "batch": 14, "epochs": 4, "warmup": 2}
        options |= {"dtype": dtype, "no_report": True, "output": str(tmp_path / "stopped")}
        with monkeypatch.context() as patched:
            from tli.training.step import TrainStep

            take = TrainStep.__call__

            def stopping(self, position, *batch):
                take(self, position, *batch)
                if position == 6:
                    os.kill(os.getpid(), 2)

            patched.setattr(TrainStep, "__call__", stopping)
            with pytest.raises(KeyboardInterrupt):
                train(TrainConfig(**options))
        assert (tmp_path / "stopped" / STATE_FILE).is_file()
        return options

    return stop


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_a_run_goes_on_on_another_kind_of_processor_and_says_so(stopped, monkeypatch, tmp_path, capsys, dtype):
    ways = dict.fromkeys(processor.DTYPES, "onednn"), dict.fromkeys(processor.DTYPES, "eager")
    monkeypatch.setattr(processor, "ways", lambda: Ways("bfloat16", *ways))
    with monkeypatch.context() as patched:
        # a processor that has it all, whatever this one has
        patched.setitem(cpu.LIBRARIES, "onednn", torch.nn.functional.linear)
        options = stopped(dtype)
    monkeypatch.setitem(cpu.LIBRARIES, "onednn", refuses)
    monkeypatch.setattr(processor, "ways", lambda: dataclasses.replace(PLAIN, matmul={**PLAIN.matmul, "bfloat16": "torch in float32"}))
    capsys.readouterr()
    facts = train(TrainConfig(**options, resume=True))
    said = " ".join(capsys.readouterr().err.split())
    expected = "torch" if dtype == "float32" else "torch in float32"
    assert f"begun on another machine and goes on with matmul {expected} in place of onednn: its last bits" in said
    # in the dtype that it was begun in, and with the attention that runs anywhere
    assert facts["machine"]["dtype"] == ("float32" if dtype == "float32" else "bfloat16")
    assert facts["machine"]["attention"] == "eager"
    assert facts["training"]["steps"] == 16


@pytest.mark.slow
def test_on_the_same_machine_a_run_goes_on_to_the_same_bytes_whatever_is_measured_now(stopped, monkeypatch, tmp_path, capsys):
    options = stopped("auto")
    whole = train(TrainConfig(**{**options, "output": str(tmp_path / "whole")}))
    monkeypatch.setattr(processor, "ways", lambda: OTHER)
    capsys.readouterr()
    facts = train(TrainConfig(**options, resume=True))
    assert "begun on another machine" not in capsys.readouterr().err
    assert facts["adapter"]["sha256"] == whole["adapter"]["sha256"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_that_was_asked_for_is_computed_in_and_said_to_be_slow(monkeypatch, dtype):
    monkeypatch.setattr(processor, "ways", lambda: dataclasses.replace(PLAIN, matmul={**PLAIN.matmul, dtype: "torch in float32"}))
    device_config = resolve_device("cpu", dtype, impl="auto")
    assert device_config.dtype == getattr(torch, dtype)
    assert (
        f"in float32, rounded to {dtype}: this processor has no fast products of it, --dtype float32 is faster"
        in device_config.ops.description
    )
    assert f"{dtype} products are slow on this processor" in resolve_device("cpu", dtype, impl="reference").ops.description
