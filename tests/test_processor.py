"""Threads by the quota, the dtype by a measurement that is kept, and a run in bf16 as true as transformers' own."""

import json

import numpy as np
import pytest
import torch
from fidelity import assert_faithful
from tli_kernels import onednn

from tli import first_block, lora, ops, processor
from tli.batches import EpochBatches
from tli.checkpoint import open_checkpoint
from tli.config import TrainConfig
from tli.lexicon import read_pairs
from tli.objective import Objective, pooling
from tli.packing import tokenise
from tli.train import train
from tli.truncated import attend_in_steps, place, run, truncate

# the fixture of all tests puts another in its place
fastest_dtype = processor.fastest_dtype


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measurements in place of this processor's: seconds by dtype, and how often they were taken."""
    taken, seconds = [], {torch.float32: 1.0, torch.bfloat16: 0.5}
    monkeypatch.setattr(processor, "_product_seconds", lambda dtype: taken.append(dtype) or seconds[dtype])
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "cache"))
    return taken, seconds


@pytest.mark.parametrize(
    ("bfloat16_s", "chosen"), [(0.5, torch.bfloat16), (0.71, torch.bfloat16), (0.72, torch.float32), (3.0, torch.float32)]
)
def test_bfloat16_is_taken_where_it_is_clearly_faster(measured, bfloat16_s, chosen):
    measured[1][torch.bfloat16] = bfloat16_s
    assert fastest_dtype() == chosen


def test_what_was_measured_is_kept(measured, tmp_path):
    taken, seconds = measured
    assert fastest_dtype() == torch.bfloat16
    seconds[torch.bfloat16] = 5.0
    assert fastest_dtype() == torch.bfloat16
    assert len(taken) == 2
    file = tmp_path / "cache" / "processor.json"
    (key,) = json.loads(file.read_text())
    assert torch.__version__ in key
    # another processor, or a damaged file, is measured anew
    for content in ('{"another": "bfloat16"}', "{", json.dumps({key: "int8"})):
        file.write_text(content)
        assert fastest_dtype() == torch.float32
    file.unlink()
    file.mkdir()
    assert fastest_dtype() == torch.float32


def test_this_processor_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TLI_CACHE", str(tmp_path))
    assert fastest_dtype() in (torch.float32, torch.bfloat16)
    assert min(processor._product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)) > 0


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
    assert processor.limit_threads() == expected
    threads[0] = 7
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert processor.limit_threads() == 7


@pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loss_and_gradients_in_bfloat16_are_as_true_as_transformers_own(make_model, word_list, monkeypatch, family):
    """Truth: the same weights, rounded to bf16 once, in fp64."""
    model, checkpoint = str(make_model(family)), open_checkpoint(str(make_model(family)))
    pairs = read_pairs(str(word_list), "swahili", "english")
    words = tokenise(checkpoint.tokenizer(), [p.source for p in pairs] + [p.target for p in pairs], 64, " ")
    config = TrainConfig(model=model, pairs=str(word_list), batch=30)
    rounded = place("cpu", "bfloat16")

    def found(dtype: torch.dtype, fast: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(ops, "_chosen", ops._ONEDNN if fast else ops._REFERENCE)
        decoder = truncate(checkpoint, 2, words.rows, rounded).to(dtype)
        if fast:
            first_block.tabulate(decoder)
            attend_in_steps(decoder)
        lora.inject(decoder, lora.LoRAConfig(rank=4, alpha=8.0))
        generator = torch.Generator().manual_seed(0)
        for adapter in lora.adapters(decoder).values():
            adapter.lora_B.data.normal_(std=0.05, generator=generator)
        batches = EpochBatches(config, words, np.arange(len(pairs)), pairs, place("cpu", str(dtype)[6:]))
        (part,), same = next(iter(batches.epoch(0)))
        pool = pooling("final", checkpoint, torch.device("cpu"))
        loss = Objective("infonce", 0.1, 0.4)(pool(run(decoder.train(), part), part), same)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in lora.trainable(decoder))]

    names = ["loss", *(f"gradient {number}" for number in range(100))]
    for name, got, eager, truth in zip(names, found(torch.bfloat16, True), found(torch.bfloat16, False), found(torch.float64, False)):
        assert_faithful(got, eager, truth, 48, name)


def test_a_run_in_bfloat16_learns_and_is_measured_in_float32(make_model, word_list, tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "fastest_dtype", lambda: torch.bfloat16)
    options = {"model": str(make_model("llama")), "pairs": str(word_list), "rank": 4, "batch": 27, "epochs": 6, "warmup": 2}
    runs = {dtype: train(TrainConfig(**options, dtype=dtype, output=str(tmp_path / dtype))) for dtype in ("auto", "float32")}
    assert runs["auto"]["machine"]["dtype"] == "bfloat16"
    before = [
        {(m["split"], str(m["layer"]), m["metric"]): m["value"] for m in facts["measurements"] if m["when"] == "before"}
        for facts in runs.values()
    ]
    assert before[0] == before[1]
    assert runs["auto"]["training"]["loss_last"] == pytest.approx(runs["float32"]["training"]["loss_last"], rel=0.05)
    assert runs["auto"]["training"]["loss_last"] < runs["auto"]["training"]["loss_first"] - 0.1
