"""What tli knows of each model family: one row a family, and nowhere else.

A family stands here when its truncated states were shown equal to the whole model's (tests/model/test_decoder.py goes through this table).
Imports no torch.
"""

import dataclasses
import typing

from tli.runtime.errors import TliError

# the linear layers of a block in the order of its modules, the MLP's last one at the end: path in the block -> what its out-features are
# and its in-features, in sizes: d width, i the MLP's inside, q queries and k keys (values have the keys' size); a fused layer has several
LINEAR = {
    "self_attn.q_proj": ("q", "d"),
    "self_attn.k_proj": ("k", "d"),
    "self_attn.v_proj": ("k", "d"),
    "self_attn.o_proj": ("d", "q"),
    "mlp.gate_proj": ("i", "d"),
    "mlp.up_proj": ("i", "d"),
    "mlp.down_proj": ("d", "i"),
}
_Q_K_V = ("q_proj", "k_proj", "v_proj")
_QKV = tuple(f"self_attn.{name}" for name in _Q_K_V)
_FUSED_QKV = "self_attention.query_key_value"
_DENSE = {"mlp.dense_h_to_4h": ("i", "d"), "mlp.dense_4h_to_h": ("d", "i")}
_FUSED = {_FUSED_QKV: ("qkk", "d"), "self_attention.dense": ("d", "q"), **_DENSE}
_FAIRSEQ = {
    "self_attn.k_proj": ("k", "d"),
    "self_attn.v_proj": ("k", "d"),
    "self_attn.q_proj": ("q", "d"),
    "self_attn.out_proj": ("d", "q"),
    "fc1": ("i", "d"),
    "fc2": ("d", "i"),
}

_ATTENTION, _MLP = (*_Q_K_V, "o_proj"), ("gate_proj", "up_proj", "down_proj")
_LLAMA_BIASES = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}

Config = dict[str, typing.Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family of decoders apart.

    Of its config.json:

    config_defaults   what it leaves out where it is the family's usual value
    aliases           its own names of sizes, by Llama's
    inside            the MLP's inside in widths, where it does not say it
    key_heads         how many heads its keys have, where no number says it
    needs             what it must say, a value or the name of an entry with the same value: models of the family that say otherwise compute
                      otherwise, and are refused
    context           tokens that a model sees at once, where it does not say it

    Of names:

    causal_lm         path of the decoder in its ForCausalLM class
    base              path of the decoder in the class that AutoModel builds
    blocks            the list of blocks in the decoder; embedding and norm likewise
    beside            further modules of the decoder with weights: learned positions, a norm behind the embedding
    rows_beside       how many rows as wide as the model they hold, by its config
    linear            its blocks' linear layers, as ``LINEAR``
    tables            those whose input depends on the token alone in block 0
    transposed        linear layers are Conv1D: their weights are stored as [K, N]

    Of its blocks:

    biases            which linear layers have biases, by the entry of the config that says so; "always"
    layer_norm        norms are LayerNorms: they subtract the mean, which no token norm does
    norm_eps          the entry with the norms' epsilon
    norms             how many norms a block has, by its config
    norm_biases       norms have biases
    numbers           what else a block holds, in single numbers: those of a trained activation
    norm_offset       what its norms add to the stored weight
    norms_behind      attention and MLP have a norm behind them, too
    head_norms        queries and keys have a norm for each head, or the entry that says so
    across_heads      that norm is one of all heads together, or has weights for each
    soft_caps         attention's scores are soft-capped, which has no fused form
    rotary_kinds      how many sets of rotary frequencies its blocks have
    only_eager        transformers has no fused attention for it
    alibi             positions are ALiBi's, a bias of each key (``decoder.py`` takes depths for them)
    kept_inside       tensors as wide as the MLP's inside that its activation keeps for the backward pass: with it what a step takes is
                      predicted to be no less than it is, without it tensor by tensor
    """

    config_defaults: Config
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    inside: int | None = None
    key_heads: typing.Callable[[Config], int] | None = None
    needs: Config = dataclasses.field(default_factory=dict)
    context: int | None = None
    causal_lm: str = "model"
    base: str = ""
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    beside: tuple[str, ...] = ()
    rows_beside: typing.Callable[[Config], int] = lambda config: 0
    linear: dict[str, tuple[str, str]] = dataclasses.field(default_factory=lambda: LINEAR)
    tables: tuple[str, ...] = _QKV
    transposed: bool = False
    biases: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: _LLAMA_BIASES)
    layer_norm: bool = False
    norm_eps: str = "rms_norm_eps"
    norms: typing.Callable[[Config], int] = lambda config: 2
    norm_biases: bool = False
    numbers: int = 0
    norm_offset: float = 0.0
    norms_behind: bool = False
    head_norms: bool | str = False
    across_heads: bool = False
    soft_caps: bool = False
    rotary_kinds: int = 1
    only_eager: bool = False
    alibi: bool = False
    kept_inside: int | None = None

    def read(self, config: Config, name: str) -> Config:
        """A ``config.json`` with the sizes under Llama's names and what it leaves out.

        Raises:
            TliError: the model ``name`` is of a kind in its family that computes otherwise.
        """
        said = {key: value for key, value in config.items() if value is not None}
        for key, wanted in self.needs.items():
            value = said.get(wanted) if isinstance(wanted, str) else wanted
            if key in said and said[key] != value:
                must = f"{key} in config.json must be {value} in a model of the family {config.get('model_type')}"
                raise TliError(name, must, said[key], "choose another model")
        return self.config_defaults | said | {common: said[own] for common, own in self.aliases.items() if own in said}


def _falcon_key_heads(config: Config) -> int:
    if config.get("new_decoder_architecture"):
        return int(config.get("num_kv_heads") or config["num_attention_heads"])
    return 1 if config["multi_query"] else config["num_attention_heads"]


def _falcon_norms(config: Config) -> int:
    of_parallel = config.get("num_ln_in_parallel_attn", 2 if config.get("new_decoder_architecture") else 1)
    return of_parallel if config["parallel_attn"] else 2


_GEMMA = {"head_dim": 256, "num_key_value_heads": 4, "num_attention_heads": 8}
# by transformers' model_type
FAMILIES = {
    "llama": Family({"mlp_bias": False}),
    "mistral": Family({"num_key_value_heads": 8}),
    "qwen2": Family({"num_key_value_heads": 32}, biases={"always": _Q_K_V}),
    "qwen3": Family({"head_dim": 128, "num_key_value_heads": 32}, head_norms=True),
    "granite": Family({"mlp_bias": False}),
    "smollm3": Family({"num_key_value_heads": 4}),
    "gemma": Family({"head_dim": 256, "num_key_value_heads": 16, "num_attention_heads": 16}, norm_offset=1.0),
    "ministral": Family({"num_key_value_heads": 8}),
    "ministral3": Family({"head_dim": 128, "num_key_value_heads": 8}),
    "hunyuan_v1_dense": Family({}, head_norms=True),
    "olmo2": Family({}, head_norms=True, across_heads=True),
    "olmo3": Family({}, head_norms=True, across_heads=True),
    "exaone4": Family({}, head_norms=True),
    "gemma2": Family({**_GEMMA, "attn_logit_softcapping": 50.0}, norm_offset=1.0, norms_behind=True, soft_caps=True),
    "gemma3_text": Family({**_GEMMA, "vocab_size": 262208}, norm_offset=1.0, norms_behind=True, head_norms=True, rotary_kinds=2),
    "vaultgemma": Family({**_GEMMA, "attn_logit_softcapping": 50.0}, norm_offset=1.0, soft_caps=True),
    "seed_oss": Family(
        {"head_dim": 128, "num_key_value_heads": 8, "attention_bias": True},
        biases={"attention_bias": _Q_K_V, "attention_out_bias": ("o_proj",), "mlp_bias": _MLP},
    ),
    "ernie4_5": Family(
        {"head_dim": 128, "num_key_value_heads": 2},
        biases={"use_bias": (*_ATTENTION, *_MLP)},
    ),
    "apertus": Family(
        {},
        linear={path: sizes for path, sizes in LINEAR.items() if path != "mlp.gate_proj"},
        biases={"attention_bias": _ATTENTION},
        head_norms=True,
        numbers=4,
        kept_inside=6,
    ),
    "phi3": Family(
        {},
        linear={
            "self_attn.o_proj": ("d", "q"),
            "self_attn.qkv_proj": ("qkk", "d"),
            "mlp.gate_up_proj": ("ii", "d"),
            "mlp.down_proj": ("d", "i"),
        },
        tables=("self_attn.qkv_proj",),
        biases={},
        kept_inside=3,
    ),
    "stablelm": Family(
        {"num_key_value_heads": 32},
        biases={"use_qkv_bias": _Q_K_V},
        layer_norm=True,
        norm_eps="layer_norm_eps",
        norms=lambda config: 1 if config.get("use_parallel_residual") else 2,
        norm_biases=True,
        head_norms="qk_layernorm",
        across_heads=True,
        kept_inside=3,
    ),
    "cohere": Family(
        {},
        biases={"attention_bias": _ATTENTION},
        layer_norm=True,
        norm_eps="layer_norm_eps",
        norms=lambda config: 1,
        head_norms="use_qk_norm",
        across_heads=True,
        kept_inside=3,
    ),
    "cohere2": Family(
        {},
        biases={"attention_bias": _ATTENTION},
        layer_norm=True,
        norm_eps="layer_norm_eps",
        norms=lambda config: 1,
        kept_inside=3,
    ),
    "gpt_neox": Family(
        {"attention_bias": True},
        causal_lm="gpt_neox",
        embedding="embed_in",
        norm="final_layer_norm",
        linear={"attention.query_key_value": ("qkk", "d"), "attention.dense": ("d", "q"), **_DENSE},
        tables=("attention.query_key_value",),
        biases={"attention_bias": ("query_key_value", "dense"), "always": ("dense_h_to_4h", "dense_4h_to_h")},
        layer_norm=True,
        norm_eps="layer_norm_eps",
        norm_biases=True,
        kept_inside=2,
    ),
    "gpt2": Family(
        {},
        aliases={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
        },
        inside=4,
        needs={"add_cross_attention": False},
        causal_lm="transformer",
        blocks="h",
        embedding="wte",
        norm="ln_f",
        beside=("wpe",),
        rows_beside=lambda config: config.get("max_position_embeddings", 1024),
        linear={"attn.c_attn": ("qkk", "d"), "attn.c_proj": ("d", "q"), "mlp.c_fc": ("i", "d"), "mlp.c_proj": ("d", "i")},
        tables=(),
        transposed=True,
        biases={"always": ("c_attn", "c_proj", "c_fc")},
        layer_norm=True,
        norm_eps="layer_norm_epsilon",
        norm_biases=True,
        kept_inside=5,
    ),
    "opt": Family(
        {"enable_bias": True},
        aliases={"intermediate_size": "ffn_dim"},
        # the others project their embeddings, or have no norm at their end
        needs={
            "word_embed_proj_dim": "hidden_size",
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
        },
        causal_lm="model.decoder",
        base="decoder",
        norm="final_layer_norm",
        beside=("embed_positions",),
        # two rows in front of the first position's
        rows_beside=lambda config: config.get("max_position_embeddings", 2048) + 2,
        linear=_FAIRSEQ,
        tables=(),
        biases={"enable_bias": ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2")},
        layer_norm=True,
        norm_biases=True,
        kept_inside=1,
    ),
    "xglm": Family(
        {},
        aliases={
            "hidden_size": "d_model",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "attention_heads",
            "intermediate_size": "ffn_dim",
        },
        # of the sinusoidal positions the padding's row is zero, which is none of a token's here
        needs={"add_cross_attention": False, "pad_token_id": 1},
        norm="layer_norm",
        beside=("embed_positions",),
        rows_beside=lambda config: config.get("max_position_embeddings", 2048) + 2,
        linear=_FAIRSEQ,
        tables=(),
        biases={"always": ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2")},
        layer_norm=True,
        norm_biases=True,
        only_eager=True,
        kept_inside=2,
    ),
    "bloom": Family(
        {},
        aliases={"hidden_size": "n_embed", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
        inside=4,
        needs={"slow_but_exact": False},
        context=2048,
        causal_lm="transformer",
        blocks="h",
        embedding="word_embeddings",
        norm="ln_f",
        beside=("word_embeddings_layernorm",),
        rows_beside=lambda config: 2,
        linear=_FUSED,
        tables=(_FUSED_QKV,),
        biases={"always": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")},
        layer_norm=True,
        norm_eps="layer_norm_epsilon",
        norm_biases=True,
        only_eager=True,
        alibi=True,
        kept_inside=3,
    ),
    "falcon": Family(
        {"multi_query": True, "parallel_attn": True},
        aliases={"intermediate_size": "ffn_hidden_size"},
        inside=4,
        key_heads=_falcon_key_heads,
        needs={"alibi": False},
        causal_lm="transformer",
        blocks="h",
        embedding="word_embeddings",
        norm="ln_f",
        linear=_FUSED,
        tables=(_FUSED_QKV,),
        biases={"bias": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")},
        layer_norm=True,
        norm_eps="layer_norm_epsilon",
        norms=_falcon_norms,
        norm_biases=True,
        kept_inside=2,
    ),
}
# of Conv1D layers, for which PEFT says fan_in_fan_out
TRANSPOSED = frozenset(path for family in FAMILIES.values() if family.transposed for path in family.linear)


def family_of(model_type: str | None, name: str) -> Family:
    """The family of a config's ``model_type``; raises ``TliError`` for another, about the model ``name``."""
    if model_type not in FAMILIES:
        must = f"the model's family must be one that is known to truncate exactly ({', '.join(FAMILIES)})"
        raise TliError(name, must, model_type, "choose a model of these families")
    return FAMILIES[model_type]


def traits_of(decoder: typing.Any) -> Family:
    """What sets the family of one of transformers' decoders apart."""
    return FAMILIES[decoder.config.model_type]


def blocks_of(decoder: typing.Any) -> typing.Any:
    """A decoder's list of blocks."""
    return getattr(decoder, traits_of(decoder).blocks)


def embedding_of(decoder: typing.Any) -> typing.Any:
    """A decoder's embedding of tokens."""
    return getattr(decoder, traits_of(decoder).embedding)


def norm_of(decoder: typing.Any) -> typing.Any:
    """A decoder's final norm."""
    return getattr(decoder, traits_of(decoder).norm)
