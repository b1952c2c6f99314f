"""The paper's protocol switch by switch: one thing changes at a time, numbers are the runs' own, and a kill costs one row."""

import dataclasses
import json
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

from tli import train
from tli.commands import protocol as protocol_module
from tli.commands import protocol_controls as controls
from tli.commands.grid import Cell
from tli.commands.protocol import ABLATIONS, FILES, RANDOM, measure_anew, options_of, protocol
from tli.config import ProtocolConfig, TrainConfig
from tli.data import word_pairs
from tli.metrics.alignment import measure
from tli.metrics.measures import names
from tli.model.checkpoint import open_checkpoint
from tli.reports.protocol import sentence, verdict
from tli.reports.wording import find_value
from tli.runtime.cli import parse
from tli.runtime.errors import TliError

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent.parent
BY_NAME = {switch.name: switch for switch in ABLATIONS}


@pytest.fixture(scope="module")
def model(make_model) -> pathlib.Path:
    """A model whose weights fit into NF4's blocks of 64."""
    return make_model("llama", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def splits(word_list) -> dict[str, list[word_pairs.Pair]]:
    return dict(zip(("trained", "held_out"), word_pairs.split_pairs(word_pairs.read_pairs(str(word_list), "swahili", "english"), 0.1, 0)))


def settings(model, word_list, output, **more) -> ProtocolConfig:
    return ProtocolConfig(**{"model": str(model), "pairs": str(word_list), "epochs": 2, "output": str(output), **more})


def run_here(cells: list[Cell], folder: pathlib.Path, jobs: int, done) -> None:
    """The cells in this process, without the seconds that a process takes to start."""
    for cell in cells:
        if cell.report(folder) is None:
            train(TrainConfig(**cell.options, output=str(folder / cell.name)))
        done(cell)


@pytest.fixture(scope="module")
def finished(model, word_list, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """A whole protocol: its folder, and what was returned."""
    output = tmp_path_factory.mktemp("protocol") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(protocol_module, "run_cells", run_here)
        # a cell's own figures are tested elsewhere
        patched.setattr("tli.reports.training.save_figure", lambda path, figure: None)
        result = protocol(settings(model, word_list, output))
    return output, result


def rows_of(result: dict) -> dict[str, dict]:
    return {row["name"]: row for row in result["rows"]}


@pytest.mark.parametrize("switch", ABLATIONS, ids=lambda switch: switch.name)
def test_each_switch_changes_one_option_of_the_papers_recipe(switch, word_list, tmp_path):
    config = settings("model", word_list, tmp_path, epochs=None)
    paper, mine = options_of(ABLATIONS[0], config, tmp_path), options_of(switch, config, tmp_path)
    assert paper == {name: value for name, value in dataclasses.asdict(TrainConfig(recipe="paper")).items() if name in paper} | {
        "model": "model",
        "pairs": str(word_list),
    }
    assert {name for name in paper if paper[name] != mine[name]} == set(switch.trained)
    # an adapter that was trained with an option may be measured without it, which is the same option
    assert len(switch.trained.keys() | switch.measured.keys()) == (switch.name != "paper" and switch.way not in ("everywhere", "null"))
    assert all(mine[name] != value for name, value in switch.measured.items())
    # what a cell's process reads off its command line is just that
    given = parse(TrainConfig, "tli.train", Cell(switch.name, mine).flags())
    assert {name: getattr(given, name) for name in mine} == mine


def test_names_are_folders_of_their_own():
    assert len(BY_NAME) == len(ABLATIONS) == len({switch.title for switch in ABLATIONS})
    # the run that a row measures anew is there
    assert all(any(other.way == "report" and other.trained == switch.trained for other in ABLATIONS) for switch in ABLATIONS)


def test_numbers_are_those_of_the_cells_own_reports(finished):
    output, result = finished
    assert {path.name for path in output.iterdir()} == {*FILES, "settings.json", ".protocol.lock", "cells"}
    assert json.loads((output / "protocol.json").read_text()) == json.loads(json.dumps(result))
    assert [row["name"] for row in result["rows"]] == list(BY_NAME)
    paper = json.loads((output / "cells" / "paper" / "report.json").read_text())
    for row in result["rows"]:
        if row["way"] not in ("report", "everywhere"):
            continue
        report = json.loads((output / "cells" / row["cell"] / "report.json").read_text())
        wanted = {
            (split, when, row["layer"], metric)
            for split in ("trained", "held_out")
            for when in ("before", "after")
            for metric in names("headline")
        }
        assert {(r["split"], r["when"], r["layer"], r["metric"]) for r in row["measurements"]} == wanted
        assert all(record in report["measurements"] for record in row["measurements"])
        assert all(test in report["tests"] for test in row["tests"])
        assert {(test["split"], test["metric"]) for test in row["tests"]} == {
            (s, m) for s in ("trained", "held_out") for m in ("cosine", "gap")
        }
        changed = {name for name, value in paper["config"].items() if report["config"][name] != value} - {"output"}
        assert changed == set(row["trained"])
    layers = {row["name"]: row["layer"] for row in result["rows"]}
    assert (layers["paper"], layers["layer-1"], layers["layer-3"], layers["final-norm"]) == (2, 1, 3, 2)


def test_measuring_anew_with_nothing_switched_gives_the_report_again(finished, model, splits):
    folder = finished[0] / "cells" / "float32"
    report = json.loads((folder / "report.json").read_text())
    anew = measure_anew(report["config"], folder, open_checkpoint(str(model)), splits)
    told = protocol_module.of_report(report)
    for mine, other in zip(
        *(sorted(of["measurements"], key=lambda r: (r["split"], r["when"], r["metric"])) for of in (anew, told)), strict=True
    ):
        assert [mine[key] for key in ("split", "when", "layer", "metric", "n")] == [
            other[key] for key in ("split", "when", "layer", "metric", "n")
        ]
        assert mine["value"] == pytest.approx(other["value"], abs=1e-6)
    for mine, other in zip(*(sorted(of["tests"], key=lambda t: (t["split"], t["metric"])) for of in (anew, told)), strict=True):
        assert (mine["split"], mine["metric"]) == (other["split"], other["metric"])
        assert mine["mean_gain"] == pytest.approx(other["mean_gain"], abs=1e-6)
    # and something switched gives other numbers, of the same words
    rows = rows_of(finished[1])
    for name in ("bos-measured", "nf4-then-full", "full-then-nf4"):
        for when in ("before", "after"):
            cell = json.loads((finished[0] / "cells" / rows[name]["cell"] / "report.json").read_text())
            mine, other = (find_value(of, "trained", when, 2, "cosine") for of in (rows[name], cell))
            assert mine["n"] == other["n"] == len(splits["trained"])
            assert abs(mine["value"] - other["value"]) > 1e-4


def test_the_pooled_sink_is_in_every_measured_vector(finished, model, splits):
    """Cosines with BOS pooled, from transformers' whole model on each word alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[0] / "cells" / "full"
    options = json.loads((folder / "report.json").read_text())["config"] | {"dtype": "float32", "eval_pool_bos": True}
    anew = measure_anew(options, folder, open_checkpoint(str(model)), splits)
    whole, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), AutoTokenizer.from_pretrained(model)

    def vector(word: str) -> torch.Tensor:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(word, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            return whole(ids, output_hidden_states=True).hidden_states[2][0].mean(0)

    cosines = [torch.cosine_similarity(vector(pair.source), vector(pair.target), dim=0) for pair in splits["trained"]]
    found = find_value(anew, "trained", "before", 2, "cosine")["value"]
    assert found == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)


def test_the_final_norm_row_is_a_model_built_with_two_blocks(finished, model, splits):
    from transformers import AutoModel, AutoTokenizer

    folder = finished[0] / "cells" / "final-norm"
    options = json.loads((folder / "report.json").read_text())["config"] | {"dtype": "float32", "weights": "full"}
    anew = measure_anew(options, folder, open_checkpoint(str(model)), splits)
    two, tokenizer = AutoModel.from_pretrained(model, num_hidden_layers=2, dtype=torch.float32), AutoTokenizer.from_pretrained(model)

    def vector(word: str) -> torch.Tensor:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(word, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            return two(ids, output_hidden_states=True).hidden_states[2][0, 1:].mean(0)

    cosines = [torch.cosine_similarity(vector(pair.source), vector(pair.target), dim=0) for pair in splits["held_out"]]
    found = find_value(anew, "held_out", "before", 2, "cosine")["value"]
    assert found == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)
    plain = measure_anew(options | {"token_norm": "none"}, folder, open_checkpoint(str(model)), splits)
    assert abs(find_value(plain, "held_out", "before", 2, "cosine")["value"] - found) > 1e-3


def words_of(tokens: list[int]) -> controls.TokenisedWords:
    """Words of so many tokens each."""
    indptr = np.concatenate([[0], np.cumsum(np.array(tokens) + 1)])
    return controls.TokenisedWords(np.zeros(indptr[-1], np.int64), indptr, np.ones(len(tokens), np.int64), np.zeros(1, np.int64))


@pytest.mark.parametrize("length", [0.0, 1.0, 5.0, 343.0])
def test_the_null_model_has_the_formulas_cosines_for_true_and_mismatched_pairs(length):
    generator = np.random.default_rng(0)
    source, target, expected = controls.sink_only(words_of(generator.integers(1, 5, 800).tolist()), 2048, length, seed=1)
    found = measure(source, target, np.zeros((0, 2), np.int64))
    # a mean of 400 cosines whose scatter is below 1/sqrt(width)
    assert found.value("cosine") == pytest.approx(expected.mean(), abs=4 / np.sqrt(2048 * 400))
    assert found.value("mismatched") == pytest.approx(found.value("cosine"), abs=4 / np.sqrt(2048 * 400))
    assert found.value("mrr") == pytest.approx(found.chance("mrr"), abs=0.02)
    assert ((source * target).sum(1) / source.norm(dim=1) / target.norm(dim=1)).numpy() == pytest.approx(expected, abs=0.15)


def test_the_pilots_number_is_a_sink_of_343():
    # orthogonal directions for real: token i is the i-th axis, the sink the last
    axes = torch.eye(9, dtype=torch.float64)
    words = torch.stack([axes[2 * i] + axes[2 * i + 1] + 343 * axes[8] for i in range(4)])
    by_hand = torch.corrcoef(torch.cat([words, -words], 1))[~torch.eye(4, dtype=bool)]
    source, target, expected = controls.sink_only(words_of([2] * 40), 64, 343.0, seed=0)
    assert expected == pytest.approx(np.full(20, by_hand.mean().item()), abs=1e-12)
    assert set(np.round(expected, 5)) == {0.99998}
    assert len(source) == len(target) == 20


def test_the_null_rows_numbers_are_the_same_for_true_and_mismatched_pairs(finished):
    row = rows_of(finished[1])["sink-only"]
    for split in ("trained", "held_out"):
        true, mismatched = (find_value(row, split, "before", None, metric)["value"] for metric in ("cosine", "mismatched"))
        assert true == pytest.approx(row["expected"][split], abs=1e-5)
        assert mismatched == pytest.approx(true, abs=2e-5)
    assert {record["when"] for record in row["measurements"]} == {"before"}
    assert row["tests"] == []


def test_a_random_model_has_other_weights_and_the_same_tokenizer(model, tmp_path):
    from safetensors.torch import load_file

    made = {name: tmp_path / name for name in ("a", "b", "c")}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        before = torch.random.get_rng_state()
        controls.save_random_model(open_checkpoint(str(model)), made[name], seed)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert {path.name for path in tmp_path.iterdir()} == set(made)
    given, a, b, c = (load_file(folder / "model.safetensors") for folder in (model, *made.values()))
    assert given.keys() == a.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    matrices = [name for name in a if a[name].ndim == 2]
    for name in matrices:
        assert a[name].shape == given[name].shape
        assert not torch.equal(a[name], c[name])
        # transformers' default initializer_range; the fixture's own weights are ten times as large
        assert float(a[name].float().std()) == pytest.approx(0.02, rel=0.1)
    mine, theirs = (open_checkpoint(str(folder)).tokenizer() for folder in (made["a"], model))
    assert mine.get_vocab() == theirs.get_vocab()
    assert mine("kitabu cha mwalimu")["input_ids"] == theirs("kitabu cha mwalimu")["input_ids"]
    assert mine.bos_token_id == theirs.bos_token_id


def test_the_random_row_was_trained_on_random_weights(finished, model):
    output, result = finished
    checkpoint, others = open_checkpoint(str(model)), set()
    for row in result["rows"][:-1]:
        report = json.loads((output / "cells" / row["cell"] / "report.json").read_text())
        if report["model"]["sha256"] != checkpoint.sha256(report["config"]["layer"]):
            others.add(row["cell"])
    assert others == {"random-weights"}
    assert rows_of(result)["random-weights"]["trained"] == {"model": RANDOM}


def test_adapters_above_the_layer_are_parameters_and_nothing_else(finished, model):
    row = rows_of(finished[1])["adapters-everywhere"]
    config = open_checkpoint(str(model)).config
    # q_proj: 64 -> 64, v_proj: 64 -> 32, rank 16
    per_block = 16 * (2 * config.hidden_size + config.hidden_size + config.num_key_value_heads * config.head_dim)
    assert row["parameters"] == 4 * per_block
    assert row["check"]["parameters_below"] == 2 * per_block == rows_of(finished[1])["paper"]["parameters"]
    assert (row["check"]["adapters_above"], row["check"]["learning_above"], row["check"]["equal_below"]) == (4, 0, True)
    assert "equal to the last bit" in row["sentence"]


def test_adapters_that_the_loss_can_reach_would_be_found_out(finished, model, splits, monkeypatch):
    options = json.loads((finished[0] / "cells" / "paper" / "report.json").read_text())["config"]
    # a loss that reads the state one block higher
    hooked = controls.run_hooked
    monkeypatch.setattr(controls, "run_hooked", lambda decoder, batch, layer: hooked(decoder, batch, layer + 1))
    check = controls.adapters_everywhere(options, open_checkpoint(str(model)), splits["trained"])
    assert (check["learning_above"], check["equal_below"]) == (2, False)


def test_the_report_names_no_folder_of_this_machine(finished, model):
    output, _ = finished
    for file in ("protocol.md", "protocol.json"):
        text = (output / file).read_text()
        assert str(model.parent) not in text
        assert str(output.parent) not in text
    text = (output / "protocol.md").read_text()
    assert all(f"**{switch.title}**" in text for switch in ABLATIONS)
    assert "0.3211 -> 0.4113" in text
    assert "another model" in text


@pytest.mark.parametrize(
    ("gain", "gap", "said"),
    [
        ((0.2, 0.19, 0.21), (0.0, -0.01, 0.01), "a shift of all words"),
        ((0.2, 0.19, 0.21), (0.15, 0.1, 0.2), "true pairs rose above mismatched ones"),
        ((-0.2, -0.3, -0.1), (0.1, 0.05, 0.2), "mismatched pairs fell further"),
        ((-0.2, -0.3, -0.1), (-0.1, -0.2, -0.05), "true pairs fell further"),
        ((0.01, -0.1, 0.1), (0.1, 0.05, 0.2), "no sure change"),
    ],
)
def test_the_sentence_says_what_the_numbers_do(finished, gain, gap, said):
    row = json.loads(json.dumps(finished[1]["rows"][0]))
    for test in row["tests"]:
        test["mean_gain"], test["low"], test["high"] = gain if test["metric"] == "cosine" else gap
    assert said in sentence(row, row)
    mrr = find_value(row, "held_out", "after", 2, "mrr")
    for low, high, side in ((0.9, 1.0, "above chance"), (0.0, 0.01, "below chance"), (0.0, 1.0, "at chance")):
        mrr["low"], mrr["high"] = low, high
        assert f"that of held-out pairs {side}" in sentence(row, row)


def test_the_verdict_counts_rows(finished):
    rows = json.loads(json.dumps(finished[1]["rows"]))
    measured = [row for row in rows if row["way"] in ("report", "measured")]
    for row in measured:
        for test in row["tests"]:
            gap = test["metric"] == "gap" and test["split"] == "held_out"
            test["p_t"], test["low"], test["high"] = (0.5, -0.1, 0.1) if gap or test["metric"] == "gap" else (0.001, 0.1, 0.2)
    assert f"p below .05 in {len(measured)} of {len(measured)} rows" in verdict({"rows": rows})
    assert "the held-out gap surely rose in none" in verdict({"rows": rows})
    for test in measured[3]["tests"]:
        if (test["metric"], test["split"]) == ("cosine", "trained"):
            test["p_t"] = 0.05
        if (test["metric"], test["split"]) == ("gap", "held_out"):
            test["low"] = 0.01
    assert f"p below .05 in {len(measured) - 1} of {len(measured)} rows" in verdict({"rows": rows})
    assert f"the held-out gap surely rose in 1: {measured[3]['title']}" in verdict({"rows": rows})
    find_value(measured[2], "trained", "after", measured[2]["layer"], "cosine")["value"] = 0.01
    assert f"from 0.010 ({measured[2]['title']})" in verdict({"rows": rows})


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_complete_protocol_is_not_run_again_and_gives_the_same(finished, model, word_list, tmp_path, monkeypatch):
    output = pathlib.Path(shutil.copytree(finished[0], tmp_path / "out"))
    # but for the cell of random weights, whose model lay in the other folder
    report = output / "cells" / "random-weights" / "report.json"
    report.write_text(report.read_text().replace(str(finished[0]), str(output)))
    before = contents(output / "cells")
    monkeypatch.setattr("tli.commands.grid._start", None)
    again = protocol(settings(model, word_list, output))
    assert contents(output / "cells") == before
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(finished[1]))


def of_another_version(output: pathlib.Path) -> None:
    told = json.loads((output / "settings.json").read_text())
    told["versions"]["tli"] = "0.0.9"
    (output / "settings.json").write_text(json.dumps(told))


BAD = {
    "other epochs": ({"epochs": 3}, None, "config epochs: a protocol must go on as it was begun, with 2, got 3; "),
    "other seed": ({"seed": 1}, None, "config seed: a protocol must go on as it was begun, with 0, got 1; "),
    "other list": ({"pairs": None}, None, "pairs name: a protocol must go on as it was begun, with sixty.tsv, got swahili-english.tsv; "),
    "another version": ({}, of_another_version, "versions tli: a protocol must go on as it was begun, with 0.0.9, got "),
    "damaged": ({}, lambda output: (output / "settings.json").write_text("{"), "the file must be a protocol's settings, got "),
    "no protocol": (
        {},
        lambda output: (output / "settings.json").unlink(),
        "--output: the folder must be new, empty or a protocol's, got ",
    ),
    "no pairs": ({"pairs": "absent.tsv"}, None, "absent.tsv"),
    "no model": ({"model": "./absent"}, None, "--model: the model must be a folder or a hub name"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_overwritten(finished, model, word_list, tmp_path, kind):
    more, spoil, message = BAD[kind]
    output = pathlib.Path(shutil.copytree(finished[0], tmp_path / "out"))
    if spoil is not None:
        spoil(output)
    before = contents(output)
    config = dataclasses.replace(settings(model, word_list, output), **more)
    with pytest.raises(TliError) as raised:
        protocol(config)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert contents(output) == before


def test_a_model_that_is_too_small_is_refused_before_anything_is_written(make_model, word_list, tmp_path):
    shallow = make_model("llama", blocks=2, hidden_size=64, intermediate_size=128)
    with pytest.raises(TliError, match="--model: the model must have at least 3 blocks, as hidden states 1 to 3 are compared, got 2; "):
        protocol(settings(shallow, word_list, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("jobs", 0), ("seed", -1)])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(TliError, match=rf"--{name}: the number must be at least {value + 1}( and at most \d+)?, got {value}; raise it"):
        ProtocolConfig(**{name: value})


def test_overwriting_begins_anew(finished, model, word_list, tmp_path, monkeypatch):
    output = pathlib.Path(shutil.copytree(finished[0], tmp_path / "out"))
    (output / "mine.txt").write_text("precious")

    def nothing(cells, folder, jobs, done):
        assert not folder.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol_module, "run_cells", nothing)
    with pytest.raises(KeyboardInterrupt):
        protocol(settings(model, word_list, output, epochs=3, overwrite=True))
    assert {path.name for path in output.iterdir()} == {"settings.json", ".protocol.lock", "mine.txt", "random-weights"}
    assert json.loads((output / "settings.json").read_text())["config"]["epochs"] == 3


def foreign(output: pathlib.Path, *names: str) -> None:
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("precious")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["cells/data.csv"], "--output: a folder that is overwritten must be new, empty or a protocol's"),
        (["random-weights/w.bin"], "--output: a folder that is overwritten must be new, empty or a protocol's"),
        (["settings.json", "cells/data.csv"], "--output: a folder that is overwritten must be new, empty or a protocol's"),
    ],
    ids=["cells", "weights", "settings"],
)
def test_overwriting_a_foreign_folder_is_refused(model, word_list, tmp_path, names, said):
    foreign(tmp_path / "out", *names)
    with pytest.raises(TliError, match=said):
        protocol(settings(model, word_list, tmp_path / "out", overwrite=True))
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()} == set(names)


@pytest.mark.parametrize("name", ["cells/paper/notes.txt", "random-weights/w.bin"])
def test_overwriting_deletes_nothing_that_no_protocol_wrote(finished, model, word_list, tmp_path, name):
    output = pathlib.Path(shutil.copytree(finished[0], tmp_path / "out"))
    foreign(output, name)
    with pytest.raises(TliError, match=f"what is deleted must have been written by tli, got {pathlib.Path(name).name}; move it elsewhere"):
        protocol(settings(model, word_list, output, epochs=3, overwrite=True))
    assert (output / name).read_text() == "precious"
    assert {path.name for path in (output / "cells").iterdir()} == {path.name for path in (finished[0] / "cells").iterdir()}
    # nor anything through a link
    (output / name).unlink()
    shutil.rmtree(output / "random-weights", ignore_errors=True)
    shutil.rmtree(output / "cells" / "paper")
    shutil.copytree(finished[0] / "cells" / "paper", tmp_path / "elsewhere")
    (output / "cells" / "paper").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TliError, match="what is deleted must have been written by tli, got paper"):
        protocol(settings(model, word_list, output, epochs=3, overwrite=True))
    assert (tmp_path / "elsewhere" / "report.json").is_file()


def test_a_killed_protocol_goes_on_where_it_was(finished, model, word_list, tmp_path, monkeypatch):
    kept = tuple(switch for switch in ABLATIONS if switch.name in ("paper", "bos-measured", "shuffled"))
    config = settings(model, word_list, tmp_path / "out")
    code = (
        "import tli.commands.protocol as p; from tli.config import ProtocolConfig; "
        f"p.ABLATIONS = tuple(s for s in p.ABLATIONS if s.name in {[switch.name for switch in kept]}); p.protocol({config!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)
    first, deadline = tmp_path / "out" / "cells" / "paper", time.monotonic() + 120
    while not (first / "report.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no cell within two minutes"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "protocol.json").exists()
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in first.iterdir()}
    monkeypatch.setattr(protocol_module, "ABLATIONS", kept)
    result = protocol(config)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in first.iterdir()} == before
    assert {path.name for path in first.parent.iterdir()} == {"paper", "shuffled"}
    whole = rows_of(finished[1])
    for row in result["rows"]:
        for mine in row["measurements"]:
            other = find_value(whole[row["name"]], mine["split"], mine["when"], mine["layer"], mine["metric"])
            assert mine["value"] == pytest.approx(other["value"], abs=1e-3)
