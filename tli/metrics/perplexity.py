"""What an adapter does to the language model it sits in: perplexity on a text, and how far its next-token distributions moved.

    perplexity        exp( mean over tokens of -log p(token | what stands before it in its window) )
    KL                mean over positions of  sum_v p(v) · log( p(v) / q(v) )      p: base, q: with the adapter; in nats
    total variation   mean over positions of  1/2 sum_v |p(v) - q(v)|              the largest change of any event's probability

Both streams, base and adapter, go through all blocks together, one block in memory at a time, then through the final norm and
the language model's head a few positions at a time; logits and all that comes of them are fp32. Tokens of one window are not
independent, so the intervals resample whole windows.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tli.model.checkpoint import HEADS, Checkpoint
from tli.model.hidden_states import stream_layers
from tli.model.lora import Adapter
from tli.model.text_windows import TextWindows, windows_batch
from tli.runtime import ops
from tli.runtime.device import DeviceConfig
from tli.stats.bootstrap import means_with_intervals
from tli.stats.tests import compare_paired

# positions whose logits are held at a time
_CHUNK_POSITIONS = 128
_HEAD_ROWS = 16384


@dataclasses.dataclass(frozen=True)
class NextTokens:
    """One stream's predictions at P positions, window after window: fp64 [P] each.

    nll               -log p(the token that follows), in nats
    kl                KL(base || this stream)
    total_variation   1/2 sum |base - this stream|
    """

    nll: np.ndarray
    kl: np.ndarray
    total_variation: np.ndarray


@torch.no_grad()
def predict(
    checkpoint: Checkpoint,
    windows: TextWindows,
    device_config: DeviceConfig,
    adapters: Sequence[Adapter],
    done: Callable[[], None] = lambda: None,
) -> tuple[list[NextTokens], str | None]:
    """Predict every token of the windows from those before it, by the base and with each adapter.

    Args:
        checkpoint:     an open checkpoint
        windows:        the text
        device_config:  dtype, device and rounding of the weights
        adapters:       what the base is compared with
        done:           called after each layer, and after each window at the head

    Returns:
        The base's predictions, then each adapter's; or, where shards are absent or the model has no head, none, and why.
    """
    if head_name(checkpoint) is None:
        return [], f"{checkpoint.name} has no head (lm_head.weight), as a model that was made for embeddings"
    outputs: list[Tensor] = []

    def visit(layer: int | str, states: Sequence[Tensor]) -> None:
        if layer == "output":
            outputs.extend(states)
        done()

    reason = stream_layers(checkpoint, windows_batch(windows, device_config), windows.vocab_ids, device_config, [None, *adapters], visit)
    if reason is not None:
        return [], reason
    head = read_head(checkpoint, device_config)
    width = windows.tokens.shape[1]
    parts: list[list[Tensor]] = [[] for _ in outputs]
    for window, length in enumerate(windows.lengths):
        following = torch.from_numpy(windows.vocab_ids[windows.tokens[window, 1:length]]).to(device_config.device)
        positions = torch.arange(window * width, window * width + length - 1, device=device_config.device)
        for at, truth in zip(positions.split(_CHUNK_POSITIONS), following.split(_CHUNK_POSITIONS)):
            base = probabilities = None
            for stream, states in zip(parts, outputs):
                logs = log_probabilities(states[at], head, checkpoint.config, device_config.ops.linear)
                if base is None or probabilities is None:
                    base, probabilities = logs, logs.exp()
                moved = (probabilities * (base - logs)).sum(1), (probabilities - logs.exp()).abs().sum(1) / 2
                stream.append(torch.stack([-logs.gather(1, truth[:, None])[:, 0], *moved]).double().cpu())
        done()
    return [NextTokens(*torch.cat(stream, dim=1).numpy()) for stream in parts], None


def harm(predictions: Sequence[NextTokens], windows: TextWindows, seed: int) -> dict:
    """The means of ``predict``'s numbers with 95 % intervals over windows: for the base, and for each adapter in turn.

    With a single window no interval can be had: low and high are None.
    """
    owner = np.repeat(np.arange(len(windows.lengths)), windows.lengths - 1)
    base, *adapted = predictions
    records = []
    for stream in adapted:
        change = compare_paired(base.nll[None], stream.nll[None], seed, owner)[0]
        records.append(
            {
                "perplexity": _perplexity(stream, owner, seed),
                "perplexity_ratio": {
                    **{end: _exp(change[key]) for end, key in (("value", "mean_gain"), ("low", "low"), ("high", "high"))},
                    "p_sign_flip": change["p_sign_flip"],
                },
                "kl": _mean(stream.kl, owner, seed),
                "total_variation": _mean(stream.total_variation, owner, seed),
            }
        )
    return {"text": windows.facts, "before": {"perplexity": _perplexity(base, owner, seed)}, "after": records}


def _mean(values: np.ndarray, owner: np.ndarray, seed: int) -> dict:
    found = means_with_intervals(values[None], seed, owner)[0]
    return {key: found[key] for key in ("value", "low", "high")}


def _perplexity(stream: NextTokens, owner: np.ndarray, seed: int) -> dict:
    return {end: _exp(value) for end, value in _mean(stream.nll, owner, seed).items()}


def _exp(value: float | None) -> float | None:
    # a model that is broken enough would overflow
    return None if value is None else math.exp(min(value, 700.0))


def head_name(checkpoint: Checkpoint) -> str | None:
    """Which tensor turns normed states into logits, the embedding table where the two are tied; None for a model without a head."""
    if checkpoint.config.tie_word_embeddings:
        return checkpoint.prefix + checkpoint.embedding
    return next((name for name in checkpoint.shard_of if name.endswith(HEADS)), None)


def read_head(checkpoint: Checkpoint, device_config: DeviceConfig) -> Tensor:
    """The weight [V, D] that turns normed states into logits."""
    name = head_name(checkpoint)
    # whoever reads a head has asked for its name
    assert name is not None
    if name == checkpoint.prefix + checkpoint.embedding:
        weight = checkpoint.embedding_rows(None)
    else:
        shape = (checkpoint.config.vocab_size, checkpoint.config.hidden_size)
        # the head stands outside the decoder, whose prefix the names otherwise have
        weight = dataclasses.replace(checkpoint, prefix="").read({name: shape})[name]
    if isinstance(weight, ops.NF4Weight):
        weight = ops.dequantise(weight, device_config.dtype)
    return weight.to(device_config.device, device_config.dtype)


def log_probabilities(states: Tensor, head: Tensor, config: typing.Any, linear: Callable[..., Tensor]) -> Tensor:
    """log softmax of the logits, fp32 [positions, V]; by the model's ``config`` Granite's are divided, Cohere's multiplied, and
    Gemma 2's soft-capped."""
    logits = torch.cat([linear(states.float(), rows.float()) for rows in head.split(_HEAD_ROWS)], dim=1)
    logits = logits / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(dim=1)
