"""Checkpoints of real models' shapes: the right tensors in the right files, and Llama 3's real tokens."""

import base64
import json
import pathlib

import numpy as np
import pytest
import torch
from safetensors import safe_open

from bench import synthetic
from tli.config import MODELS
from tli.data import word_pairs
from tli.data.batch import to_batch
from tli.data.packing import tokenise
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder, run
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """One block of the smallest shape, in files of at most 60 MB but for the embedding's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_SHARD_BYTES", 60_000_000)
        path = tmp_path_factory.mktemp("synthetic") / "model"
        return synthetic.write(synthetic.SyntheticConfig(folder=str(path), like="smollm2-135m", blocks=1))


def test_it_holds_the_shards_of_the_first_blocks_and_no_other(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith(("model.embed_tokens.", "model.layers.0."))}
    assert {path.name for path in folder.glob("*.safetensors")} == needed
    assert len(set(index.values())) > len(needed)
    # tied embeddings are stored once
    assert "lm_head.weight" not in index
    for file in needed:
        with safe_open(folder / file, "pt") as shard:
            assert set(shard.keys()) == {name for name, of in index.items() if of == file}


def test_what_is_needed_is_noise_and_the_rest_a_hole(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.mlp.down_proj.weight"
    with safe_open(folder / index[name], "pt") as shard:
        weight = shard.get_tensor(name)
        later = [key for key in shard.keys() if key.startswith("model.layers.") and not key.startswith("model.layers.0.")]  # noqa: SIM118
        holes = [shard.get_tensor(key) for key in later]
    assert weight.dtype == torch.bfloat16
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.01)
    assert holes
    assert not any(hole.any() for hole in holes)
    size = (folder / index[name]).stat()
    assert size.st_blocks * 512 < 0.7 * size.st_size


def test_the_early_arm_runs_on_it(folder):
    checkpoint = open_checkpoint(str(folder))
    words = tokenise(checkpoint.tokenizer(), ["mtoto", "child", "nyumba", "house"], 64, " ")
    device_config = resolve_device("cpu", "float32")
    decoder = load_truncated_decoder(checkpoint, 1, words.vocab_ids, device_config)
    states = run(decoder, to_batch(words.pack(np.arange(4)), torch.float32, torch.device("cpu")))
    assert states.shape[1] == 576
    assert states.isfinite().all()


def test_the_tokens_are_llama_3s(folder):
    """By what byte-pair encoding is: join the pair of parts whose whole has the lowest rank, until none has one."""
    lines = synthetic._tokenizer_file().read_text(encoding="ascii").splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}

    def encode(piece: bytes) -> list[int]:
        if piece in ranks:
            return [ranks[piece]]
        parts = [bytes([byte]) for byte in piece]
        while True:
            joined = [(ranks[a + b], at) for at, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
            if not joined:
                return [ranks[part] for part in parts]
            _, at = min(joined)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    tokenizer = open_checkpoint(str(folder)).tokenizer()
    assert tokenizer.bos_token_id == 128_000
    words = {word for pair in word_pairs.read_pairs(None, "swahili", "english") for word in (pair.source, pair.target) if word.isalpha()}
    assert len(words) > 2000
    for word in sorted(words):
        assert tokenizer.encode(f" {word}", add_special_tokens=False) == encode(f" {word}".encode())


@pytest.mark.parametrize("like", MODELS)
def test_every_shape_is_its_models(like):
    plain = synthetic.model_config(like)
    shapes = synthetic.tensor_shapes(plain)
    from tli_kernels.shapes import MODELS as SHAPES

    for projection, size in SHAPES[like].projections().items():
        part = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        assert shapes[f"model.layers.0.{part}.{projection}.weight"] == size
    # billions of parameters as published; the starter's with Llama 3's vocabulary in place of its own, Gemma's of the text part
    known = {"smollm2-135m": 0.1803, "llama-3.2-1b": 1.24, "llama-3-8b": 8.03, "qwen3-4b": 4.02, "gemma-3-4b": 3.88}
    assert sum(map(np.prod, shapes.values())) / 1e9 == pytest.approx(known[like], rel=0.01)


def test_bad_input_is_said(folder, tmp_path):
    with pytest.raises(TliError, match="--output: the output folder must be new or empty"):
        synthetic.write(synthetic.SyntheticConfig(folder=str(folder), like="smollm2-135m"))
    with pytest.raises(TliError, match="--blocks: the number must be from 0 to 30"):
        synthetic.write(synthetic.SyntheticConfig(folder=str(tmp_path / "new"), like="smollm2-135m", blocks=31))
    assert not (tmp_path / "new").exists()


def test_the_final_norm_is_no_hole_where_its_shard_is_written(tmp_path):
    # one file holds all of so small a model
    folder = synthetic.write(synthetic.SyntheticConfig(folder=str(tmp_path / "model"), like="smollm2-135m", blocks=1))
    norm, _ = open_checkpoint(str(folder)).final_norm()
    assert norm.tolist() == [1.0] * 576
