"""Shared fixtures: the starter, small random-weight models of each family, a tokenizer; and Triton's interpreter without a GPU."""

import os
import pathlib
from collections.abc import Callable

import pytest

# the tests of several files run side by side, a thread each: threads of one process that wait for a core of another's spin
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}

import hypothesis
import torch

# before any kernel is defined: Triton asks when it meets @triton.jit
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.support import interpreter
from tli.data import word_pairs
from tli.model.families import FAMILIES

# a busy machine is no failure
hypothesis.settings.register_profile("tli", deadline=None)
hypothesis.settings.load_profile("tli")

interpreter.mend_bfloat16()

# what sets a family apart, where its defaults would hide it: narrow windows, which alternate with full attention in families that have
# both; Granite's multipliers, which are 1 unless set; blocks without positions among few
_WINDOWED = ("mistral", "ministral", "gemma2", "gemma3_text", "olmo3", "exaone4", "vaultgemma")
_APART = {
    **dict.fromkeys(_WINDOWED, {"sliding_window": 24}),
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1, "logits_scaling": 3.0},
    "smollm3": {"no_rope_layer_interval": 2},
    "ernie4_5": {"use_bias": True},
    # the peers of tests/bench would draw from it
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    # a part of a head is turned
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "gpt_neox": {"rotary_pct": 0.5},
    "cohere": {"logit_scale": 0.7, "use_qk_norm": True},
    "cohere2": {"sliding_window": 24, "logit_scale": 0.7},
}
# entries that the family's models do not read
_UNREAD = {
    **dict.fromkeys(("gpt_neox", "gpt2", "opt", "xglm", "falcon"), {"head_dim", "num_key_value_heads"}),
    "bloom": {"head_dim", "num_key_value_heads", "intermediate_size", "max_position_embeddings"},
    "stablelm": {"head_dim"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use the starter as ``network``; skip ``gpu`` tests without a GPU."""
    for item in items:
        if "starter" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.network)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def starter() -> pathlib.Path:
    """The starter model's folder, in the user's cache: fetched once per machine, not once per run."""
    from tli.model.starter import starter_folder

    return starter_folder()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer trained on the shipped list, with a BOS; 400 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [word for pair in word_pairs.read_pairs(None, "swahili", "english") for word in (pair.source, pair.target)]
    bpe.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def word_list(tmp_path_factory) -> pathlib.Path:
    """The first 60 shipped pairs."""
    path = tmp_path_factory.mktemp("words") / "sixty.tsv"
    path.write_text("\n".join(word_pairs.SHIPPED.read_text(encoding="utf-8").splitlines()[:61]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, tokenizer) -> Callable[..., pathlib.Path]:
    """Save a small random-weight causal LM of a family, as ``make_model("llama", shards=True, tied=False)``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}

    def make(family: str, *, blocks: int = 4, tied: bool = True, shards: bool = False, seed: int = 0, **overrides) -> pathlib.Path:
        key = (family, blocks, tied, shards, seed, *sorted(overrides.items()))
        if key not in made:
            sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": blocks, "vocab_size": len(tokenizer)}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
            ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": tied}
            entries, aliases = {**sizes, **heads, **ids, **_APART.get(family, {}), **overrides}, FAMILIES[family].aliases
            read = {aliases.get(name, name): value for name, value in entries.items() if name not in _UNREAD.get(family, ())}
            config = AutoConfig.for_model(family, **read)
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            # the usual initialisation (std 0.02) is so close to linear that errors in masks and positions would not show
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make
