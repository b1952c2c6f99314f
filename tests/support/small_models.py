"""Small models of each family with random weights, and a tokenizer: what most tests and ``tests.torture`` read."""

import pathlib

import torch

from tli.data import word_pairs
from tli.model.families import FAMILIES

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


def save(
    folder: pathlib.Path,
    family: str,
    tokenizer,
    *,
    blocks: int = 4,
    tied: bool = True,
    shards: bool = False,
    seed: int = 0,
    **overrides,
) -> pathlib.Path:
    """Save a causal LM of a family with its tokenizer to ``folder``; ``overrides`` are entries of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

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
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
    tokenizer.save_pretrained(folder)
    return folder
