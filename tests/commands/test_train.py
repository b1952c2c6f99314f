"""The command as its user meets it: a whole run, the same run twice, stops and kills, and every kind of bad input."""

import dataclasses
import errno
import importlib.util
import inspect
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tli import train
from tli.commands import scan
from tli.commands import train as train_module
from tli.config import ScanConfig, TrainConfig
from tli.data import word_pairs
from tli.data.loader import BatchLoader
from tli.model import lora
from tli.runtime.cli import parse
from tli.runtime.errors import TliError, run_command
from tli.training import collapse
from tli.training.run_logger import METRICS_FILE
from tli.training.state import STATE_FILE
from tli.training.step import lr_multiplier

ROOT = pathlib.Path(__file__).parent.parent.parent
REPORT_FILES = {"README.md", "report.json", "report.md", "distributions.png", "layers.png"}
ADAPTER_FILES = {lora.ADAPTER_FILE, lora.CONFIG_FILE, METRICS_FILE}
MAP_FILES = {"map.safetensors", "map.json"}


@pytest.fixture
def settings(make_model, word_list, tmp_path) -> dict:
    """A run of eight steps that takes a second."""
    model = str(make_model("llama"))
    sizes = {"layer": 2, "rank": 4, "batch": 14, "epochs": 2, "warmup": 2}
    return {"model": model, "pairs": str(word_list), **sizes, "output": str(tmp_path / "out")}


def run(settings: dict, **more) -> dict:
    return train(TrainConfig(**{**settings, **more}))


def adapter_bytes(folder) -> bytes:
    return (pathlib.Path(folder) / lora.ADAPTER_FILE).read_bytes()


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(folder) / METRICS_FILE).read_text().splitlines()]


def as_flags(settings: dict) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def command(flags: list[str], capsys) -> tuple[int, str]:
    """Exit code and standard error of ``python -m tli.train``, in this process."""
    with pytest.raises(SystemExit) as left:
        run_command(lambda: (train(parse(TrainConfig, "tli.train", flags)), sys.exit(0)))
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_run_leaves_an_adapter_and_a_report_of_it(settings, tmp_path, dtype):
    facts = run(settings, dtype=dtype)
    folder = pathlib.Path(settings["output"])
    assert {path.name for path in folder.iterdir()} == REPORT_FILES | ADAPTER_FILES | MAP_FILES
    report = json.loads((folder / "report.json").read_text())
    assert report == json.loads(json.dumps(facts))
    assert report["config"]["token_norm"] == "final"
    for split, when in (("trained", "before"), ("trained", "after"), ("held_out", "before"), ("held_out", "after")):
        layers = [m["layer"] for m in report["measurements"] if (m["split"], m["when"], m["metric"]) == (split, when, "gap")]
        assert layers == [0, 1, 2, 3, 4, "output"]
    for record in report["measurements"]:
        assert record["low"] <= record["value"] <= record["high"]
        assert record["n"] == report["pairs"][record["split"]]
    gap = {m["when"]: m["value"] for m in report["measurements"] if (m["split"], m["layer"], m["metric"]) == ("trained", 2, "gap")}
    assert gap["after"] > gap["before"] + 0.01
    # what needs no training stands beside it, and what it cost
    ways = {(r["way"], r["stream"], r["layer"]) for r in report["baselines"]["records"]}
    assert {("cca", "before", 2), ("plain", "after", 2), ("plain", "before", "output"), ("edit_distance", None, None)} <= ways
    assert {record["n"] for record in report["baselines"]["records"] if record["candidates"] == "list"} <= {report["pairs"]["held_out"]}
    # its context is too short for sixteen examples
    assert report["probe"] is None
    assert [one["text"]["name"] for one in report["harm"]] == ["running-text-swahili.txt", "running-text-english.txt"]
    assert all(one["after"][0]["kl"]["value"] > 0 for one in report["harm"])
    assert report["verdict"].startswith("At layer 2, ")
    # below the trained blocks nothing changes
    below = [m for m in report["measurements"] if m["layer"] == 0 and m["split"] == "held_out" and m["metric"] == "cosine"]
    assert below[0]["value"] == below[1]["value"]


def test_the_loss_falls_from_chance_and_layer_l_is_the_trained_one(settings):
    facts = run(settings, epochs=20, no_report=True, lr=3e-3, keep_weight=0.0)
    training = facts["training"]
    assert training["steps"] == 20 * 4
    assert training["chance_loss"] == pytest.approx(math.log(54 / 4))
    assert training["loss_last"] < 0.7 * training["loss_first"]
    assert {path.name for path in pathlib.Path(settings["output"]).iterdir()} == ADAPTER_FILES | MAP_FILES
    config = json.loads((pathlib.Path(settings["output"]) / lora.CONFIG_FILE).read_text())
    assert config["layers_to_transform"] == [0, 1]


@pytest.mark.slow
def test_the_hooked_arm_trains_the_early_arms_adapter(settings, tmp_path):
    for name, more in (("early", {}), ("full-hook", {}), ("recomputed", {"arm": "full-hook", "checkpointing": True})):
        facts = run(settings, **{"arm": name, "dropout": 0.2, "no_report": True, "output": str(tmp_path / name), **more})
        assert facts["training"]["steps"] == 8
    assert adapter_bytes(tmp_path / "early") == adapter_bytes(tmp_path / "full-hook") == adapter_bytes(tmp_path / "recomputed")


@pytest.mark.slow
def test_the_full_arm_aligns_the_output_with_adapters_in_every_block(settings, tmp_path):
    facts = run(settings, arm="full", epochs=20, lr=3e-3, keep_weight=0.0)
    assert facts["training"]["loss_last"] < 0.7 * facts["training"]["loss_first"]
    config = json.loads((pathlib.Path(settings["output"]) / lora.CONFIG_FILE).read_text())
    assert config["layers_to_transform"] == [0, 1, 2, 3]
    assert {test["layer"] for test in facts["tests"]} == {2, "output"}
    gap = {m["when"]: m["value"] for m in facts["measurements"] if (m["split"], m["layer"], m["metric"]) == ("trained", "output", "gap")}
    assert gap["after"] > gap["before"] + 0.1
    # the loss has no token norm of its own, whatever the report's layers have
    plain = run(
        settings, arm="full", epochs=20, lr=3e-3, keep_weight=0.0, token_norm="none", no_report=True, output=str(tmp_path / "plain")
    )
    assert plain["training"]["loss_last"] == facts["training"]["loss_last"]


@pytest.mark.slow
def test_auto_takes_the_layer_that_a_scan_of_the_trained_pairs_names(settings, make_model, tmp_path):
    # models that do not all choose the same layer
    chosen = set()
    for seed in range(3):
        model = str(make_model("llama", seed=seed))
        facts = run(settings, model=model, layer="auto", no_report=True, output=str(tmp_path / f"auto{seed}"))
        found = scan.scan(ScanConfig(model=model, split="trained", pairs=settings["pairs"], output=str(tmp_path / f"scan{seed}")))
        assert facts["config"]["layer"] == found["choice"]["gap"]
        config = json.loads((tmp_path / f"auto{seed}" / lora.CONFIG_FILE).read_text())
        assert config["layers_to_transform"] == list(range(facts["config"]["layer"]))
        chosen.add(facts["config"]["layer"])
    assert len(chosen) > 1


def test_adapters_in_the_first_blocks_can_align_the_output(settings):
    facts = run(settings, arm="full", targets=r"layers\.[01]\..*", no_report=True)
    config = json.loads((pathlib.Path(settings["output"]) / lora.CONFIG_FILE).read_text())
    assert config["layers_to_transform"] == [0, 1]
    assert facts["training"]["loss_first"] != run(settings, no_report=True, overwrite=True)["training"]["loss_first"]


@pytest.mark.parametrize(
    "more",
    [{}]
    + [
        pytest.param(more, marks=pytest.mark.slow)
        for more in ({"recipe": "paper"}, {"dropout": 0.2}, {"dtype": "bfloat16"}, {"arm": "full"})
    ],
    ids=lambda more: ",".join(more) or "default",
)
def test_the_same_seed_gives_the_same_bytes_and_another_others(settings, make_model, tmp_path, more):
    # the paper's recipe packs weights into NF4's blocks of 64
    settings["model"] = str(make_model("llama", hidden_size=64, intermediate_size=128))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        facts = run(settings, **more, no_report=True, seed=seed, output=str(tmp_path / name))
        assert math.isfinite(facts["training"]["loss_last"])
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b") != adapter_bytes(tmp_path / "c")


def test_keeping_all_rows_changes_no_number(settings, tmp_path):
    few, everything = (run(settings, no_report=True, all_rows=rows, output=str(tmp_path / str(rows))) for rows in (False, True))
    assert few["training"]["loss_last"] == pytest.approx(everything["training"]["loss_last"], rel=1e-5)


def test_shuffling_teaches_no_true_pair_and_measures_true_ones(settings, tmp_path):
    true, shuffled = (run(settings, shuffle_pairs=flag, output=str(tmp_path / str(flag))) for flag in (False, True))
    assert shuffled["shuffled"]
    assert "control run" in shuffled["verdict"]
    before = [[m for m in facts["measurements"] if m["when"] == "before"] for facts in (true, shuffled)]
    assert before[0] == before[1]
    partners = train_module._mismatched(54, seed=0)
    assert sorted(partners) == list(range(54))
    assert not (partners == np.arange(54)).any()


def test_every_batch_has_each_pair_once_and_knows_its_synonyms(settings, word_list):
    pairs = word_pairs.read_pairs(str(word_list), "swahili", "english")
    from tli.model.checkpoint import open_checkpoint
    from tli.runtime.device import resolve_device

    config, checkpoint = TrainConfig(**settings), open_checkpoint(settings["model"])
    words = train_module._tokenise(config, checkpoint, checkpoint.tokenizer(), [pairs], [])
    device_config = resolve_device("cpu", "auto")
    # pairs 7, 20 and 4 come to share a gloss with 0, 0 and 3
    shared = [dataclasses.replace(pair, synonyms=(pairs[{7: 0, 20: 0, 4: 3}.get(i, i)].target,)) for i, pair in enumerate(pairs)]
    edges = {tuple(edge) for edge in word_pairs.false_negative_pairs(shared).tolist()}
    assert edges == {(0, 7), (7, 0), (0, 20), (20, 0), (7, 20), (20, 7), (3, 4), (4, 3)}
    batches, sizes, found = BatchLoader(words, shared, device_config, batch=config.batch), [], 0
    orders = np.array_split(np.random.default_rng([config.seed, 0, 0]).permutation(len(pairs)), 5)
    for ((batch,), false_negatives), numbers in zip(batches.epoch(0), orders, strict=True):
        sizes.append((len(batch.indptr) - 1) // 2)
        # the list's edges, as far as they lie within the batch
        assert {(numbers[i], numbers[j]) for i, j in false_negatives.tolist()} == {(i, j) for i, j in edges if {i, j} <= {*numbers}}
        assert false_negatives.tolist() == sorted(false_negatives.tolist())
        found += len(false_negatives)
    assert sum(sizes) == len(pairs)
    assert max(sizes) - min(sizes) <= 1
    passes = [[batch.input_ids.tolist() for (batch,), _ in batches.epoch(epoch)] for epoch in (0, 0, 1)]
    assert passes[0] == passes[1] != passes[2]
    assert [batch.input_ids.tolist() for (batch,), _ in batches.epoch(0, skip=3)] == passes[0][3:]
    # mismatched pairs: a source's glosses are those that it is taught with
    partners = train_module._mismatched(len(pairs), seed=0)
    taught = [dataclasses.replace(shared[own], source=pair.source) for pair, own in zip(pairs, partners, strict=True)]
    wide = BatchLoader(words, shared, device_config, batch=30, partners=partners)
    edges, found_wrong = {tuple(edge) for edge in word_pairs.false_negative_pairs(taught).tolist()}, 0
    for (_, false_negatives), numbers in zip(wide.epoch(0), np.array_split(np.concatenate(orders), 2), strict=True):
        assert {(numbers[i], numbers[j]) for i, j in false_negatives.tolist()} == {(i, j) for i, j in edges if {i, j} <= {*numbers}}
        found_wrong += len(false_negatives)
    assert found_wrong
    (_, false_negatives), *_ = BatchLoader(words, shared, device_config, batch=60).epoch(0)
    assert len(false_negatives) == 8 > found


def test_the_rate_warms_up_and_decays():
    rates = [lr_multiplier(step, 100, 10, "linear") for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert np.diff(rates[10:]) == pytest.approx(np.full(89, -1 / 90))
    assert 0 < rates[-1] < 0.02
    cosine = [lr_multiplier(step, 100, 10, "cosine") for step in range(10, 100)]
    assert cosine == pytest.approx([(1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)])
    assert {lr_multiplier(step, 100, 0, "constant") for step in range(100)} == {1.0}
    assert all(0 < lr_multiplier(step, 5, 50, "linear") <= 0.1 for step in range(5))


def test_from_tli_import_train_is_the_function_and_the_command():
    assert callable(train)
    assert train is train_module.train
    assert list(inspect.signature(train).parameters) == ["config"]


def test_flags_and_fields_are_the_same_and_all_have_help(capsys):
    named = "model pairs rank layer targets alpha dropout batch epochs lr temperature recipe seed shuffle_pairs impl device dtype"
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    assert {*named.split(), "output", "overwrite", "no_report", "json"} <= set(fields)
    with pytest.raises(SystemExit) as left:
        parse(TrainConfig, "tli.train", ["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for field in fields.values():
        assert f"--{field.name.replace('_', '-')}" in shown
        assert field.metadata["help"]
    groups = ("model", "words", "adapter", "objective", "training", "output", "configuration", "commands")
    assert [line.strip() for line in shown.splitlines() if line.strip() in groups] == list(groups)
    assert "Example: python -m tli.train --rank 16 --layer 2" in shown
    flags = ["--rank", "8", "--recipe", "paper", "--no-pool-bos", "--lr", "1e-3"]
    assert parse(TrainConfig, "tli.train", flags) == TrainConfig(rank=8, recipe="paper", pool_bos=False, lr=1e-3)
    assert parse(TrainConfig, "tli.train", []) == TrainConfig()


def test_given_values_win_over_the_recipe():
    paper = TrainConfig(recipe="paper")
    assert (paper.targets, paper.alpha, paper.dropout, paper.loss, paper.margin) == ("q_proj,v_proj", 32.0, 0.05, "hinge", 0.4)
    assert (paper.batch, paper.epochs, paper.lr, paper.warmup, paper.schedule) == (8, 5, 2e-4, 50, "linear")
    assert (paper.pool_bos, paper.eval_pool_bos, paper.token_norm, paper.weights, paper.prefix) == (True, False, "none", "nf4", "")
    assert (paper.dtype, paper.init, paper.layer, paper.rank) == ("bfloat16", "kaiming", 2, 16)
    mixed = TrainConfig(recipe="paper", loss="infonce", pool_bos=False, dropout=0.0)
    assert (mixed.loss, mixed.pool_bos, mixed.dropout, mixed.batch) == ("infonce", False, 0.0, 8)


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_runs_on():
    """A run of a test that failed halfway would take a core from all that follow."""
    yield
    while _started:
        _started.pop().kill()


def start(settings: dict, save_every_s: float, report: bool = False) -> subprocess.Popen:
    """The command in a process of its own, saving its state as often as this."""
    flags = as_flags(settings) + ([] if report else ["--no-report"])
    code = (
        f"import tli.commands.train as t; from tli.training import loop; loop._SAVE_EVERY_S = {save_every_s}; "
        f"from tli.config import TrainConfig; from tli.runtime.cli import parse; "
        f"from tli.runtime.errors import run_command; "
        f"run_command(lambda: t.train(parse(TrainConfig, 'tli.train', {flags!r})))"
    )
    _started.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True))
    return _started[-1]


def wait_for(path: pathlib.Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no state within two minutes"
        time.sleep(0.02)


def test_every_step_is_logged_with_its_learning_rate_and_the_last_loss_is_the_reports(settings):
    facts = run(settings, no_report=True, lr=1e-3, clip=0.0)
    lines = metrics(settings["output"])
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["epoch"] for line in lines] == [step / 4 for step in range(1, 9)]
    # two steps of warm-up, then linear decay over six
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * share for share in (1 / 2, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    assert (lines[0]["loss"], lines[-1]["loss"]) == (facts["training"]["loss_first"], facts["training"]["loss_last"])
    assert all(line["grad_norm"] > 0 for line in lines)
    assert [line.get("schema") for line in lines] == [1] + 7 * [None]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["early", "full"])
def test_a_killed_run_resumes_to_the_bytes_of_one_that_was_not(settings, tmp_path, arm):
    long = {**settings, "epochs": 30, "dropout": 0.1, "arm": arm, "dtype": "float32"}
    process = start(long, save_every_s=0)
    wait_for(tmp_path / "out" / STATE_FILE, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = load_file(tmp_path / "out" / STATE_FILE)
    assert 0 < len(state["losses"]) < 30 * 4
    logged = tmp_path / "out" / METRICS_FILE
    assert [line["loss"] for line in metrics(tmp_path / "out")[: len(state["losses"])]] == state["losses"].tolist()
    # as from a kill long after the last save, in the middle of a line
    with logged.open("a") as file:
        file.write('{"step": 119, "loss": 0.5}\n{"step": 120, "lo')
    with pytest.raises(TliError, match="a run must be resumed with its own options, pairs, .*, got other options; "):
        run(long, resume=True, no_report=True, lr=0.5)
    resumed = run(long, resume=True, no_report=True)
    assert resumed["training"]["steps"] == 30 * 4
    whole = run(long, no_report=True, output=str(tmp_path / "whole"))
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")
    assert resumed["training"]["loss_last"] == whole["training"]["loss_last"]
    assert logged.read_bytes() == (tmp_path / "whole" / METRICS_FILE).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == ADAPTER_FILES | MAP_FILES


def test_a_second_run_is_kept_out_of_the_folder_and_one_that_was_killed_before_its_first_save_starts_anew(settings, tmp_path):
    process = start({**settings, "epochs": 100_000}, save_every_s=1e9)
    wait_for(tmp_path / "out" / METRICS_FILE, process)
    for option in ("overwrite", "resume"):
        with pytest.raises(
            TliError, match="^--output: one run at a time may write to the folder, got another that is writing to .*out; wait"
        ):
            run(settings, no_report=True, **{option: True})
    # the lock dies with the process
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {METRICS_FILE}
    run(settings, resume=True, no_report=True)
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=str)
def test_ctrl_c_saves_what_there_is(settings, tmp_path, number):
    long = {**settings, "epochs": 100_000}
    process = start(long, save_every_s=0)
    wait_for(tmp_path / "out" / STATE_FILE, process)
    process.send_signal(number)
    shown = " ".join(process.communicate(timeout=60)[1].split())
    assert process.returncode == 128 + number
    assert "--resume goes on from here" in shown
    assert "Traceback" not in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == ADAPTER_FILES | {STATE_FILE}
    saved, state = load_file(tmp_path / "out" / lora.ADAPTER_FILE), load_file(tmp_path / "out" / STATE_FILE)
    assert [line["loss"] for line in metrics(tmp_path / "out")] == state["losses"].tolist()
    assert torch.equal(saved["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"], state["layers.0.self_attn.q_proj.lora_B"])


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_while_it_measures_can_go_on(settings, tmp_path):
    process = start({**settings, "epochs": 2}, save_every_s=0, report=True)
    wait_for(tmp_path / "out" / lora.ADAPTER_FILE, process)
    process.send_signal(signal.SIGTERM)
    shown = process.communicate(timeout=60)[1]
    assert (process.returncode, "Traceback" in shown) == (143, False)
    assert (tmp_path / "out" / STATE_FILE).exists()
    assert run(settings, resume=True)["measurements"]


def test_a_signal_that_is_ignored_stays_ignored(settings, tmp_path):
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start({**settings, "epochs": 100_000}, save_every_s=0)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(tmp_path / "out" / STATE_FILE, process)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_an_interrupted_report_is_made_by_resuming(settings, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "measure_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    first = adapter_bytes(settings["output"])
    facts = run(settings, resume=True)
    assert adapter_bytes(settings["output"]) == first
    assert facts["measurements"]


@pytest.mark.slow
def test_a_collapse_is_said_once_and_stands_in_the_report(settings, monkeypatch, capsys):
    steps = iter(range(1000))

    def collapsing(embeddings):
        step = next(steps)
        return torch.tensor([0.2 + 0.02 * step, 40.0 if step < 12 else 2.0])

    monkeypatch.setattr(collapse, "spread", collapsing)
    # a rate of nothing keeps the loss where it is
    facts = run({**settings, "epochs": 10, "lr": 1e-12, "temperature": 1e3})
    assert facts["training"]["alarm"].startswith("at step ")
    assert " ".join(capsys.readouterr().err.split()).count("warning: at step") == 1
    assert f"While it trained, {facts['training']['alarm']}." in facts["verdict"]
    assert {"mismatched", "effective_rank"} <= metrics(settings["output"])[0].keys()


def test_an_output_folder_is_not_lost(settings, capsys):
    folder = pathlib.Path(settings["output"])
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    code, shown = command(as_flags(settings), capsys)
    assert code == 2
    assert "--output: the output folder must be new or empty, got " in shown
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    run(settings, overwrite=True, no_report=True)
    assert {path.name for path in folder.iterdir()} == ADAPTER_FILES | MAP_FILES | {"mine.txt"}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
def test_an_earlier_result_stays_whole_until_the_new_one_is_complete(settings, monkeypatch):
    run(settings)
    folder = pathlib.Path(settings["output"])
    (folder / "evaluation.json").write_text("of the first adapter")
    (folder / "mine.txt").write_text("precious")
    before = contents(folder)
    with monkeypatch.context() as patched:

        def interrupted(*arguments, **named):
            # the adapter is there, and nothing of its report
            raise KeyboardInterrupt

        patched.setattr(train_module, "judge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, overwrite=True, seed=7)
    assert contents(folder) == before
    with pytest.raises(TliError, match="a run must be resumed with its own .*, got other options"):
        run(settings, resume=True, seed=8)
    assert contents(folder) == before
    # as a study's cells are begun: what is there goes on
    facts = run(settings, resume=True, overwrite=True, seed=7)
    report = json.loads((folder / "report.json").read_text())
    assert report["adapter"] == facts["adapter"]
    assert report["config"]["seed"] == 7
    assert (folder / lora.ADAPTER_FILE).read_bytes() != before[lora.ADAPTER_FILE]
    assert (folder / "earlier-evaluation.json").read_text() == "of the first adapter"
    assert {path.name for path in folder.iterdir()} == REPORT_FILES | ADAPTER_FILES | MAP_FILES | {"mine.txt", "earlier-evaluation.json"}
    # a run that cannot begin leaves no trace
    kept = contents(folder)
    with pytest.raises(TliError, match="--rank"):
        run(settings, overwrite=True, rank=10_000)
    assert contents(folder) == kept
    assert not [path for path in folder.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_what_a_run_is_made_of_is_what_it_says_it_is_made_of(settings, tmp_path, monkeypatch):
    """The list, the weights and the tokenizer are hashed as they are read; whatever changes meanwhile is named."""
    model, words = tmp_path / "model", tmp_path / "list.tsv"
    shutil.copytree(settings["model"], model)
    shutil.copyfile(settings["pairs"], words)
    mine = {**settings, "model": str(model), "pairs": str(words), "epochs": 3}
    was_fit = train_module.fit

    def during(change):
        def fit(*arguments, **named):
            change()
            return was_fit(*arguments, **named)

        monkeypatch.setattr(train_module, "fit", fit)

    # a list that is edited, or goes, changes nothing: it was read
    read = word_pairs.list_facts(words)
    during(words.unlink)
    assert run(mine, no_report=True)["pairs"]["sha256"] == read["sha256"]
    shutil.copyfile(settings["pairs"], words)

    weights = load_file(model / "model.safetensors")

    def other_weights(seed: float) -> None:
        changed = {**weights, "model.layers.0.mlp.up_proj.weight": weights["model.layers.0.mlp.up_proj.weight"] + seed}
        # in a new file, as a download comes
        save_file(changed, tmp_path / "new", metadata={"format": "pt"})
        (tmp_path / "new").replace(model / "model.safetensors")

    during(lambda: other_weights(0.1))
    with pytest.raises(TliError, match="the model must stay as it is during a run, got other weights than at its start; run again"):
        run(mine, no_report=True, output=str(tmp_path / "other"))

    other_weights(0.0)
    process = start({**mine, "epochs": 100_000, "output": str(tmp_path / "stopped")}, save_every_s=0)
    wait_for(tmp_path / "stopped" / STATE_FILE, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    other_weights(0.2)
    with pytest.raises(TliError, match="a run must be resumed with its own .*, got other model; "):
        run(mine, no_report=True, resume=True, epochs=100_000, output=str(tmp_path / "stopped"))
    other_weights(0.0)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TliError, match="a run must be resumed with its own .*, got other tokens; "):
        run(mine, no_report=True, resume=True, epochs=100_000, output=str(tmp_path / "stopped"))


@pytest.mark.slow
def test_an_old_report_does_not_stand_beside_a_new_adapter(settings):
    run(settings)
    run(settings, overwrite=True, no_report=True, seed=5)
    assert {path.name for path in pathlib.Path(settings["output"]).iterdir()} == ADAPTER_FILES | MAP_FILES


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(settings, monkeypatch, capsys):
    run(settings)
    folder = pathlib.Path(settings["output"])
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in ADAPTER_FILES}

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    code, shown = command([*as_flags(settings), "--overwrite", "--seed", "3"], capsys)
    assert code == 2
    assert shown.splitlines()[-1].endswith("the disk must have room for the output, got no space left; free some space and run again")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in ADAPTER_FILES} == kept
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_model_of_nan_stops_with_an_error(settings, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(settings["model"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, shown = command(as_flags({**settings, "model": str(broken)}), capsys)
    assert code == 2
    assert "step 1: the loss must be finite, got nan; lower --lr, or check the model's weights" in shown


@pytest.mark.slow
def test_of_a_gradient_that_is_not_finite_the_last_good_state_is_kept(settings, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        was_fit = train_module.fit

        def fit(step, *arguments, **named):
            done = 0

            def spoil(parameter):
                nonlocal done
                done += 1
                # twice a step, of the words and of the kept text: in the fifth
                if done == 9:
                    parameter.grad[0] = float("inf")

            step.parameters[-1].register_post_accumulate_grad_hook(spoil)
            return was_fit(step, *arguments, **named)

        patched.setattr(train_module, "fit", fit)
        code, shown = command([*as_flags(settings), "--no-report"], capsys)
    assert code == 2
    assert "the last good state, after step 4, is kept: " in " ".join(shown.split())
    assert "error: step 5: the gradient norm must be finite, got inf" in shown
    kept = load_file(tmp_path / "out" / STATE_FILE)
    assert len(kept["losses"]) == 4
    assert all(tensor.isfinite().all() for tensor in kept.values())
    # whatever it was, without it the run goes on to the bytes of one that never met it
    run(settings, no_report=True, resume=True)
    run(settings, no_report=True, output=str(tmp_path / "whole"))
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_absent_shards_leave_a_report_of_layer_l_that_says_why(settings, make_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama", shards=True), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith(("model.embed", "model.layers.0.", "model.layers.1."))}
    assert index["model.norm.weight"] not in needed
    for file in set(index.values()) - needed:
        (folder / file).unlink()
    with pytest.raises(TliError, match="the folder must hold model-.*safetensors, got none; "):
        run(settings, model=str(folder), token_norm="final")
    facts = run(settings, model=str(folder))
    assert facts["config"]["token_norm"] == "rms"
    assert {m["layer"] for m in facts["measurements"]} == {0, 1, 2}
    assert "is absent, which holds block 2" in facts["missing_output"]
    assert "The output was not measured" in facts["verdict"]
    assert facts["harm"] == []
    assert facts["probe"] is None
    assert {record["layer"] for record in facts["baselines"]["records"]} == {2, None}


BAD = {
    "missing file": (["--pairs", "{tmp}/absent.tsv"], "absent.tsv"),
    "empty list": (["--pairs", "{tmp}/empty.tsv"], "empty.tsv"),
    "one column": (["--pairs", "{tmp}/one.tsv"], "one.tsv"),
    "wrong key": (["--source", "kiswahili"], "kiswahili"),
    "not utf-8": (["--pairs", "{tmp}/latin.tsv"], "latin.tsv:3"),
    "empty word": (["--pairs", "{tmp}/blank.tsv"], "blank.tsv:3"),
    "long word": (["--pairs", "{tmp}/long.tsv"], "a word must have 1 to 63 tokens"),
    "too few pairs": (["--pairs", "{tmp}/few.tsv"], "pairs"),
    "leak": (["--held-out-pairs", "{list}"], "held"),
    "held out share": (["--held-out", "1.5"], "--held-out"),
    "layer 0": (["--layer", "0"], "--layer: the layer must be from 1 to 4"),
    "layer beyond": (["--layer", "5"], "--layer: the layer must be from 1 to 4"),
    "layer in words": (
        ["--layer", "many"],
        'got Invalid value for --layer: unable to convert "many" into int|Literal[auto]|None; see --help',
    ),
    "layer of a hook": (["--arm", "full-hook", "--layer", "5"], "--layer: the layer must be from 1 to 4"),
    "layer of a report": (["--arm", "full", "--layer", "0"], "--layer: the layer must be from 1 to 4"),
    "wrong arm": (["--arm", "late"], 'got Invalid value "late" for --arm. Choose from: "early", "full", "full-hook"'),
    "rank 0": (["--rank", "0"], "--rank: the number must be at least 1, got 0; "),
    "rank beyond": (["--rank", "1000"], "--rank: the rank must be at most 48"),
    "unknown target": (["--targets", "q_proj,nonsense"], "--targets: each target must be a linear layer of the model"),
    "folder without config": (["--model", "{tmp}"], "the folder must hold a config.json"),
    "no such folder": (["--model", "{tmp}/absent"], "--model: the model must be a folder or a hub name"),
    "batch": (["--batch", "1"], "--batch: the number must be at least 2, got 1; "),
    "device": (["--device", "cuda:7"], "--device: the device must be on this machine, got cuda:7; "),
    "device without numbers": (["--device", "meta"], "--device: the device must be cpu, cuda or cuda:N, got meta; "),
    "second cpu": (["--device", "cpu:1"], "--device: the device must be cpu, cuda or cuda:N, got cpu:1; "),
    "fused": (["--impl", "fused", "--device", "cpu", "--dtype", "bfloat16"], "--impl: the fused ops must be able to run"),
    "wrong number": (["--rank", "many"], 'got Invalid value for --rank: unable to convert "many" into int; see --help'),
    "wrong flag": (["--ranks", "3"], "got Unknown option: --ranks. Did you mean --rank?; see --help"),
    "wrong choice": (["--recipe", "best"], 'got Invalid value "best" for --recipe. Choose from: "default", "contrastive", "paper"'),
    "tensorboard": (["--tensorboard"], "--tensorboard: tensorboard must be installed, got no such package; "),
    "output is a file": (["--output", "{list}"], "--output: the output must be a folder"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(settings, word_list, tmp_path, capsys, monkeypatch, kind):
    # a machine that has it must refuse the flag as one that has not
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: find(name) if name != "tensorboard" else None
    )
    (tmp_path / "empty.tsv").write_text("")
    (tmp_path / "one.tsv").write_text("swahili\nkitabu\n")
    (tmp_path / "latin.tsv").write_bytes(b"swahili\tenglish\nkitabu\tb\xc3\xb4ok\nkahawa\tcaf\xe9\n")
    (tmp_path / "blank.tsv").write_text("swahili\tenglish\nkitabu\tbook\n  \tbed\n")
    (tmp_path / "long.tsv").write_text(word_list.read_text() + "x" * 500 + "\tlong\tnoun\tno\t\ttest\n")
    (tmp_path / "few.tsv").write_text("swahili\tenglish\nkitabu\tbook\nmtu\tperson\nmaji\twater\n")
    flags, message = BAD[kind]
    flags = [flag.format(tmp=tmp_path, list=word_list) for flag in flags]
    code, shown = command([*as_flags(settings), *flags], capsys)
    assert code == 2
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "; " in errors[0]
    assert "Traceback" not in shown
    assert word_list.exists()
    assert not (pathlib.Path(settings["output"]) / lora.ADAPTER_FILE).exists()


def test_a_process_ends_with_2_and_without_a_traceback(settings):
    flags = as_flags({**settings, "layer": 9})
    result = subprocess.run([sys.executable, "-m", "tli.train", *flags], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "error: --layer: the layer must be from 1 to 4" in result.stderr


@pytest.mark.slow
def test_json_is_one_object_on_standard_output(settings):
    flags = [*as_flags(settings), "--json"]
    result = subprocess.run([sys.executable, "-m", "tli.train", *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    facts = json.loads(result.stdout)
    assert facts["config"]["rank"] == 4
    assert facts["measurements"]
    assert "Layer 2" in result.stderr


def test_a_model_without_a_head_is_trained_and_asked_for_no_text(make_model, word_list, tmp_path, tokenizer, capsys):
    # as models for embeddings are saved: the bare decoder, its head left out and tied to nothing
    from transformers import AutoModel

    AutoModel.from_pretrained(make_model("mistral", tied=False), trust_remote_code=False).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    config = TrainConfig(model=str(tmp_path / "bare"), pairs=str(word_list), rank=2, batch=27, epochs=1, output=str(tmp_path / "out"))
    facts = train(config)
    assert facts["harm"] == []
    assert facts["probe"] is None
    assert "has no head (lm_head.weight)" in " ".join(capsys.readouterr().err.split())
