"""One training step, three ways: tli's, and two that a careful user of peft and transformers would write.

    tli              the first L blocks on the trie of the words, through the library as ``tli.train`` uses it
    peft-truncated   transformers' model of L blocks with peft's LoRA, on padded words
    peft-hook        transformers' whole model with peft's LoRA in its first L blocks, on padded words; a forward hook takes
                     the state behind block L and the forward runs on to the end, as the paper's did

All take the same pairs, drawn at random from the list (in its alphabetical order neighbours share beginnings, which would
flatter the trie), in fp32 with the same adapters, token norm, pooling without BOS, loss, clipping and AdamW. A step goes from
token numbers to changed adapters, so it pays for packing, or padding, too.

The peers have what speeds them up without changing the method: no key-value cache, the attention that transformers
chooses (SDPA), sources and targets in one forward pass, padding to the longest word of the batch only, no language-model head.
peft-hook is not told that the blocks behind L need no graph; the paper's forward was not, either.
"""

import logging
import warnings
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tli import lexicon
from tli.config import TrainConfig
from tli.errors import TliError
from tli.pairs import Pair
from tli.starter import starter_folder


def drawn_pairs(config: TrainConfig) -> tuple[list[Pair], list[Pair]]:
    """The batch, ``config.batch`` random pairs of the list, and the rest of the list."""
    pairs = lexicon.read_pairs(config.pairs, config.source, config.target)
    if len(pairs) < config.batch:
        raise TliError("--batches", f"the list must have as many pairs as a batch, {config.batch}", len(pairs), "choose smaller batches")
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    return [pairs[i] for i in order[: config.batch]], [pairs[i] for i in order[config.batch :]]


class Subject:
    """A way to train: a model with adapters, its batch and its optimiser."""

    name: str
    config: TrainConfig

    @staticmethod
    def imports() -> None:
        """Import all that the subject needs."""
        raise NotImplementedError

    def loss(self) -> Tensor:
        """The loss of the batch, from token numbers on."""
        raise NotImplementedError

    def adapters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """A [R, K] and B [N, R] by the path of the linear layer in the decoder: ``layers.0.self_attn.q_proj``."""
        raise NotImplementedError

    def start_from(self, start: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Give the adapters these values."""
        mine = self.adapters()
        if mine.keys() != start.keys():
            raise TliError(self.name, f"the adapters must sit in {len(start)} modules", f"{len(mine)} others", "compare the targets")
        with torch.no_grad():
            for path, factors in mine.items():
                for own, value in zip(factors, start[path], strict=True):
                    own.copy_(value)

    def step(self) -> float:
        """Take one step of the optimiser, as ``tli.train`` does; returns the loss before it."""
        loss = self.loss()
        value = loss.item()
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimiser.step()
        return value

    def _optimise(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.optimiser = torch.optim.AdamW(self.parameters, lr=self.config.lr, weight_decay=self.config.weight_decay)


class Tli(Subject):
    """The library itself. Its embedding keeps the rows of the whole list, as in training."""

    name = "tli"

    @staticmethod
    def imports() -> None:
        import transformers.models.llama.modeling_llama  # noqa: F401

        import tli.train  # noqa: F401

    def __init__(self, config: TrainConfig):
        from tli import lora, ops
        from tli.batches import EpochBatches
        from tli.checkpoint import open_checkpoint
        from tli.first_block import tabulate
        from tli.objective import Objective, pooling
        from tli.packing import tokenise
        from tli.truncated import place, truncate

        self.config = config
        batch, rest = drawn_pairs(config)
        checkpoint = open_checkpoint(config.model or str(starter_folder()))
        texts = [pair.source for pair in batch + rest] + [pair.target for pair in batch + rest]
        words = tokenise(checkpoint.tokenizer(), texts, checkpoint.config.max_position_embeddings, config.prefix)
        placement = place("cpu", "float32", config.weights)
        ops.choose(config.impl, placement.dtype, placement.device)
        self.decoder = truncate(checkpoint, config.layer, words.rows, placement).train()
        tabulate(self.decoder)
        lora.inject(self.decoder, lora.LoRAConfig(rank=config.rank, alpha=config.alpha, targets=config.targets), seed=config.seed)
        self.pool = pooling("final", checkpoint, placement.device)
        self.objective = Objective(config.loss, config.temperature, config.margin)
        # the pairs that are trained are the batch, so an epoch is one batch, packed anew each time
        self.batches = EpochBatches(config, words, np.arange(len(batch)), batch, placement)
        self.epoch = 0
        self._optimise(lora.trainable(self.decoder))

    def loss(self) -> Tensor:
        from tli.truncated import run

        (((batch,), same),) = self.batches.epoch(self.epoch)
        self.epoch += 1
        return self.objective(self.pool(run(self.decoder, batch), batch), same)

    def adapters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        from tli.lora import adapters

        return {path: (adapter.lora_A, adapter.lora_B) for path, adapter in adapters(self.decoder).items()}


class _Peft(Subject):
    """What the two peers share: the words, the adapters and the loss."""

    @staticmethod
    def imports() -> None:
        # bitsandbytes, which peft imports, announces that an optional package is absent
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

    def __init__(self, config: TrainConfig):
        import transformers

        self.imports()
        # a model of fewer blocks than its checkpoint lists every weight that it leaves alone
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.config = config
        folder = config.model or str(starter_folder())
        batch, _ = drawn_pairs(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        texts = [config.prefix + word for word in [pair.source for pair in batch] + [pair.target for pair in batch]]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        self.tokens = [torch.tensor([tokenizer.bos_token_id, *word]) for word in encoded["input_ids"]]
        # neither BOS nor a token of the prefix alone is pooled
        self.own = [torch.tensor([False, *(end > len(config.prefix) for _, end in spans)]) for spans in encoded["offset_mapping"]]
        self.same = torch.zeros(len(batch), len(batch), dtype=torch.bool)
        self.same[tuple(lexicon.same_meaning(batch).T)] = True
        self._build(transformers.AutoModel, folder)
        self.norm.requires_grad_(False)
        self.model.train()
        self._optimise(parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def _build(self, auto_model, folder: str) -> None:
        """Set ``model``, with adapters, and ``norm``, its final norm."""
        raise NotImplementedError

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden state L of padded words [2B, longest]: [2B, longest, D]."""
        raise NotImplementedError

    def _with_adapters(self, model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        # a list of names would not do: layers_to_transform looks for blocks below a ForCausalLM's name for the decoder
        linear = [f"layers.{path}" for path, module in model.layers[: self.config.layer].named_modules() if isinstance(module, nn.Linear)]
        lora = LoraConfig(r=self.config.rank, lora_alpha=self.config.alpha, lora_dropout=self.config.dropout, target_modules=linear)
        with warnings.catch_warnings():
            # peft still asks transformers for an attribute by its old name
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, lora)

    def loss(self) -> Tensor:
        input_ids = nn.utils.rnn.pad_sequence(self.tokens, batch_first=True)
        lengths = torch.tensor([len(word) for word in self.tokens])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        states = self.norm(self._states(input_ids, attention_mask))
        pooled = nn.utils.rnn.pad_sequence(self.own, batch_first=True)
        means = (states * pooled[:, :, None]).sum(dim=1) / pooled.sum(dim=1, keepdim=True)
        source, target = F.normalize(means, dim=-1).chunk(2)
        logits = (source @ target.T / self.config.temperature).masked_fill(self.same, float("-inf"))
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def adapters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        from peft.tuners.lora import LoraLayer

        layers = {path: module for path, module in self.model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
        return {path: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for path, layer in layers.items()}


class PeftTruncated(_Peft):
    """The model of L blocks; its final norm is taken off, since hidden state L lies before it."""

    name = "peft-truncated"

    def _build(self, auto_model, folder: str) -> None:
        model = auto_model.from_pretrained(folder, num_hidden_layers=self.config.layer, dtype=torch.float32)
        self.norm, model.norm = model.norm, nn.Identity()
        self.model = self._with_adapters(model)

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


class PeftHook(_Peft):
    """The whole model, and a hook on the last block that is wanted."""

    name = "peft-hook"

    def _build(self, auto_model, folder: str) -> None:
        model = auto_model.from_pretrained(folder, dtype=torch.float32)
        self.norm = model.norm
        model.layers[self.config.layer - 1].register_forward_hook(self._take)
        self.model = self._with_adapters(model)

    def _take(self, block: nn.Module, arguments: tuple, output: Tensor) -> None:
        self.taken = output

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        taken, self.taken = self.taken, None
        return taken


class PeftBitsandbytes(PeftHook):
    """The same with all weights in bitsandbytes' NF4, made ready as peft's guide to quantised models says: what the paper ran.

    It computes in fp32, in which a CPU multiplies fastest, and keeps its activations: checkpointing would only cost time.
    """

    name = "peft-bitsandbytes"

    def _build(self, auto_model, folder: str) -> None:
        from peft import prepare_model_for_kbit_training
        from transformers import BitsAndBytesConfig

        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = auto_model.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32, device_map="cpu")
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        self.norm = model.norm
        model.layers[self.config.layer - 1].register_forward_hook(self._take)
        self.model = self._with_adapters(model)


SUBJECTS = {subject.name: subject for subject in (Tli, PeftTruncated, PeftHook)}
