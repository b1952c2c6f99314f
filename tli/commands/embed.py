"""Embeddings of words: the vectors that training aligns, from the base model or from one with its adapter."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tli.config import TrainConfig
from tli.data.batch import to_batch
from tli.data.packing import tokenise
from tli.model import starter
from tli.model.checkpoint import context_length, open_checkpoint
from tli.model.decoder import load_full_decoder, load_truncated_decoder, run
from tli.model.linear_map import load_map
from tli.model.pooling import Pooling, resolve_token_norm
from tli.model.shape import Layer
from tli.model.trained_adapter import check_compatible, load_adapter
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError

_WORDS_AT_ONCE = 1024
# where neither an adapter nor the caller names one
_LAYER = 2


def embed(
    words: Sequence[str],
    adapter: str | os.PathLike | None = None,
    layer: Layer | None = None,
    model: str | None = None,
    device: str = "auto",
    map: str | os.PathLike | None = None,
    language: str | None = None,
) -> Tensor:
    """u_b = normalise(mean over the word's own tokens of norm(h_t)): embeddings of words at a hidden layer.

    Words are read as in the adapter's training (its prefix, token norm and NF4 rounding, recorded in the report beside it), else with
    the defaults of training. Only the blocks below the layer are read and computed.

    Args:
        words:    B words, at least one
        adapter:  folder of a PEFT adapter; None for the base model
        layer:    hidden state L, or "output" for the last one after the final norm (default: where the adapter was trained, else 2)
        model:    local folder or hub name (default: the adapter's own, else the starter)
        device:   cpu, cuda, cuda:N; auto: a GPU if there is one
        map:      folder of a map from ``fit_map``, by which the base model's states of two languages are made alike; in place of an adapter
                  and a layer, which it decides
        language: the language of these words, one of the two names of the training or the fit. With it they go through the map beside an
                  adapter, too

    Returns:
        fp32 [B, D] unit rows on the CPU, in the order of the words; their dot products are cosines. With a map [B, K], its dimensions.

    Raises:
        TliError: no words, a word without tokens or longer than the context, an adapter or a map that does not fit the model, a layer out
            of range, a map with an adapter or without a language, a language without a map.

    Example:
        >>> import tli
        >>> source, target = tli.embed(["maji"]), tli.embed(["water", "fire"])
        >>> (source @ target.T).shape
        torch.Size([1, 2])
    """
    if isinstance(words, str) or not len(words):
        raise TliError("embed", "the words must be a list of one word or more", repr(words), "give a list")
    trained = None if adapter is None else load_adapter(adapter)
    fitted = None if map is None else load_map(map)
    defaults = TrainConfig()

    def option(name: str):
        default = getattr(defaults, name)
        if fitted is not None:
            return fitted.report["config"].get(name, default)
        return default if trained is None else trained.option(name, default)

    if fitted is not None:
        if trained is not None or layer is not None:
            raise TliError("embed", "a map decides layer and model", "an adapter or a layer beside it", "leave these out")
        layer, model = fitted.report["map"]["layer"], model or option("model")
    used = fitted
    if language is not None and trained is not None:
        used = trained.fitted
        if used is None or layer not in (None, used.report["map"]["layer"]):
            got = "no map beside it" if used is None else f"layer {layer}"
            raise TliError("embed", "words go through the map of an adapter at its own layer", got, "leave language or layer out")
    if (used is not None or language is not None) and language not in (option("source"), option("target")):
        must = f"the language of words for a map must be {option('source')} or {option('target')}"
        raise TliError("embed", must, repr(language), "name one with language=")
    if language is not None and used is None:
        raise TliError("embed", "a language must have a map", "none", "name a map or an adapter, or leave the language out")
    if layer is None:
        layer = _LAYER if trained is None else "output" if option("arm") == "full" else trained.layer
    checkpoint = open_checkpoint(starter.locate(model or (starter.NAME if trained is None else trained.model_name())))
    device_config = resolve_device(device, "auto", option("weights"), "auto")
    if trained is not None:
        check_compatible(trained, checkpoint, device_config, checkpoint.sha256)
    if fitted is not None and fitted.report["model"]["sha256"] != checkpoint.sha256(layer):
        must = f"the model must be the one that the map was fitted on, {fitted.report['model']['name']}"
        raise TliError(checkpoint.name, must, "other weights", "name that one with model=, or fit a map for this one")
    tokens = tokenise(checkpoint.tokenizer(), words, context_length(checkpoint), option("prefix"))
    at_output = layer == "output"
    decoder = (
        load_full_decoder(checkpoint, tokens.vocab_ids, device_config)
        if at_output
        else load_truncated_decoder(checkpoint, int(layer), tokens.vocab_ids, device_config)
    )
    if trained is not None:
        trained.adapter.attach(decoder)
    token_norm = resolve_token_norm(option("token_norm"), checkpoint)
    pool = Pooling.from_checkpoint(token_norm, checkpoint, device_config.device, device_config.ops).for_layer(layer)
    vectors = []
    for chunk in np.array_split(np.arange(len(words)), -(-len(words) // _WORDS_AT_ONCE)):
        batch = to_batch(tokens.pack(chunk, option("eval_pool_bos")), device_config.dtype, device_config.device)
        # not around the whole function: what the processor can do is tried with a backward pass, too
        with torch.no_grad():
            vectors.append(pool(run(decoder, batch), batch).cpu())
    found = torch.cat(vectors)
    if used is None:
        return found
    side = used.linear.of_source if language == option("source") else used.linear.of_target
    return torch.nn.functional.normalize(torch.from_numpy(side(found.double().numpy())), dim=1).float()
