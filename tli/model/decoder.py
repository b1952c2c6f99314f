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
from tli.model.token_table import precompute_qkv
from tli.runtime import ops
from tli.runtime.device import DeviceConfig
from tli.runtime.environment import return_freed_memory
from tli.runtime.errors import TliError
from tli.runtime.ops import Ops

if typing.TYPE_CHECKING:

    class Decoder(nn.Module):
        """The part of transformers' decoder that is used here; its class is the family's own, and ``nn.Module`` types no attribute."""

        config: typing.Any
        layers: typing.Any
        embed_tokens: nn.Embedding
        norm: typing.Any


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
        load_block(checkpoint, decoder.layers[index], index, device_config)
    decoder.norm = nn.Identity()
    return decoder


def require_layer(checkpoint: Checkpoint, layer: int) -> None:
    """Raise ``TliError`` for a layer that is not the end of one of the checkpoint's blocks."""
    if not 1 <= layer <= checkpoint.blocks:
        raise TliError(
            "--layer", f"the layer must be from 1 to {checkpoint.blocks}, the model's number of blocks", layer, "choose one in this range"
        )


def init_empty_decoder(checkpoint: Checkpoint, blocks: int, vocab_ids: np.ndarray | None, device_config: DeviceConfig) -> "Decoder":
    """transformers' decoder with its embedding rows read, ``blocks`` blocks without memory, and its final norm unread."""
    from transformers import AutoModel

    # built for real but for the blocks and the vocabulary, so that every buffer (rotary frequencies, scales) is the family's own
    config = _config(checkpoint, blocks)
    real = AutoModel.from_config(_config(checkpoint, blocks=0), dtype=torch.float32)
    # some families have frequencies for each kind of block there is
    real.rotary_emb = type(real.rotary_emb)(config)
    real.to(device_config.device)
    with torch.device("meta"):
        # a decoder notes what kinds of block it has as it is built
        decoder = AutoModel.from_config(config, dtype=device_config.dtype)
    for name, child in real.named_children():
        if name != "layers":
            setattr(decoder, name, child)
    for child in decoder.layers.modules():
        if type(child) is nn.Linear:
            child.__class__ = FrozenLinear
            # the line above has made it a FrozenLinear
            child.ops = device_config.ops  # type: ignore[assignment]
    table = checkpoint.embedding_rows(None if vocab_ids is None else torch.from_numpy(vocab_ids))
    decoder.embed_tokens.weight = nn.Parameter(table.to(device_config.device, device_config.dtype), requires_grad=False)
    return decoder.requires_grad_(False).eval()


def _config(checkpoint: Checkpoint, blocks: int) -> typing.Any:
    config = type(checkpoint.config)(**checkpoint.config.to_dict())
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(checkpoint.config.layer_types[:blocks])
    # it describes the checkpoint's files, which are dequantised as they are read
    config.quantization_config = None
    # a placeholder row, until the kept rows replace it
    config.vocab_size, config.pad_token_id = 1, None
    # SDPA has no soft-capping: Gemma 2 needs the eager form
    config._attn_implementation = "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"
    return config


def load_block(checkpoint: Checkpoint, block: nn.Module, index: int, device_config: DeviceConfig) -> None:
    """Read block ``index`` of the checkpoint into ``block``, frozen; packed NF4 weights only where the ops compute from them."""
    linear = {f"{path}.weight" for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    for full, (local, parameter) in block_tensors(block, index).items():
        # one by one: as long as a tensor of a file is held, all of the file that was read counts as this process's memory
        tensor = checkpoint.read({full: tuple(parameter.shape)})[full]
        owner, _, leaf = local.rpartition(".")
        module = block.get_submodule(owner)
        # a registered parameter's place takes no packed weight
        delattr(module, leaf)
        setattr(module, leaf, _placed(tensor, device_config, local in linear))
        del tensor
    return_freed_memory()


def use_eager_attention(decoder: "Decoder") -> None:
    """Use eager attention (QKᵀ, softmax, PV) instead of SDPA, from now on; it holds the bins' probabilities, width × width for each head.

    For small bins in bf16 on a CPU SDPA takes three times as long.
    """
    # the blocks read it at each call
    decoder.config._attn_implementation = "eager"


def load_norm(checkpoint: Checkpoint, decoder: "Decoder", device_config: DeviceConfig) -> None:
    """Read the final norm into ``decoder``, frozen."""
    tensors = checkpoint.read({"norm.weight": tuple(decoder.norm.weight.shape)})
    decoder.norm.weight = _placed(tensors["norm.weight"], device_config, linear=False)


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


def block_tensors(block: nn.Module, index: int) -> dict[str, tuple[str, nn.Parameter]]:
    """A block's parameters by name in the checkpoint: name -> (name in the block, parameter)."""
    return {f"layers.{index}.{local}": (local, parameter) for local, parameter in block.named_parameters()}


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
    for index, block in enumerate(decoder.layers):
        load_block(checkpoint, block, index, device_config)
    load_norm(checkpoint, decoder, device_config)
    return decoder


@contextlib.contextmanager
def capture_output(block: nn.Module) -> Iterator[list[Tensor]]:
    """Capture the outputs of ``block`` by a forward hook while the context is open; the hook is removed whatever happens inside."""
    states = []
    handle = block.register_forward_hook(lambda module, arguments, output: states.append(output))
    try:
        yield states
    finally:
        handle.remove()


def run_hooked(decoder: "Decoder", batch: Batch, layer: int) -> Tensor:
    """Hidden state ``layer`` of each node, [T, D] as from ``run``, out of a pass through all blocks."""
    with capture_output(decoder.layers[layer - 1]) as states:
        run(decoder, batch)
    return states[0].flatten(0, 1)


def enable_gradient_checkpointing(decoder: "Decoder") -> None:
    """Gradient checkpointing: keep of each block only its input, from now on, and recompute the rest in the backward pass.

    Gradients are those without it: dropout is a function of its step's seed, so it drops the same entries again. (transformers'
    own switch changes its name and its place among the hooks from version to version, and its reentrant form loses the gradients
    of adapters above frozen embeddings.)
    """
    for block in decoder.layers:
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
