"""Precompute block 0's q, k and v projections per vocabulary entry: they depend on the token id alone.

In front of the first adapter everything depends on the token alone: its embedding, the first norm, and what the frozen weights of
q, k and v make of it. So these weights give way to their products with each distinct token of the words; what an adapter adds to
them is still computed in every step. Position and neighbours come in behind: rotary embedding and attention read q, k and v.
"""

import contextlib
import functools
import typing

import torch
from torch import Tensor, nn

from tli.model.families import blocks_of, embedding_of, traits_of
from tli.model.shape import table_bytes
from tli.runtime import ops
from tli.runtime.environment import return_freed_memory

if typing.TYPE_CHECKING:
    from tli.model.decoder import Decoder

_AT_ONCE = 1024


def precompute_qkv(decoder: "Decoder") -> int | None:
    """Put tables in the place of block 0's q, k and v weights, unless its ops are exact or the tables too large.

    Args:
        decoder:  a loaded decoder, in front of adapters; its kept embedding rows are the tokens

    Returns:
        The tables' bytes, or None where the weights stay, as where positions are added to the embeddings.
    """
    block, embedding = blocks_of(decoder)[0], embedding_of(decoder)
    projections, table = [block.get_submodule(path) for path in traits_of(decoder).tables], embedding.weight
    if not projections:
        return None
    outputs = sum(linear.weight.shape[0] for linear in projections)
    held = sum(linear.weight.nbytes for linear in projections)
    size = table_bytes(len(table), outputs, table.element_size(), held)
    if size is None or projections[0].ops.exact:
        return None
    inputs = _inputs(decoder)
    for linear in projections:
        products = torch.cat([linear.ops.linear(part, linear.weight, linear.bias) for part in inputs.split(_AT_ONCE)])
        lookup, linear.bias = ops.TokenTable(products, linear.weight.shape), None
        del linear.weight
        linear.weight = lookup
        # the table, not the module that has it: an adapter takes its place
        embedding.register_forward_pre_hook(functools.partial(_see, lookup))
    return_freed_memory()
    return size


def _see(table: ops.TokenTable, embedding: nn.Module, arguments: tuple) -> None:
    (table.tokens,) = arguments


class _Reached(Exception):
    """The first projection's input is there: nothing behind it need run."""


@torch.no_grad()
def _inputs(decoder: "Decoder") -> Tensor:
    """What block 0's projections read of each token: [V, K], by the model's own code for whatever comes before."""
    block, table = blocks_of(decoder)[0], embedding_of(decoder).weight
    inputs, tokens = [], torch.arange(len(table), device=table.device)

    def take(module: nn.Module, arguments: tuple) -> None:
        inputs.append(arguments[0].flatten(0, 1))
        raise _Reached

    hook = block.get_submodule(traits_of(decoder).tables[0]).register_forward_pre_hook(take)
    try:
        for part in tokens.split(_AT_ONCE):
            alone = table.new_zeros(len(part), 1, 1, 1)
            with contextlib.suppress(_Reached):
                decoder(input_ids=part[:, None], attention_mask=alone, position_ids=torch.zeros_like(part)[:, None], use_cache=False)
    finally:
        hook.remove()
    return torch.cat(inputs)
