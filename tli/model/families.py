"""What tli knows of each model family: one line a family, and nowhere else.

A family stands here when its truncated states were shown equal to the whole model's (tests/model/test_decoder.py goes through this table).
Imports no torch.
"""

import dataclasses
import typing

from tli.runtime.errors import TliError

# the linear layers of a block, by their paths in it, and those whose input depends on the token alone in block 0
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
QKV = ("q_proj", "k_proj", "v_proj")


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family of decoders apart.

    config_defaults   what its config.json leaves out where it is the family's usual value
    norm_offset       what its norms add to the stored weight
    norms_behind      attention and MLP have a norm behind them, too
    head_norms        queries and keys have a norm for each head
    across_heads      that norm is one of all heads together
    soft_caps         attention's scores are soft-capped, which has no fused form
    rotary_kinds      how many sets of rotary frequencies its blocks have
    """

    config_defaults: dict[str, typing.Any]
    norm_offset: float = 0.0
    norms_behind: bool = False
    head_norms: bool = False
    across_heads: bool = False
    soft_caps: bool = False
    rotary_kinds: int = 1


_GEMMA = {"head_dim": 256, "num_key_value_heads": 4, "num_attention_heads": 8}
# by transformers' model_type
FAMILIES = {
    "llama": Family({"mlp_bias": False}),
    "mistral": Family({"num_key_value_heads": 8}),
    "qwen2": Family({"num_key_value_heads": 32, "attention_bias": "q_proj,k_proj,v_proj"}),
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
}


def family_of(model_type: str | None, name: str) -> Family:
    """The family of a config's ``model_type``; raises ``TliError`` for another, about the model ``name``."""
    if model_type not in FAMILIES:
        must = f"the model's family must be one that is known to truncate exactly ({', '.join(FAMILIES)})"
        raise TliError(name, must, model_type, "choose a model of these families")
    return FAMILIES[model_type]
