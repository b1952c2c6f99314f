"""A model by its hub name: a real process against a hub on loopback that counts what it serves."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.support.fake_hub import COMMIT, serving

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent.parent
NAME = "someone/model"


def train(hub, cache: pathlib.Path, word_list: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache / "hf")}
    environment |= {"TLI_CACHE": str(cache / "tli"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    options = ["--model", NAME, "--pairs", str(word_list), "--rank=2", "--batch=27", "--epochs=1", "--no-report", "--json"]
    command = [sys.executable, "-m", "tli.train", *options, f"--output={cache / 'out'}", "--overwrite", *flags]
    return subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=240)


def test_only_what_is_needed_is_downloaded(make_model, word_list, tmp_path):
    folder = make_model("llama", shards=True, tied=False)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    parts = ("model.embed_tokens.", "model.layers.0.")
    needed = {file for name, file in index.items() if name.startswith(parts)}
    norm = index["model.norm.weight"]
    assert norm not in needed
    assert set(index.values()) - needed - {norm}
    with serving(NAME, folder) as hub:
        done = train(hub, tmp_path, word_list, "--layer=1")
        assert done.returncode == 0, done.stderr
        shards = {file: count for file, count in hub.sent.items() if file and file.endswith(".safetensors")}
        assert {file: count for file, count in shards.items() if file != norm} == {file: (folder / file).stat().st_size for file in needed}
        # of the last shard its header and the one tensor, not the other weights
        header = int.from_bytes((folder / norm).read_bytes()[:8], "little")
        assert shards[norm] == 8 + header + 48 * 4
        assert json.loads(done.stdout)["config"]["token_norm"] == "final"
        # the second time nothing is left to fetch
        hub.sent.clear()
        again = train(hub, tmp_path, word_list, "--layer=1")
        assert again.returncode == 0, again.stderr
        assert [file for file in hub.sent if file and file.endswith(".safetensors")] == []
        assert json.loads(again.stdout)["adapter"]["sha256"] == json.loads(done.stdout)["adapter"]["sha256"]
    assert COMMIT in str(list((tmp_path / "tli" / "tensors").rglob("*.safetensors")))


def test_the_hubs_norm_is_the_folders(make_model, word_list, tmp_path):
    folder = make_model("gemma3_text", shards=True)
    with serving(NAME, folder) as hub:
        by_name = train(hub, tmp_path, word_list)
        assert by_name.returncode == 0, by_name.stderr
    local = train(hub, tmp_path, word_list, f"--model={folder}")
    assert local.returncode == 0, local.stderr
    hashes = [json.loads(done.stdout)["adapter"]["sha256"] for done in (by_name, local)]
    assert hashes[0] == hashes[1]


def test_a_norm_out_of_reach_is_one_line(make_model, word_list, tmp_path):
    folder = make_model("llama", shards=True, tied=False)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with serving(NAME, folder) as hub:
        first = train(hub, tmp_path, word_list, "--layer=1", "--token-norm=rms")
        assert first.returncode == 0, first.stderr
        assert index["model.norm.weight"] not in hub.sent
    # the hub is gone: what was downloaded serves as before, and the norm was not
    again = train(hub, tmp_path, word_list, "--layer=1", "--token-norm=rms")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["adapter"] == json.loads(first.stdout)["adapter"]
    done = train(hub, tmp_path, word_list, "--layer=1")
    assert done.returncode == 2
    assert "the final norm must be in reach" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
