"""The protocol's controls: a model with random weights, a null model of random vectors, and adapters that no gradient reaches."""

import functools
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tli.data.loader import BatchLoader
from tli.data.packing import TokenisedWords
from tli.data.pair_store import Pair
from tli.metrics.layer_pass import tokenise_pairs
from tli.model import lora
from tli.model.checkpoint import Checkpoint
from tli.model.decoder import build_decoder, run, run_hooked
from tli.model.pooling import Pooling
from tli.runtime.device import resolve_device
from tli.runtime.files import atomic_folder, write_manifest
from tli.training.loss import Objective
from tli.training.step import OptimiserSettings, TrainStep

_CHECKED_STEPS = 8


def save_random_model(checkpoint: Checkpoint, folder: pathlib.Path, seed: int) -> None:
    """Write to ``folder`` a checkpoint of the same architecture and tokenizer, with freshly initialised weights.

    They are transformers' own initialisation, with the config's ``initializer_range``. The folder is complete or absent.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    settings = {name: value for name, value in checkpoint.config.to_dict().items() if name != "quantization_config"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(type(checkpoint.config)(**settings), dtype=torch.float32, trust_remote_code=False)
    # a bar of its own would break ours
    logging.disable_progress_bar()
    with atomic_folder(folder, "--output") as building:
        model.to(torch.bfloat16).save_pretrained(building)
        checkpoint.tokenizer().save_pretrained(building)
        write_manifest(building)


def sink_only(words: TokenisedWords, width: int, length: float, seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Words whose tokens are random directions of length 1, pooled with one shared vector: cos = k² / √((k² + m)(k² + n)).

    words    how many tokens each has; sources first, then targets
    width    D
    length   k, of the shared vector

    m and n are the tokens of the two words; random directions are at right angles on average. Nothing in it knows which pairs
    are true.

    Returns:
        Word vectors of sources and targets, fp64 [B, D] each, and the formula's cosine of each pair, float64 [B].
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.from_numpy(words.lengths - words.starts).double()
    own = torch.nn.functional.normalize(torch.randn(len(tokens), width, dtype=torch.float64, generator=generator), dim=1)
    sink = torch.nn.functional.normalize(torch.randn(width, dtype=torch.float64, generator=generator), dim=0)
    # m directions at right angles are √m long together
    source, target = (own * tokens.sqrt()[:, None] + length * sink).chunk(2)
    m, n = tokens.view(2, -1)
    return source, target, (length**2 / ((length**2 + m) * (length**2 + n)).sqrt()).numpy()


def adapters_everywhere(options: dict, checkpoint: Checkpoint, pairs: Sequence[Pair]) -> dict:
    """Whether adapters in all blocks learn what those below the layer do: some steps of both, from the same start.

    The whole model, with a hook at the layer and adapters in every block, takes the truncated model's steps. No gradient reaches the
    adapters above the layer, so their B stays 0, and nothing that the layer's state depends on differs.

    Args:
        options:     of ``tli.train``
        checkpoint:  an open checkpoint
        pairs:       to take the steps on, at the peak rate

    Returns:
        The numbers of steps and of parameters, how many adapters above had a gradient or a B that is not 0, and whether all
        losses and all factors below are equal to the last bit.
    """
    layer = options["layer"]
    adapter = lora.LoRAConfig(**{name: options[name] for name in ("rank", "alpha", "targets", "dropout", "rslora", "init")})
    device_config = resolve_device(options["device"], options["dtype"], options["weights"], options["impl"])
    objective = Objective(options["loss"], options["temperature"], options["margin"], device_config.ops)
    pool = Pooling.from_checkpoint(options["token_norm"], checkpoint, device_config.device, device_config.ops)
    words, optimiser = tokenise_pairs(checkpoint, options["prefix"], pairs), OptimiserSettings(options["lr"], options["weight_decay"])
    steps = max(1, min(_CHECKED_STEPS, len(pairs) // options["batch"]))
    taught = pairs[: steps * options["batch"]]
    batches = BatchLoader(words, taught, device_config, batch=options["batch"], pool_bos=options["pool_bos"], seed=options["seed"])

    def trained(arm: str) -> tuple[dict[str, lora.LoRALinear], list[float]]:
        decoder = build_decoder(checkpoint, words.vocab_ids, device_config, arm=arm, layer=layer).train()
        lora.inject(decoder, adapter, range(layer) if arm == "early" else None, options["seed"])
        states = run if arm == "early" else functools.partial(run_hooked, layer=layer)
        # above the layer no adapter has a gradient: that is what is to be shown
        step = TrainStep(
            decoder, lambda part: pool(states(decoder, part), part), objective, optimiser, options["seed"], check_gradients=False
        )
        for position, batch in enumerate(batches.steps()):
            step(position, *batch)
        return step.adapters, [result.loss for result in step.pop_results(wait=True)]

    (below, losses), (everywhere, other_losses) = trained("early"), trained("full-hook")
    factors = [(getattr(below[path], name), getattr(everywhere[path], name)) for path in below for name in ("lora_A", "lora_B")]
    above = [everywhere[path] for path in everywhere if path not in below]
    return {
        "steps": steps,
        "parameters_below": sum(mine.numel() for mine, _ in factors),
        "parameters": sum(factor.numel() for module in everywhere.values() for factor in (module.lora_A, module.lora_B)),
        "adapters_above": len(above),
        "learning_above": sum(module.lora_B.grad is not None or bool(module.lora_B.any()) for module in above),
        "equal_below": losses == other_losses and all(torch.equal(*pair) for pair in factors),
    }
