"""Checkpoints as people really have them: the whole model's states, or one line that says what is the matter and what to do."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.small_adapters import save_adapter
from tests.support.words import tokens_of
from tli.commands.embed import embed
from tli.commands.evaluate import evaluate
from tli.commands.export import export
from tli.commands.map import fit_map
from tli.commands.memory import memory
from tli.commands.scan import scan
from tli.commands.train import train
from tli.config import EvaluateConfig, ExportConfig, MapConfig, MemoryConfig, ScanConfig, TrainConfig
from tli.data.batch import to_batch
from tli.data.packing import tokenise
from tli.model.checkpoint import context_length, open_checkpoint
from tli.model.decoder import load_full_decoder, load_truncated_decoder, run
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError

CPU = resolve_device("cpu", "float32")
WORDS = ["kitabu", "kitanda", "mtoto", "book", "bookshop", "child"]
ROOT = pathlib.Path(__file__).parent.parent.parent
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "vocab_size": 400,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture
def copy(make_model, tmp_path):
    """A copy of a small model to change: its folder, and its tensors."""

    def make(family: str = "llama", **settings) -> tuple[pathlib.Path, dict[str, torch.Tensor]]:
        folder = tmp_path / "model"
        shutil.copytree(make_model(family, **settings), folder)
        return folder, load_file(folder / "model.safetensors")

    return make


def write(folder, tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_whole_models_states(folder, whole=None, layers=(1, 2)) -> None:
    """States packed into a trie are those of transformers' whole model."""
    whole = (whole or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)).eval()
    checkpoint = open_checkpoint(str(folder))
    words = tokenise(checkpoint.tokenizer(), WORDS, context_length(checkpoint))
    batch = to_batch(words.pack(np.arange(len(WORDS))), torch.float32, CPU.device)
    ids = torch.from_numpy(words.vocab_ids[tokens_of(words)])
    for layer in layers:
        states = run(load_truncated_decoder(checkpoint, layer, words.vocab_ids, CPU), batch)
        for word, length in enumerate(words.lengths):
            with torch.no_grad():
                expected = whole(input_ids=ids[word : word + 1, :length], output_hidden_states=True).hidden_states[layer][0]
            nodes = batch.indices[batch.indptr[word] : batch.indptr[word + 1]]
            assert (states[nodes] - expected[1:]).abs().max() <= 1e-5 * expected.abs().max()


def quantise_rows(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight's codes and one scale a row, as many tools store them."""
    scale = weight.abs().amax(dim=1, keepdim=True) / (127 if dtype == torch.int8 else 448)
    return (weight / scale).round().to(dtype) if dtype == torch.int8 else (weight / scale).to(dtype), scale


# the names under which tools keep scales and zero points beside a weight in a byte
BESIDE = ["weight_scale", "weight_scale_inv", "weight_scale_2", "SCB", "scale", "scales", "weight_zero_point", "input_scale", "biases"]


@pytest.mark.parametrize("leaf", BESIDE)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
def test_scales_beside_a_weight_are_no_plain_weight(copy, leaf, dtype):
    folder, tensors = copy()
    change_config(folder, _name_or_path="someone/original")
    name = "model.layers.1.mlp.down_proj"
    tensors[f"{name}.weight"], tensors[f"{name}.{leaf}"] = quantise_rows(tensors[f"{name}.weight"], dtype)
    write(folder, tensors)
    told = rf"must be unquantised or bitsandbytes' NF4, got tensors as {name}.{leaf}; use .* config.json names someone/original$"
    with pytest.raises(TliError, match=told):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("first", [True, False], ids=["all", "not block 0"])
def test_packed_weights_without_a_config_are_refused(copy, first):
    folder, tensors = copy()
    for name in [name for name in tensors if ".layers." in name and name.endswith("_proj.weight") and (first or ".layers.0." not in name)]:
        del tensors[name]
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[name.replace("weight", leaf)] = torch.zeros(4, 4, dtype=torch.int32)
    write(folder, tensors)
    with pytest.raises(TliError, match=r"must be unquantised or bitsandbytes' NF4, got tensors as model.layers.*\.(g_idx|q\w+|scales); "):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("name", ["layers.0.self_attn.k_proj", "layers.1.input_layernorm", "embed_tokens"])
def test_a_weight_that_is_stored_as_codes_is_refused(copy, tmp_path, dtype, name):
    folder, tensors = copy()
    save_adapter(folder, tmp_path / "adapter")
    tensors[f"model.{name}.weight"] = tensors[f"model.{name}.weight"].to(dtype)
    write(folder, tensors)
    told = rf"model.safetensors: the weights must be unquantised .*, got model.{name}.weight in {str(dtype)[6:]}; "
    with pytest.raises(TliError, match=told):
        load_truncated_decoder(open_checkpoint(str(folder)), 2, np.arange(4), CPU)
    # what is copied whole is looked at, too, whichever layer the adapter is of
    with pytest.raises(TliError, match=told):
        export(ExportConfig(adapter=str(tmp_path / "adapter"), model=str(folder), output=str(tmp_path / "merged")))


STORED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "model_name_or_path": "someone/original"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "compressed": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
}


def composite(tmp_path, tokenizer, kind: str = "gemma3", **sizes) -> tuple[pathlib.Path, torch.nn.Module]:
    """A small model of text and images or of text and sound, and its folder."""
    import transformers

    audio = {"num_mel_bins": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "hidden_size": 32}
    classes = {
        "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration"),
        "voxtral": ("VoxtralConfig", "VoxtralForConditionalGeneration"),
        "qwen2_audio": ("Qwen2AudioConfig", "Qwen2AudioForConditionalGeneration"),
        "llava": ("LlavaConfig", "LlavaForConditionalGeneration"),
    }
    text = {"gemma3": "gemma3_text", "voxtral": "llama", "qwen2_audio": "qwen2", "llava": "mistral"}[kind]
    towers = {
        "gemma3": {"vision_config": {**audio, "image_size": 28, "patch_size": 14}},
        "voxtral": {"audio_config": {**audio, "max_source_positions": 20}, "audio_token_id": 399},
        "qwen2_audio": {
            "audio_config": {
                "num_mel_bins": 16,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
                "d_model": 32,
                "max_source_positions": 20,
            },
            "audio_token_index": 399,
        },
        "llava": {
            "vision_config": {**audio, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
            "image_token_index": 399,
        },
    }[kind]
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    settings = {**TEXT, **ids, **sizes}
    config = getattr(transformers, classes[kind][0])(text_config=AutoConfig.for_model(text, **settings).to_dict(), **towers)
    torch.manual_seed(0)
    model = getattr(transformers, classes[kind][1])._from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path / kind
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("kind", ["gemma3", "llava", "voxtral", "qwen2_audio"])
def test_the_text_decoder_is_found_among_towers(tmp_path, tokenizer, kind):
    folder, model = composite(tmp_path, tokenizer, kind)
    assert "tower" not in open_checkpoint(str(folder)).prefix
    assert_whole_models_states(folder, model)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("part", ["outer", "text"])
def test_a_config_of_quantised_weights_is_found_in_whichever_part(tmp_path, tokenizer, key, stored, part):
    folder, _ = composite(tmp_path, tokenizer)
    content = json.loads((folder / "config.json").read_text())
    (content if part == "outer" else content["text_config"])[key] = STORED[stored]
    (folder / "config.json").write_text(json.dumps(content))
    original = ": config.json names someone/original" if stored == "gptq" else ""
    told = rf"the weights must be unquantised or bitsandbytes' NF4, got {key} .*; use the model's original checkpoint{original}$"
    with pytest.raises(TliError, match=told):
        open_checkpoint(str(folder))
    with pytest.raises(TliError, match=told):
        memory(MemoryConfig(model=str(folder)))


def test_every_command_refuses_quantised_weights_alike(copy, word_list, tmp_path):
    folder, tensors = copy()
    adapter = str(save_adapter(folder, tmp_path / "adapter"))
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = quantise_rows(tensors[f"{name}.weight"], torch.int8)
    write(folder, tensors)
    model, pairs, output = str(folder), str(word_list), str(tmp_path / "out")
    commands = [
        lambda: train(TrainConfig(model=model, pairs=pairs, output=output)),
        lambda: scan(ScanConfig(model=model, pairs=pairs)),
        lambda: fit_map(MapConfig(model=model, pairs=pairs, output=output)),
        lambda: evaluate(EvaluateConfig(adapters=(adapter,), model=model, pairs=pairs)),
        lambda: embed(["maji"], model=model),
        lambda: export(ExportConfig(adapter=adapter, model=model, output=output)),
    ]
    said = set()
    for command in commands:
        with pytest.raises(TliError, match=f"must be unquantised or bitsandbytes' NF4, got tensors as {name}.weight_scale; ") as error:
            command()
        said.add(str(error.value))
    assert len(said) == 1


def test_nf4_is_understood_whichever_part_of_the_config_says_so(copy, tmp_path):
    from transformers import BitsAndBytesConfig

    folder, _ = copy(hidden_size=64, intermediate_size=128)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32, trust_remote_code=False)
    quantised.save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "nf4")
    before = run_states(tmp_path / "nf4")
    content = json.loads((tmp_path / "nf4" / "config.json").read_text())
    del content["quantization_config"]
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(content))
    assert torch.equal(run_states(tmp_path / "nf4"), before)


def test_nf4_of_a_model_of_text_and_images_is_read_as_it_is(tmp_path, tokenizer):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig, Gemma3ForConditionalGeneration

    folder, _ = composite(tmp_path, tokenizer, hidden_size=64, intermediate_size=128)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    whole = Gemma3ForConditionalGeneration.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "nf4")
    decoder = load_truncated_decoder(open_checkpoint(str(tmp_path / "nf4")), 2, np.arange(4), CPU)
    for index in (0, 1):
        block = whole.model.language_model.layers[index]
        for path in ("self_attn.q_proj", "mlp.down_proj"):
            stored = block.get_submodule(path).weight
            expected = dequantize_4bit(stored.data, stored.quant_state)
            torch.testing.assert_close(decoder.layers[index].get_submodule(path).weight, expected, rtol=1e-6, atol=0)
        assert torch.equal(decoder.layers[index].input_layernorm.weight, block.input_layernorm.weight)


def run_states(folder) -> torch.Tensor:
    checkpoint = open_checkpoint(str(folder))
    words = tokenise(checkpoint.tokenizer(), WORDS, context_length(checkpoint))
    batch = to_batch(words.pack(np.arange(len(WORDS))), torch.float32, CPU.device)
    return run(load_truncated_decoder(checkpoint, 2, words.vocab_ids, CPU), batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_plain_dtype_is_read(copy, dtype):
    folder, tensors = copy()
    write(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    change_config(folder, dtype=str(dtype)[6:])
    assert_whole_models_states(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("all_rows", [False, True], ids=["rows that occur", "all rows"])
@pytest.mark.parametrize("token", ["a word", "the sink", "another tokenizer"])
def test_a_token_without_an_embedding_row_is_named(copy, word_list, tmp_path, token, all_rows):
    folder, tensors = copy()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    told = rf"got token '\S+' with the id {rows}"
    if token == "a word":
        tokenizer.add_tokens([word_list.read_text(encoding="utf-8").splitlines()[1].split("\t")[0]])
    elif token == "the sink":
        tokenizer.add_special_tokens({"bos_token": "<|start|>"})
        told = rf"got token '<\|start\|>' with the id {rows}"
    else:
        rows = 200
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:rows].clone()
        write(folder, tensors)
        change_config(folder, vocab_size=rows)
        told = r"got token '\S+' with the id \d+"
    tokenizer.save_pretrained(folder)
    for command in (
        lambda: train(TrainConfig(model=str(folder), pairs=str(word_list), output=str(tmp_path / "out"), all_rows=all_rows)),
        lambda: scan(ScanConfig(model=str(folder), pairs=str(word_list))),
    ):
        with pytest.raises(TliError, match=rf"every token must have one of the embedding's {rows} rows, {told}; "):
            command()


def test_tokens_without_a_row_that_no_word_uses_do_no_harm(copy):
    folder, _ = copy()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert_whole_models_states(folder)


def test_a_sentencepiece_file_names_what_reads_it(copy):
    folder, _ = copy()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no file of sentencepiece")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(TliError, match="must be readable, got tokenizer.model alone; pip install sentencepiece protobuf"):
        open_checkpoint(str(folder)).tokenizer()


def test_a_tokenizer_in_python_alone_is_refused(copy):
    from transformers import ByT5Tokenizer

    folder, _ = copy()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(folder)
    with pytest.raises(TliError, match=r"must be a fast one \(tokenizer.json\), got ByT5Tokenizer, in Python alone; "):
        open_checkpoint(str(folder)).tokenizer()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("first", "window"), [(0, 24), (1, 24), (4, 64)])
def test_qwens_sliding_window_is_transformers_own(make_model, family, first, window):
    folder = make_model(family, use_sliding_window=True, sliding_window=24, max_window_layers=first)
    assert context_length(open_checkpoint(str(folder))) == window
    assert_whole_models_states(folder, layers=(1, 2, 3))
    words = tokenise(open_checkpoint(str(folder)).tokenizer(), WORDS, window)
    batch = to_batch(words.pack(np.arange(len(WORDS))), torch.float32, CPU.device)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states = run(load_full_decoder(open_checkpoint(str(folder)), words.vocab_ids, CPU), batch)
    ids = torch.from_numpy(words.ids[words.indptr[3] : words.indptr[4]].astype(np.int64))[None]
    with torch.no_grad():
        expected = whole.model(ids).last_hidden_state[0, 1:]
    torch.testing.assert_close(states[batch.indices[batch.indptr[3] : batch.indptr[4]]], expected, rtol=1e-4, atol=1e-4)


def test_a_window_of_the_config_that_is_not_used_is_none(make_model):
    folder = make_model("qwen2", use_sliding_window=False, sliding_window=8)
    assert context_length(open_checkpoint(str(folder))) == 64
    assert_whole_models_states(folder)


@pytest.mark.parametrize("file", ["model.fp16.safetensors", "model-00001-of-00001.safetensors"])
def test_a_lone_variant_is_read_under_its_own_name(copy, tmp_path, file):
    folder, _ = copy()
    expected = run_states(folder)
    (folder / "model.safetensors").rename(folder / file)
    assert torch.equal(run_states(folder), expected)


def test_shards_that_no_index_lists_are_read(make_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama", shards=True), folder)
    expected = run_states(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert len(list(folder.glob("model-*"))) > 1
    assert torch.equal(run_states(folder), expected)
    adapter = save_adapter(folder, tmp_path / "adapter")
    export(ExportConfig(adapter=str(adapter), output=str(tmp_path / "merged"), dtype="float32"))
    assert run_states(tmp_path / "merged").shape == expected.shape


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], r"got none; download the missing file"),
        (["consolidated.safetensors"], r"got consolidated.safetensors; use the model in Hugging Face's format"),
        (["consolidated.00.pth"], r"got consolidated.00.pth; use the model in Hugging Face's format"),
        (["model-q4_0.gguf"], r"got model-q4_0.gguf; use the model in Hugging Face's format"),
        (["model.fp16.safetensors", "model.fp32.safetensors"], r"got model.fp16.safetensors, model.fp32.safetensors; rename one of them"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_other_weights_than_expected_are_named(copy, files, told):
    folder, _ = copy()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for file in files:
        (folder / file).write_bytes(weights)
    with pytest.raises(TliError, match=rf"the folder must hold model.safetensors, {told}"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
def test_pickled_weights_are_read_once_the_command_that_is_named_has_run(copy, shards):
    folder, tensors = copy()
    expected = run_states(folder)
    (folder / "model.safetensors").unlink()
    if shards:
        names = sorted(tensors)
        parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, held in parts.items():
            torch.save({name: tensors[name] for name in held}, folder / file)  # noqa: TID251
        index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")  # noqa: TID251
    with pytest.raises(
        TliError, match=r"must hold model.safetensors, got pytorch_model\S*.bin.*; convert it: python -c 'from transfo"
    ) as error:
        open_checkpoint(str(folder))
    command = shlex.split(str(error.value).partition("convert it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    assert torch.equal(run_states(folder), expected)


def test_extra_files_and_buffers_do_no_harm(copy):
    folder, tensors = copy()
    expected = run_states(folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write(folder, tensors)
    for file in ("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "training_args.bin"):
        (folder / file).write_bytes(b"anything")
    assert torch.equal(run_states(folder), expected)


@pytest.mark.parametrize("old", [False, True], ids=["base_layer", "before base_layer"])
def test_an_unmerged_adapter_is_no_model(copy, old):
    folder, tensors = copy()
    around = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    if not old:
        around[f"{name}.base_layer.weight"] = around.pop(f"{name}.weight")
    around[f"{name}.lora_A.default.weight"] = torch.zeros(2, 48)
    write(folder, around)
    with pytest.raises(
        TliError, match=rf"must be a model without an adapter around it, got {name}\.\S+; merge it \(model.merge_and_unload"
    ):
        open_checkpoint(str(folder))


def test_an_adapters_folder_is_no_model(make_model, tmp_path):
    adapter = save_adapter(make_model("llama"), tmp_path)
    with pytest.raises(
        TliError, match="must hold a config.json, got an adapter's adapter_config.json; name the model that the adapter is for"
    ):
        open_checkpoint(str(adapter))


def test_a_model_of_its_own_code_is_refused(copy):
    folder, _ = copy()
    change_config(folder, model_type="llama_custom", auto_map={"AutoConfig": "configuration_x.XConfig"})
    with pytest.raises(
        TliError, match=r"a model that transformers knows, got llama_custom, which is code beside the weights \(auto_map\); "
    ):
        open_checkpoint(str(folder))


def test_code_beside_a_known_model_is_not_run(copy):
    folder, _ = copy()
    change_config(folder, auto_map={"AutoConfig": "configuration_x.XConfig"})
    (folder / "configuration_x.py").write_text("raise SystemExit('ran')\n")
    assert_whole_models_states(folder, AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False))


def test_two_decoders_are_ambiguous_and_none_is_said(copy):
    folder, tensors = copy()
    write(folder, tensors | {f"talker.{name}": tensor.clone() for name, tensor in tensors.items()})
    with pytest.raises(TliError, match="must hold one decoder's .*, got (model. and talker.model.|talker.model. and model.); "):
        open_checkpoint(str(folder))
    write(folder, {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name})
    with pytest.raises(TliError, match="must hold one decoder's embed_tokens.weight and .*, got none; "):
        open_checkpoint(str(folder))


def test_a_revision_in_a_hub_name_is_explained():
    with pytest.raises(
        TliError, match="without a revision, got someone/model@v2; hf download someone/model --revision v2 --local-dir FOLDER"
    ):
        open_checkpoint("someone/model@v2")


def cached(model: pathlib.Path, home: pathlib.Path) -> pathlib.Path:
    """A hub cache that holds the model as someone/model, as the hub's client lays it out: its snapshot, of links."""
    repository = home / "hub" / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 39 + "1")
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{number:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")
    return snapshot


@pytest.mark.parametrize("by", ["name", "snapshot"])
def test_a_hub_cache_is_read_offline(make_model, word_list, tmp_path, by):
    snapshot = cached(make_model("llama", shards=True), tmp_path)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "TLI_CACHE": str(tmp_path / "tli"),
    }
    name = "someone/model" if by == "name" else str(snapshot)
    flags = [
        "--model",
        name,
        "--pairs",
        str(word_list),
        "--rank=2",
        "--epochs=1",
        "--no-report",
        "--json",
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([sys.executable, "-m", "tli.train", *flags], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["sha256"] == open_checkpoint(str(snapshot)).sha256(report["config"]["layer"])


def test_a_cached_repositorys_folder_names_its_snapshot(make_model, tmp_path):
    snapshot = cached(make_model("llama"), tmp_path)
    with pytest.raises(TliError, match=f"must hold a config.json, got a hub cache's snapshots; name one of them: {snapshot}"):
        open_checkpoint(str(snapshot.parent.parent))


def test_a_name_that_no_disk_takes_is_one_line(make_model, word_list, tmp_path):
    output = tmp_path / ("x" * 300)
    with pytest.raises(TliError, match="the output must be writable, got file name too long; choose another folder"):
        train(TrainConfig(model=str(make_model("llama")), pairs=str(word_list), output=str(output), rank=2))


def test_a_rate_that_breaks_the_training_says_so(make_model, word_list, tmp_path):
    config = TrainConfig(model=str(make_model("llama")), pairs=str(word_list), output=str(tmp_path / "out"), rank=4, lr=1e6, no_report=True)
    with pytest.raises(TliError, match=r"^step \d+: the loss must be finite, got nan; lower --lr"):
        train(config)
