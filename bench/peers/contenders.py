"""One training step, four ways: tli's, and three that a careful user of other libraries would write.

    tli                    the first L blocks on the trie of the words, through the library as ``tli.train`` uses it
    peft-truncated         transformers' model of L blocks with peft's LoRA, on padded words
    peft-hook              transformers' whole model with peft's LoRA in its first L blocks, on padded words; a forward hook takes
                           the state behind block L and the forward runs on to the end, as the paper's did
    sentence-transformers  its modules over transformers' model of L blocks, with its in-batch loss both ways, on padded words

All take the same pairs, drawn at random from the list (in its alphabetical order neighbours share beginnings, which would
flatter the trie), with the same adapters, token norm, pooling without BOS, loss, clipping and AdamW. A step goes from token
numbers to changed adapters, so it pays for packing, or padding, too. Device and dtype are those of ``TrainConfig``; below float32 the
adapters of all stay in float32.

The peers have what speeds them up without changing the method: no key-value cache, the attention that transformers
chooses (SDPA), sources and targets in one forward pass, padding to the longest word of the batch only, no language-model head.
peft-hook is not told that the blocks behind L need no graph; the paper's forward was not, either. sentence-transformers cannot leave
out a pair that is no negative, so where it takes part no two pairs of the batch may mean the same (``drawn_pairs``).
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import chosen
from tli.config import TrainConfig
from tli.data import word_pairs
from tli.model.starter import starter_folder
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError


def drawn_pairs(config: TrainConfig, distinct: bool = False) -> tuple[list[word_pairs.Pair], list[word_pairs.Pair]]:
    """The batch, ``config.batch`` random pairs of the list, no two of which mean the same if ``distinct``; and the rest of the list."""
    pairs = word_pairs.read_pairs(config.pairs, config.source, config.target)
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    chosen = (distinct_pairs(pairs, order) if distinct else order)[: config.batch]
    if len(chosen) < config.batch:
        must = f"the list must have as many pairs{' of different meaning' if distinct else ''} as a batch, {config.batch}"
        raise TliError("--batches", must, len(chosen), "choose smaller batches")
    rest = set(order.tolist()).difference(chosen.tolist())
    return [pairs[i] for i in chosen], [pairs[i] for i in sorted(rest)]


def distinct_pairs(pairs: list[word_pairs.Pair], order: np.ndarray) -> np.ndarray:
    """Of the numbers in ``order`` those whose pair means the same as no earlier one of them."""
    alike: dict[int, set[int]] = {}
    for i, j in word_pairs.false_negative_pairs(pairs).tolist():
        alike.setdefault(i, set()).add(j)
    taken: set[int] = set()
    for number in order.tolist():
        if taken.isdisjoint(alike.get(number, ())):
            taken.add(number)
    return np.array([number for number in order.tolist() if number in taken], np.int64)


class Contender:
    """A way to train: a model with adapters, its batch and its optimiser.

    Args:
        config:    the run's options; ``dtype`` auto is float32 on a CPU
        distinct:  draw a batch in which no two pairs mean the same
    """

    name: str
    package: str | None = None
    config: TrainConfig

    @classmethod
    def installed(cls) -> bool:
        """Whether the package that the contender needs, beyond those of the tests, is there."""
        return cls.package is None or importlib.util.find_spec(cls.package) is not None

    @staticmethod
    def imports() -> None:
        """Import all that the contender needs."""
        raise NotImplementedError

    def loss(self) -> Tensor:
        """The loss of the batch, from token numbers on."""
        raise NotImplementedError

    def adapters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """A [R, K] and B [N, R] by the path of the linear layer in the decoder: ``layers.0.self_attn.q_proj``."""
        raise NotImplementedError

    def step(self) -> float:
        """Take one step of the optimiser, as ``tli.train`` does; returns the loss before it."""
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


class Tli(Contender):
    """The library itself. Its embedding keeps the rows of the whole list, as in training."""

    name = "tli"

    @staticmethod
    def imports() -> None:
        import transformers.models.llama.modeling_llama  # noqa: F401

        import tli.commands.train  # noqa: F401

    def __init__(self, config: TrainConfig, distinct: bool = False):
        from tli.data.loader import BatchLoader
        from tli.data.packing import tokenise
        from tli.model import lora
        from tli.model.checkpoint import context_length, open_checkpoint
        from tli.model.decoder import build_decoder, run
        from tli.model.pooling import Pooling, resolve_token_norm
        from tli.training.loss import Objective
        from tli.training.step import OptimiserSettings, TrainStep

        self.config = config
        batch, rest = drawn_pairs(config, distinct)
        checkpoint = open_checkpoint(config.model or str(starter_folder()))
        texts = [pair.source for pair in batch + rest] + [pair.target for pair in batch + rest]
        words = tokenise(checkpoint.tokenizer(), texts, context_length(checkpoint), config.prefix)
        device_config = resolve_device(config.device, config.dtype, config.weights, config.impl)
        self.decoder = build_decoder(
            checkpoint, words.vocab_ids, device_config, arm=config.arm, layer=config.layer, checkpointing=config.checkpointing
        )
        lora.inject(self.decoder, lora.LoRAConfig(rank=config.rank, alpha=config.alpha, targets=config.targets), seed=config.seed)
        self.pool = Pooling.from_checkpoint(
            resolve_token_norm(config.token_norm, checkpoint), checkpoint, device_config.device, device_config.ops
        )
        # the pairs that are trained are the batch, so an epoch is one batch, packed anew each time
        sampling = {"epochs": config.epochs, "micro_batch": config.micro_batch, "pool_bos": config.pool_bos, "seed": config.seed}
        self.batches = BatchLoader(words, batch, device_config, batch=config.batch, **sampling)
        vectors = lambda part: self.pool(run(self.decoder, part), part)  # noqa: E731
        objective = Objective(config.loss, config.temperature, config.margin, device_config.ops)
        optimiser = OptimiserSettings(config.lr, config.weight_decay, config.clip, config.warmup, config.schedule, self.batches.total)
        self.stepper = TrainStep(self.decoder, vectors, objective, optimiser, config.seed)
        self.parameters = self.stepper.parameters
        self.decoder.train()
        self.taken = 0

    def loss(self) -> Tensor:
        (((batch,), false_negatives),) = self.batches.epoch(self.taken)
        return self.stepper.objective(self.stepper.embed(batch), false_negatives)

    def step(self) -> float:
        ((parts, false_negatives),) = self.batches.epoch(self.taken)
        self.stepper(self.taken, parts, false_negatives)
        self.taken += 1
        (result,) = self.stepper.pop_results(wait=True)
        return result.loss

    def nodes(self) -> int:
        """How many tokens, padding of the bins included, go through the model in a step."""
        return sum(part.input_ids.numel() for part in next(self.batches.epoch(0))[0])

    def adapters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        return {path: (adapter.lora_A, adapter.lora_B) for path, adapter in self.stepper.adapters.items()}


class _Peer(Contender):
    """What the peers share: the words, the adapters' places, and a step of the optimiser."""

    def __init__(self, config: TrainConfig, distinct: bool = False):
        import transformers

        self.imports()
        # a model of fewer blocks than its checkpoint lists every weight that it leaves alone
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.config = config
        device_config = resolve_device(config.device, config.dtype)
        self.device, self.dtype = device_config.device, device_config.dtype
        folder = config.model or str(starter_folder())
        batch, _ = drawn_pairs(config, distinct)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        texts = [config.prefix + word for word in [pair.source for pair in batch] + [pair.target for pair in batch]]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        self.tokens = [torch.tensor([tokenizer.bos_token_id, *word]) for word in encoded["input_ids"]]
        # neither BOS nor a token of the prefix alone is pooled
        self.own = [torch.tensor([False, *(end > len(config.prefix) for _, end in spans)]) for spans in encoded["offset_mapping"]]
        self.false_negatives = torch.zeros(len(batch), len(batch), dtype=torch.bool)
        self.false_negatives[tuple(word_pairs.false_negative_pairs(batch).T)] = True
        self.false_negatives = self.false_negatives.to(self.device)
        self._build(folder)
        self.model.train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        fused = {"fused": True} if self.device.type == "cuda" else {}
        self.optimiser = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay, **fused)

    def _build(self, folder: str) -> None:
        """Set ``model``, with adapters."""
        raise NotImplementedError

    def _lora(self, linear: Iterable[str]):
        """peft's configuration of adapters in those of these layers that ``config.targets`` names."""
        from peft import LoraConfig

        names = None if self.config.targets == "all-linear" else self.config.targets.split(",")
        paths = [path for path in linear if names is None or path.rpartition(".")[2] in names]
        return LoraConfig(r=self.config.rank, lora_alpha=self.config.alpha, lora_dropout=self.config.dropout, target_modules=paths)

    def _padded(self, words: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Token numbers and attention mask [words, longest], on the device."""
        input_ids = nn.utils.rnn.pad_sequence(words, batch_first=True)
        lengths = torch.tensor([len(word) for word in words])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        return input_ids.to(self.device), attention_mask.to(self.device)

    def step(self) -> float:
        loss = self.loss()
        value = loss.item()
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimiser.step()
        return value

    def _decoder(self) -> nn.Module:
        """transformers' model, with peft's layers in it."""
        raise NotImplementedError

    def adapters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        from peft.tuners.lora import LoraLayer

        layers = {path: module for path, module in self._decoder().named_modules() if isinstance(module, LoraLayer)}
        return {path: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for path, layer in layers.items()}


class _Peft(_Peer):
    """What the peers that use peft alone share: their pooling and their loss."""

    @staticmethod
    def imports() -> None:
        # bitsandbytes, which peft imports, announces that an optional package is absent
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden state L of padded words [2B, longest]: [2B, longest, D]."""
        raise NotImplementedError

    def _load(self, folder: str, **options) -> nn.Module:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder, dtype=self.dtype, **options).to(self.device)
        model.norm.requires_grad_(False)
        return model

    def _with_adapters(self, model: nn.Module, blocks: int | None = None) -> nn.Module:
        from peft import get_peft_model

        # a list of names would not do: layers_to_transform looks for blocks below a ForCausalLM's name for the decoder
        blocks = model.layers[: blocks or self.config.layer]
        linear = [f"layers.{path}" for path, module in blocks.named_modules() if isinstance(module, nn.Linear)]
        with warnings.catch_warnings():
            # peft still asks transformers for an attribute by its old name
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, self._lora(linear))

    def _decoder(self) -> nn.Module:
        return self.model.base_model.model

    def loss(self) -> Tensor:
        input_ids, attention_mask = self._padded(self.tokens)
        states = self.norm(self._states(input_ids, attention_mask)).float()
        pooled = nn.utils.rnn.pad_sequence(self.own, batch_first=True).to(self.device)
        means = (states * pooled[:, :, None]).sum(dim=1) / pooled.sum(dim=1, keepdim=True)
        source, target = F.normalize(means, dim=-1).chunk(2)
        cosines = source @ target.T
        if self.config.loss == "hinge":
            no_negatives = self.false_negatives | torch.eye(len(cosines), dtype=torch.bool, device=self.device)
            hardest = cosines.masked_fill(no_negatives, float("-inf")).max(dim=1).values
            return F.relu(self.config.margin - cosines.diagonal() + hardest).mean()
        logits = (cosines / self.config.temperature).masked_fill(self.false_negatives, float("-inf"))
        labels = torch.arange(len(logits), device=self.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class PeftTruncated(_Peft):
    """The model of L blocks; its final norm is taken off, since hidden state L lies before it."""

    name = "peft-truncated"

    def _build(self, folder: str) -> None:
        model = self._load(folder, **truncated_config(folder, self.config.layer))
        self.norm, model.norm = model.norm, nn.Identity()
        self.model = self._with_adapters(model)

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


class PeftHook(_Peft):
    """The whole model, and a hook on the last block that is wanted."""

    name = "peft-hook"

    def _build(self, folder: str) -> None:
        model = self._load(folder)
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

    It computes in the config's dtype, and keeps its activations: checkpointing would only cost time.
    """

    name = "peft-bitsandbytes"

    def _load(self, folder: str, checkpointing: bool = False, **options) -> nn.Module:
        from peft import prepare_model_for_kbit_training
        from transformers import AutoModel, BitsAndBytesConfig

        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype)
        model = AutoModel.from_pretrained(folder, quantization_config=nf4, dtype=self.dtype, device_map=str(self.device), **options)
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)


class SentenceTransformers(_Peer):
    """Its model of two modules, the blocks with the final norm behind them and a mean without the first token, and its own loss."""

    name = "sentence-transformers"
    package = "sentence_transformers"

    @staticmethod
    def imports() -> None:
        _Peft.imports()
        import sentence_transformers  # noqa: F401

    def _build(self, folder: str) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        if self.config.loss != "infonce" or self.false_negatives.any() or not all(own[1:].all() for own in self.own):
            must = "the loss must be infonce, no two pairs may mean the same, and only BOS may stay out of the pool"
            raise TliError(self.name, must, "another setting", "draw distinct pairs, or leave this peer out")
        config = truncated_config(folder, self.config.layer)
        blocks = Transformer(folder, config_kwargs=config, model_kwargs={"dtype": self.dtype})
        width = blocks.model.config.hidden_size
        self.model = SentenceTransformer(modules=[blocks, Pooling(width, "mean", include_prompt=False)], device=str(self.device))
        linear = [path for path, module in blocks.model.named_modules() if isinstance(module, nn.Linear)]
        self.model.requires_grad_(False)
        self.model.add_adapter(self._lora(linear))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # what peft's own get_peft_model does to adapters of a 16-bit model
                parameter.data = parameter.data.float()
        both_ways = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        self.objective = MultipleNegativesRankingLoss(self.model, scale=1 / self.config.temperature, **both_ways)

    def _decoder(self) -> nn.Module:
        return self.model[0].model

    def loss(self) -> Tensor:
        half = len(self.tokens) // 2
        columns = []
        for words in (self.tokens[:half], self.tokens[half:]):
            input_ids, attention_mask = self._padded(words)
            # BOS is the prompt: its pooling leaves a prompt out
            prompt = torch.ones(half, dtype=torch.long)
            columns.append({"input_ids": input_ids, "attention_mask": attention_mask, "prompt_length": prompt})
        return self.objective(columns, None)


def truncated_config(folder: str, layer: int) -> dict:
    """What transformers must be told to build a model of the first ``layer`` blocks alone."""
    from transformers import AutoConfig

    types = getattr(AutoConfig.from_pretrained(folder), "layer_types", None)
    return {"num_hidden_layers": layer} | ({} if types is None else {"layer_types": list(types[:layer])})


CONTENDERS = {contender.name: contender for contender in (Tli, PeftTruncated, PeftHook, SentenceTransformers)}


def taking_part(wanted: list[str]) -> tuple[list[str], list[str]]:
    """The contenders that are to be measured, tli first, and those that are wanted and not installed."""
    names = chosen("--subjects", ["tli", *(name for name in wanted if name != "tli")], list(CONTENDERS))
    return [name for name in names if CONTENDERS[name].installed()], [name for name in names if not CONTENDERS[name].installed()]
