"""``tli.map`` on a small model: the map on disk is the one that was judged, and words go through it as the report says."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tli.commands.embed import embed
from tli.commands.map import fit_map
from tli.config import MapConfig
from tli.data import word_pairs
from tli.metrics.baselines import Choice
from tli.metrics.candidates import cosine_scores, rank
from tli.metrics.layer_choice import choose_layer_by_maps
from tli.model.linear_map import MAP_FILE, REPORT_FILE, load_map
from tli.runtime.errors import TliError


@pytest.fixture(scope="module")
def settings(make_model, word_list, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("map") / "out"
    return {"model": str(make_model("llama")), "pairs": str(word_list), "held_out": 0.2, "output": str(output)}


@pytest.fixture(scope="module")
def fitted(settings) -> dict:
    return fit_map(MapConfig(**settings))


def test_every_layer_is_tried_and_the_best_is_kept(settings, fitted):
    folder = pathlib.Path(settings["output"])
    assert {path.name for path in folder.iterdir()} == {MAP_FILE, REPORT_FILE}
    report = json.loads((folder / REPORT_FILE).read_text())
    assert {key: report[key] for key in fitted} == json.loads(json.dumps(fitted))
    assert [one["layer"] for one in report["by_layer"]] == [1, 2, 3, 4, "output"]
    best = max(report["by_layer"], key=lambda one: one["mrr"])
    assert report["map"]["layer"] == next(one["layer"] for one in report["by_layer"] if one["mrr"] >= best["mrr"] - best["error"])
    assert best["error"] > 0
    assert (report["pairs"]["trained"], report["pairs"]["held_out"], report["pairs"]["with_relative"]) == (48, 12, 0)
    assert report["verdict"].startswith("Chosen by a part of the trained pairs: ")
    assert "held-out pairs it finds an MRR of" in report["verdict"]


def test_held_out_words_through_the_map_on_disk_are_what_the_report_judged(settings, fitted):
    pairs = word_pairs.read_pairs(settings["pairs"], "swahili", "english")
    held_out = list(word_pairs.split_pairs(pairs, 0.2, 0)[1])
    sides = [
        embed([getattr(pair, side) for pair in held_out], map=settings["output"], language=language).double().numpy()
        for side, language in (("source", "swahili"), ("target", "english"))
    ]
    np.testing.assert_allclose(np.linalg.norm(sides[0], axis=1), 1, atol=1e-6)
    assert sides[0].shape == (12, fitted["map"]["dimensions"])
    found = rank(cosine_scores(*sides), np.arange(12), word_pairs.false_negative_pairs(held_out), None)["split"]
    mrr = (found.forward.reciprocal_rank.mean() + found.backward.reciprocal_rank.mean()) / 2
    way = fitted["map"]["way"]
    told = next(
        r for r in fitted["baselines"]["records"]
        if (r["way"], r["stream"], r["candidates"], r["group"], r["metric"]) == (way, "before", "split", "all pairs", "mrr")
    )  # fmt: skip
    assert told["value"] == pytest.approx(mrr, abs=1e-6)


def test_the_first_layer_within_a_standard_error_is_chosen():
    choices = {layer: Choice("cca", 0.3, mrr, 0.01, None) for layer, mrr in ((1, 0.05), (2, 0.058), (3, 0.06), ("output", 0.065))}
    assert choose_layer_by_maps(choices) == 2
    assert choose_layer_by_maps({"output": choices["output"]}) == "output"
    choices[1] = Choice("cca", 0.3, 0.2, 0.01, None)
    assert choose_layer_by_maps(choices) == 1


@pytest.mark.parametrize("layer", [2, "output"])
def test_a_layer_that_is_named_is_the_only_one(settings, tmp_path, layer):
    found = fit_map(MapConfig(**{**settings, "layer": layer, "output": str(tmp_path / "out")}))
    assert [one["layer"] for one in found["by_layer"]] == [layer] == [found["map"]["layer"]]
    assert embed(["maji"], map=tmp_path / "out", language="english").shape == (1, found["map"]["dimensions"])


@pytest.mark.parametrize("layer", [0, 5])
def test_a_layer_that_is_not_there_is_refused(settings, tmp_path, layer):
    with pytest.raises(TliError, match=f"--layer: the layer must be from 1 to 4.*got {layer}"):
        fit_map(MapConfig(**{**settings, "layer": layer, "output": str(tmp_path / "out")}))
    assert not (tmp_path / "out").exists()


def test_words_for_a_map_need_their_language_and_its_model(settings, fitted, make_model):
    with pytest.raises(TliError, match="must be swahili or english, got None"):
        embed(["maji"], map=settings["output"])
    with pytest.raises(TliError, match="a map decides layer and model"):
        embed(["maji"], map=settings["output"], language="swahili", layer=2)
    with pytest.raises(TliError, match="the model must be the one that the map was fitted on"):
        embed(["maji"], map=settings["output"], language="swahili", model=str(make_model("llama", seed=1)))


def test_files_that_do_not_belong_together_are_refused(fitted, settings, tmp_path):
    with pytest.raises(TliError, match="must hold map.safetensors and map.json"):
        load_map(tmp_path)
    for name in (MAP_FILE, REPORT_FILE):
        (tmp_path / name).write_bytes((pathlib.Path(settings["output"]) / name).read_bytes())
    assert load_map(tmp_path).report["map"] == json.loads(json.dumps(fitted["map"]))
    (tmp_path / REPORT_FILE).write_text(json.dumps({**fitted, "sha256": "other"}))
    with pytest.raises(TliError, match="map.json must speak of the map.safetensors beside it"):
        load_map(tmp_path)
    with pytest.raises(TliError, match="new or empty"):
        fit_map(MapConfig(**settings))


def test_no_epochs_are_a_map(settings, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**settings, "layer": 1}.items() if name != "output"]
    for module, more in (("map", []), ("train", ["--epochs=0"])):
        done = subprocess.run(
            [sys.executable, "-m", f"tli.{module}", *flags, *more, f"--output={tmp_path / module}"],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "train" / MAP_FILE).read_bytes() == (tmp_path / "map" / MAP_FILE).read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "tli.train", "--epochs=0", "--shuffle-pairs"], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "--shuffle-pairs: a map, which is what --epochs 0 fits, must go without this option" in " ".join(done.stderr.split())


def test_the_command_prints_what_it_returns(settings, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**settings, "output": tmp_path / "out", "layer": 1}.items()]
    done = subprocess.run([sys.executable, "-m", "tli", "map", *flags, "--json"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["map"]["layer"] == 1
    printed = " ".join(done.stderr.split())
    assert printed.endswith("map.json, map.safetensors")
    assert "what finds the held-out pairs (n=12; split by families, 0 of 12 with a trained relative), without training" in printed
