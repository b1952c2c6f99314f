"""The frozen decoder: transformers' own blocks, truncated after block L, or all of them with hidden state L captured by a forward hook.

``hidden_states[L]`` is the residual stream after L blocks and *before* any final norm, so the truncated decoder's final norm is an
identity. (A transformers model made with ``num_hidden_layers=L`` applies its norm: its last state is another quantity.) Nothing
beyond block L is built, read or computed.

The arms that it is compared with run the whole model. ``full`` runs every block and aligns the output, after the final norm, with
adapters in all blocks. ``full-hook`` runs every block, too, but its loss reads hidden state L, captured by a hook, and its adapters lie
below: this is how an early layer is trained with other tools, and it must give the losses and gradients of the truncated model.
Blocks, linear layers, embedding rows and packed words are the truncated model's own, so the arms differ in nothing else.
"""

import contextlib
import functools
import typing
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from tli.data.batch import Batch
from tli.model.checkpoint import Checkpoint
from tli.model.families import Family, blocks_of, embedding_of
from tli.model.token_table import precompute_qkv
from tli.runtime import ops
from tli.runtime.device import DeviceConfig
from tli.runtime.environment import return_freed_memory
from tli.runtime.errors import TliError, one_line
from tli.runtime.ops import Ops

if typing.TYPE_CHECKING:

    class Decoder(nn.Module):
        """The part of transformers' decoder that is used here; its class is the family's own, and ``nn.Module`` types no attribute.

        Its blocks, embedding and norm have the family's own names: ``families.blocks_of`` and so on.
        """

        config: typing.Any


class FrozenLinear(nn.Linear):
    """y = x·Wᵀ + bias with frozen weights, by the implementation in ``ops``."""

    ops: Ops = ops.REFERENCE

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


def run(decoder: nn.Module, batch: Batch) -> Tensor:
    """The decoder's last hidden state of each node: [T, D], nodes in the order of ``batch.input_ids``."""
    outputs = decoder(input_ids=batch.input_ids, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False)
    return outputs.last_hidden_state.flatten(0, 1)


def load_truncated_decoder(checkpoint: Checkpoint, layer: int, vocab_ids: np.ndarray | None, device_config: DeviceConfig) -> "Decoder":
    """transformers' decoder with the first ``layer`` blocks alone: its last hidden state is ``hidden_states[layer]``.

    Args:
        checkpoint:     an open checkpoint
        layer:          L, from 1 to the checkpoint's number of blocks
        vocab_ids:      int64 [V] token ids whose embedding rows are kept, in the order that input ids count; None keeps all
        device_config:  dtype, device and rounding of the weights

    Returns:
        The decoder, frozen and in evaluation mode. Adapters go into it in place.

    Raises:
        TliError: a layer out of range, a missing or misshapen tensor, an unreadable shard.
    """
    require_layer(checkpoint, layer)
    decoder = init_empty_decoder(checkpoint, layer, vocab_ids, device_config)
    for index in range(layer):
        load_block(checkpoint, blocks_of(decoder)[index], index, device_config)
    setattr(decoder, checkpoint.family.norm, nn.Identity())
    return decoder


def require_layer(checkpoint: Checkpoint, layer: int) -> None:
    """Raise ``TliError`` for a layer that is not the end of one of the checkpoint's blocks."""
    if not 1 <= layer <= checkpoint.blocks:
        raise TliError(
            "--layer", f"the layer must be from 1 to {checkpoint.blocks}, the model's number of blocks", layer, "choose one in this range"
        )


def init_empty_decoder(checkpoint: Checkpoint, blocks: int, vocab_ids: np.ndarray | None, device_config: DeviceConfig) -> "Decoder":
    """transformers' decoder with its embedding rows read, ``blocks`` blocks without memory, and its final norm unread."""
    family = checkpoint.family
    # built for real but for the blocks and the vocabulary, so that every buffer (rotary frequencies, scales) is the family's own
    try:
        config = _config(checkpoint, blocks)
        real = _build(_config(checkpoint, blocks=0), torch.float32, family)
        # some families have frequencies for each kind of block there is
        if hasattr(real, "rotary_emb"):
            real.rotary_emb = type(real.rotary_emb)(config)
        with torch.device("meta"):
            # a decoder notes what kinds of block it has as it is built
            decoder = _build(config, device_config.dtype, family)
    # transformers computes with whatever its config says
    except Exception as error:
        must = "config.json must describe a model that transformers can build"
        raise TliError(
            checkpoint.name, must, f"{type(error).__name__}: {one_line(error)}", "use the config.json of these weights"
        ) from error
    real.to(device_config.device)
    with torch.device("meta"):
        _use_frozen_linear(blocks_of(decoder), family, device_config.ops)
    for name, child in real.named_children():
        if name != family.blocks:
            setattr(decoder, name, child)
    for path in family.beside:
        _load_module(checkpoint, decoder, path, device_config)
    if family.alibi:
        _take_depths(decoder)
    table = checkpoint.embedding_rows(None if vocab_ids is None else torch.from_numpy(vocab_ids))
    embedding_of(decoder).weight = nn.Parameter(table.to(device_config.device, device_config.dtype), requires_grad=False)
    return decoder.requires_grad_(False).eval()


def _build(config: typing.Any, dtype: torch.dtype, family: Family) -> typing.Any:
    """transformers' decoder of a config."""
    from transformers import AutoModel

    return AutoModel.from_config(config, dtype=dtype, trust_remote_code=False).get_submodule(family.base)


def _use_frozen_linear(blocks: nn.ModuleList, family: Family, ops: Ops) -> None:
    """Make the blocks' linear layers ``FrozenLinear``s, GPT-2's Conv1D, too: y = x·W + bias, whose weight is then a transposed one."""
    for block in blocks:
        for path in family.linear:
            owner, _, name = path.rpartition(".")
            child: typing.Any = block.get_submodule(path)
            if family.transposed:
                weight, bias = child.weight, child.bias
                child = nn.Linear(weight.shape[0], weight.shape[1], dtype=weight.dtype)
                child.bias = bias
                setattr(block.get_submodule(owner), name, child)
            child.__class__ = FrozenLinear
            child.ops = ops


def _take_depths(decoder: typing.Any) -> None:
    """Make ALiBi's biases those of the nodes' depths, where a mask of [bins, 1, width, width] says who sees whom.

    transformers takes a key for as far along as it lies in its row; in a trie a node's position is how many it sees, less itself.
    """
    by_row = decoder.build_alibi_tensor

    def biases(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        if mask.ndim == 2:
            return by_row(mask, heads, dtype)
        depths = ((mask[:, 0] == 0).sum(2) - 1).clamp_min(0)
        # of one row in which everything is a token: [heads, 1, width]
        each = by_row(depths.new_ones(1, mask.shape[-1]), heads, dtype)
        return each[:, 0, depths].transpose(0, 1).reshape(-1, 1, mask.shape[-1])

    decoder.build_alibi_tensor = biases


def _config(checkpoint: Checkpoint, blocks: int) -> typing.Any:
    config = type(checkpoint.config)(**checkpoint.config.to_dict())
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(checkpoint.config.layer_types[:blocks])
    # it describes the checkpoint's files, which are dequantised as they are read
    config.quantization_config = None
    # a placeholder row, until the kept rows replace it
    config.vocab_size, config.pad_token_id = 1, None
    # the adapters' dropout is the only one: it has a seed, and the whole model's would be another
    for name in [name for name, value in config.to_dict().items() if "drop" in name and isinstance(value, (int, float))]:
        setattr(config, name, 0.0)
    # SDPA has no soft-capping: Gemma 2 needs the eager form
    eager = checkpoint.family.only_eager or getattr(config, "attn_logit_softcapping", None) is not None
    config._attn_implementation = "eager" if eager else "sdpa"
    return config


def load_block(checkpoint: Checkpoint, block: nn.Module, index: int, device_config: DeviceConfig) -> None:
    """Read block ``index`` of the checkpoint into ``block``, frozen; packed NF4 weights only where the ops compute from them."""
    linear = {f"{path}.weight" for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    for full, (local, empty) in block_tensors(checkpoint.family, block, index).items():
        turned = checkpoint.family.transposed and local in linear
        # one by one: as long as a tensor of a file is held, all of the file that was read counts as this process's memory
        tensor = checkpoint.read({full: tuple(reversed(empty.shape)) if turned else tuple(empty.shape)})[full]
        _set(block, local, _placed(tensor.T.contiguous() if turned else tensor, device_config, local in linear))
        del tensor
    return_freed_memory()


def _set(module: nn.Module, path: str, value: nn.Parameter | ops.NF4Weight) -> None:
    """Put a weight in the place of the parameter at this path."""
    owner, _, leaf = path.rpartition(".")
    module = module.get_submodule(owner)
    # a registered parameter's place takes no packed weight
    delattr(module, leaf)
    setattr(module, leaf, value)


def _load_module(checkpoint: Checkpoint, decoder: "Decoder", path: str, device_config: DeviceConfig) -> None:
    """Read a part of ``decoder`` outside its blocks, frozen; what it made itself (sinusoidal positions) takes the compute dtype, too."""
    module = decoder.get_submodule(path).to(device_config.dtype)
    for name, parameter in list(module.named_parameters()):
        tensor = checkpoint.read({f"{path}.{name}": tuple(parameter.shape)})[f"{path}.{name}"]
        _set(module, name, _placed(tensor, device_config, linear=False))


def use_eager_attention(decoder: "Decoder") -> None:
    """Use eager attention (QKᵀ, softmax, PV) instead of SDPA, from now on; it holds the bins' probabilities, width × width for each head.

    For small bins in bf16 on a CPU SDPA takes three times as long.
    """
    # the blocks read it at each call
    decoder.config._attn_implementation = "eager"


def load_norm(checkpoint: Checkpoint, decoder: "Decoder", device_config: DeviceConfig) -> None:
    """Read the final norm into ``decoder``, frozen."""
    _load_module(checkpoint, decoder, checkpoint.family.norm, device_config)


def _placed(tensor: Tensor | ops.NF4Weight, device_config: DeviceConfig, linear: bool) -> nn.Parameter | ops.NF4Weight:
    """A tensor of the checkpoint, frozen, on the model's device and in its dtype or NF4."""
    if device_config.weights == "nf4" and linear and not isinstance(tensor, ops.NF4Weight):
        try:
            # bf16 is what a 4-bit model is made from
            tensor = ops.NF4Weight.quantise(tensor.to(device_config.device, torch.bfloat16))
        except (ImportError, OSError) as error:
            raise TliError("--weights", "bitsandbytes must be installed to round weights to NF4", error, "use --weights full") from error
        except ValueError as error:
            raise TliError("--weights", "every linear layer's weight must fit into NF4", error, "use --weights full") from error
    if isinstance(tensor, ops.NF4Weight):
        tensor = tensor.to(device_config.device)
        if device_config.weights == "nf4" and not device_config.ops.exact:
            return tensor
        tensor = ops.dequantise(tensor, device_config.dtype)
    # a copy even where the dtype is right: the file may go away under a mapped tensor
    return nn.Parameter(tensor.to(device_config.device, device_config.dtype, copy=True), requires_grad=False)


def block_tensors(family: Family, block: nn.Module, index: int) -> dict[str, tuple[str, Tensor]]:
    """A block's parameters, and buffers that are saved, by name in the checkpoint: name -> (name in the block, tensor)."""
    return {f"{family.blocks}.{index}.{local}": (local, tensor) for local, tensor in block.state_dict(keep_vars=True).items()}


def load_full_decoder(checkpoint: Checkpoint, vocab_ids: np.ndarray | None, device_config: DeviceConfig) -> "Decoder":
    """transformers' decoder with all its blocks and its final norm: its last hidden state is ``output``.

    Each tensor is read once, and no more than one block is held twice while it is.

    Args:
        checkpoint:     an open checkpoint
        vocab_ids:      as for ``load_truncated_decoder``
        device_config:  as for ``load_truncated_decoder``

    Returns:
        The decoder, frozen and in evaluation mode. Adapters go into it in place.

    Raises:
        TliError: an absent shard, a missing or misshapen tensor.
    """
    decoder = init_empty_decoder(checkpoint, checkpoint.blocks, vocab_ids, device_config)
    for index, block in enumerate(blocks_of(decoder)):
        load_block(checkpoint, block, index, device_config)
    load_norm(checkpoint, decoder, device_config)
    return decoder


def states_of(output: Tensor | tuple) -> Tensor:
    """A block's states; some families' give attention's weights, too."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def capture_output(block: nn.Module) -> Iterator[list[Tensor]]:
    """Capture the outputs of ``block`` by a forward hook while the context is open; the hook is removed whatever happens inside."""
    states = []
    handle = block.register_forward_hook(lambda module, arguments, output: states.append(states_of(output)))
    try:
        yield states
    finally:
        handle.remove()


def run_hooked(decoder: "Decoder", batch: Batch, layer: int) -> Tensor:
    """Hidden state ``layer`` of each node, [T, D] as from ``run``, out of a pass through all blocks."""
    with capture_output(blocks_of(decoder)[layer - 1]) as states:
        run(decoder, batch)
    return states[0].flatten(0, 1)


def enable_gradient_checkpointing(decoder: "Decoder") -> None:
    """Gradient checkpointing: keep of each block only its input, from now on, and recompute the rest in the backward pass.

    Gradients are those without it: dropout is a function of its step's seed, so it drops the same entries again. (transformers'
    own switch changes its name and its place among the hooks from version to version, and its reentrant form loses the gradients
    of adapters above frozen embeddings.)
    """
    for block in blocks_of(decoder):
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)


def build_decoder(
    checkpoint: Checkpoint, vocab_ids: np.ndarray | None, device_config: DeviceConfig, *, arm: str, layer: int, checkpointing: bool = False
) -> "Decoder":
    """The arm's model, still without adapters: truncated at ``layer``, or whole.

    Args:
        checkpoint:     an open checkpoint
        vocab_ids:      int64 [V] token ids whose embedding rows are kept; None keeps all
        device_config:  dtype, device and rounding of the weights
        arm:            "early", "full" or "full-hook"
        layer:          L, from 1 to the checkpoint's number of blocks
        checkpointing:  gradient checkpointing

    Raises:
        TliError: as ``load_truncated_decoder`` and ``load_full_decoder``.
    """
    require_layer(checkpoint, layer)
    if arm == "early":
        decoder = load_truncated_decoder(checkpoint, layer, vocab_ids, device_config)
    else:
        decoder = load_full_decoder(checkpoint, vocab_ids, device_config)
    precompute_qkv(decoder)
    if device_config.attention == "eager":
        use_eager_attention(decoder)
    if checkpointing:
        enable_gradient_checkpointing(decoder)
    return decoder
