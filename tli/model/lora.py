"""The LoRA injector: y = W·x + s·B·(A·drop(x)), and the adapters' way to disk and back in PEFT's format.

``inject`` replaces chosen linear layers of a decoder by ``LoRALinear`` in place; B starts at zero, so nothing changes
until the first step. ``save`` writes what ``PeftModel.from_pretrained`` reads on the whole model: keys carry the names of
the family's ForCausalLM class even where only a truncated decoder was trained (PEFT merely warns about other names and
keeps a random start), and ``layers_to_transform`` names the blocks (without it PEFT puts adapters on every one).
Source: Hu et al. 2021 (arXiv 2106.09685); rsLoRA: Kalajdzievski 2023 (arXiv 2312.03732).
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import typing
import zlib
from collections.abc import Iterable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tli.model.families import TRANSPOSED, blocks_of, traits_of
from tli.model.shape import target_pattern
from tli.runtime import ops
from tli.runtime.errors import TliError
from tli.runtime.files import atomic_write, write_text
from tli.runtime.patterns import Pattern, pattern

if typing.TYPE_CHECKING:
    from tli.model.decoder import Decoder

_KEY_PREFIX = "base_model.model."
# where classes of transformers have their text decoder; not in a vision_tower
_DECODER = r"(?:(?:model|language_model|text_model|decoder|transformer|gpt_neox)\.)*"
_KEY = re.compile(
    rf"^base_model\.model\.(?P<decoder>{_DECODER})(?P<path>(?:layers|h)\.\d+\..+)\.(lora_(?P<factor>[AB])\.weight|lora_magnitude_vector)$"
)
ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# keys of an adapter_config.json that are computed with here, and those that change nothing about how a saved adapter computes: a key of
# neither kind must be unset, so an adapter of a kind that is not known, or not yet, is never taken for W + s·B·A
_COMPUTED = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "use_dora")
_WITHOUT_EFFECT = (
    # what it is of, and which layers it has, of which the tensors themselves speak
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    # of how a weight is stored (see TRANSPOSED)
    "fan_in_fan_out",
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # of training, of how the factors start (see _STARTS), and of switches whose other half must be unset
    *("inference_mode", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
)
# starts of the factors that leave the base as it is; the others take a part of it away, which only PEFT on the same base does again
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What an adapter is: ``s = alpha/rank``, or ``alpha/sqrt(rank)`` with rsLoRA.

    targets: ``all-linear``, a comma list of names (``q_proj,v_proj``), or a regular expression that must match the whole of
             a module's path in its block (``self_attn\\..*``) or in the decoder (``layers\\.0\\..*``).
    init:    start of A: ``normal`` N(0, 1/K), or ``kaiming``, PEFT's uniform with the variance 1/(3K).
    """

    rank: int
    alpha: float
    targets: str = "all-linear"
    dropout: float = 0.0
    rslora: bool = False
    init: str = "normal"

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ + bias, with W [N, K] and bias [N] frozen, A [R, K] and B [N, R] trained in fp32."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = scale, dropout
        # of the layer whose place this takes
        self.ops = getattr(linear, "ops", ops.REFERENCE)
        # fp32 [N], what an adapter off the disk multiplies each out-feature by: DoRA's
        self.gain: Tensor | None = None
        # of this step's dropout; whoever runs the steps sets it anew before each
        self.seed = 0
        out_features, in_features = linear.weight.shape
        self.lora_A = nn.Parameter(torch.zeros(rank, in_features, dtype=torch.float32, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.gain is not None:
            y = self.ops.lora_linear(x, self.weight, self.lora_A, self.lora_B, self.scale, None, dropout, self.seed) * self.gain
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        return self.ops.lora_linear(x, self.weight, self.lora_A, self.lora_B, self.scale, self.bias, dropout, self.seed)


def inject(decoder: "Decoder", config: LoRAConfig, blocks: range | list[int] | None = None, seed: int = 0) -> list[str]:
    """Put adapters into the blocks of ``decoder`` in place and freeze everything else.

    Args:
        decoder:  a transformers decoder of one of ``families.FAMILIES``
        config:   rank, scale, targets
        blocks:   indices of the blocks that get adapters; None for all
        seed:     of A; each module's start depends on the seed and its own path alone

    Returns:
        Paths of the adapted modules, ``layers.0.self_attn.q_proj`` and so on, in the decoder's order.

    Raises:
        TliError: adapters are there already, an unknown target, a rank below 1 or above a matrix's smaller side.
    """
    if adapters(decoder):
        raise TliError("inject", "the model must carry no adapters yet", f"{len(adapters(decoder))}", "inject into a model without any")
    if config.rank < 1:
        raise TliError("--rank", "the rank must be at least 1", config.rank, "choose a positive rank")
    if config.alpha <= 0 or not 0.0 <= config.dropout < 1.0:
        raise TliError(
            "--alpha, --dropout",
            "alpha must be positive and dropout in [0, 1)",
            f"alpha {config.alpha}, dropout {config.dropout}",
            "choose other values",
        )
    indices = range(len(blocks_of(decoder))) if blocks is None else blocks
    chosen = target_paths(decoder, indices, config.targets)
    check_rank(decoder, chosen, config.rank)
    decoder.requires_grad_(False)
    for path in chosen:
        # as ``target_paths`` chose it
        linear = typing.cast(nn.Linear, decoder.get_submodule(path))
        adapter = LoRALinear(linear, config.rank, config.scale, config.dropout)
        _start(adapter.lora_A, config.init, seed, path)
        _replace(decoder, path, adapter)
    return chosen


def target_paths(decoder: "Decoder", blocks: range | list[int], targets: str) -> list[str]:
    """Paths of the linear layers of these blocks that ``targets`` means; raises ``TliError`` for what no layer matches."""
    return [path for index in blocks for path in _targets(decoder, index, targets)]


def check_rank(decoder: nn.Module, paths: list[str], rank: int, where: str = "--rank") -> None:
    """Raise ``TliError`` for a rank above the smaller side of one of these linear layers' weights."""
    for path in paths:
        largest = min(typing.cast(nn.Linear, decoder.get_submodule(path)).weight.shape)
        if rank > largest:
            raise TliError(where, f"the rank must be at most {largest}, the smaller side of {path}", rank, "choose a smaller rank")


def adapters(module: nn.Module) -> dict[str, LoRALinear]:
    """Every ``LoRALinear`` of a module by its path."""
    return {path: child for path, child in module.named_modules() if isinstance(child, LoRALinear)}


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters, A before B, in the module's order."""
    return [parameter for adapter in adapters(module).values() for parameter in (adapter.lora_A, adapter.lora_B)]


def check_gradients(decoder: nn.Module, step: int) -> None:
    """Stop if an adapter learns nothing: B must have a gradient at the first step (step 0), A at the second.

    A's gradient is zero at the first step, because B is. An adapter whose output nothing reads would be saved as noise.
    """
    for path, adapter in adapters(decoder).items():
        name, parameter = ("lora_B", adapter.lora_B) if step == 0 else ("lora_A", adapter.lora_A)
        if parameter.grad is None or not parameter.grad.any():
            raise TliError(
                f"{path}.{name}",
                f"every adapter must get a gradient at step {step + 1}",
                "zero",
                "leave the module out with --targets, or check that the loss can reach it",
            )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter off the disk: factors by module path in the decoder, and the scale to use them with.

    scale       s
    factors     A fp32 [R, K] and B fp32 [N, R]
    decoder     where PEFT has that decoder
    scales      s of modules that have their own
    magnitudes  fp32 [N], DoRA's length of each row of W + s·B·A (Liu et al. 2024, arXiv 2402.09353); of other adapters none
    """

    scale: float
    factors: dict[str, tuple[Tensor, Tensor]]
    decoder: str = "model"
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    magnitudes: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def scale_of(self, path: str) -> float:
        """s of the module at this path."""
        return self.scales.get(path, self.scale)

    def merge(self, path: str, weight: Tensor) -> Tensor:
        """W + s·B·A in fp32, of the linear layer at this path, its rows brought to DoRA's magnitudes."""
        merged, gain = self._sum(path, weight)
        return merged if gain is None else merged * gain[:, None]

    def _sum(self, path: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """W + s·B·A in fp32, and what DoRA multiplies each of its rows by."""
        lora_a, lora_b = (factor.to(weight.device) for factor in self.factors[path])
        total = torch.addmm(weight.float(), lora_b, lora_a, alpha=self.scale_of(path))
        magnitude = self.magnitudes.get(path)
        return total, None if magnitude is None else magnitude.to(weight.device) / total.norm(dim=1)

    def attach(self, module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """Wrap, for evaluation, each linear layer of ``module`` that has factors under ``prefix`` + its path.

        Returns:
            The wrapped layers by path, for ``detach``.

        Raises:
            TliError: factors whose shape is not the layer's.
        """
        wrapped_layers = {}
        for path, child in list(module.named_modules()):
            if prefix + path not in self.factors:
                continue
            lora_a, lora_b = self.factors[prefix + path]
            if (lora_b.shape[0], lora_a.shape[1]) != tuple(child.weight.shape) or lora_a.shape[0] != lora_b.shape[1]:
                raise TliError(
                    prefix + path,
                    "the adapter must fit the model: {}x{}".format(*child.weight.shape),
                    f"A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}",
                    "use the model that the adapter was trained on",
                )
            wrapped = LoRALinear(child, lora_a.shape[0], self.scale_of(prefix + path), dropout=0.0)
            wrapped.lora_A.data, wrapped.lora_B.data = lora_a.to(child.weight.device), lora_b.to(child.weight.device)
            if prefix + path in self.magnitudes:
                held = child.weight
                plain = ops.dequantise(held, torch.float32) if isinstance(held, ops.NF4Weight) else held
                _, wrapped.gain = self._sum(prefix + path, plain)
            _replace(module, path, wrapped.requires_grad_(False).eval())
            wrapped_layers[path] = child
        return wrapped_layers


def detach(module: nn.Module, wrapped_layers: dict[str, nn.Module]) -> None:
    """Put back what ``Adapter.attach`` wrapped."""
    for path, layer in wrapped_layers.items():
        _replace(module, path, layer)


def snapshot(decoder: nn.Module, scale: float) -> Adapter:
    """The decoder's adapters as an ``Adapter``: detached copies."""
    found = adapters(decoder)
    return Adapter(scale, {path: (a.lora_A.detach().clone(), a.lora_B.detach().clone()) for path, a in found.items()})


def save(
    decoder: "Decoder",
    config: LoRAConfig,
    folder: str | os.PathLike,
    base_model: str,
    decoder_path: str | None = None,
    task: str = "CAUSAL_LM",
) -> None:
    """Write the decoder's adapters to ``folder`` as a PEFT adapter, each file whole or not at all.

    The same adapters give the same bytes. ``decoder_path`` is that of the decoder in the class that PEFT's users load, None in the
    family's ForCausalLM class, ``task`` PEFT's task type for it (``tli/model/whole_model.py``).
    """
    decoder_path = traits_of(decoder).causal_lm if decoder_path is None else decoder_path
    folder = pathlib.Path(folder)
    tensors, inside = {}, f"{decoder_path}." if decoder_path else ""
    for path, adapter in adapters(decoder).items():
        tensors[f"{_KEY_PREFIX}{inside}{path}.lora_A.weight"] = adapter.lora_A.detach().cpu().contiguous()
        tensors[f"{_KEY_PREFIX}{inside}{path}.lora_B.weight"] = adapter.lora_B.detach().cpu().contiguous()
    with atomic_write(folder / ADAPTER_FILE) as temporary:
        temporary.write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
    peft_config = _peft_config(list(adapters(decoder)), config, base_model, inside, task)
    write_text(folder / CONFIG_FILE, json.dumps(peft_config, indent=2) + "\n")


def load(folder: str | os.PathLike) -> Adapter:
    """Read a PEFT LoRA adapter, tli's own or another's.

    Raises:
        TliError: a missing file, a kind of adapter other than plain LoRA, keys that are not linear layers' in blocks, NaN or infinity.
    """
    folder = pathlib.Path(folder)
    for file in (CONFIG_FILE, ADAPTER_FILE):
        if not (folder / file).is_file():
            got, remedy = "none", "name a folder that holds a PEFT adapter"
            if file == ADAPTER_FILE and (pickled := folder / "adapter_model.bin").is_file():
                paths = (json.dumps(str(path)) for path in (pickled, folder / file))
                code = "import torch; from safetensors.torch import save_file; save_file(torch.load({}, weights_only=True), {})"
                got, remedy = pickled.name, f"convert it: python -c {shlex.quote(code.format(*paths))}"
            raise TliError(folder, f"an adapter's folder must hold {file}", got, remedy)
    config = _read_config(folder / CONFIG_FILE)
    try:
        tensors = load_file(folder / ADAPTER_FILE)
    except (SafetensorError, OSError) as error:
        raise TliError(folder / ADAPTER_FILE, "the file must be whole safetensors", error, "save the adapter again") from error
    factors: dict[str, dict[str, Tensor]] = {}
    places = set()
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None or (match["factor"] is None and not config.get("use_dora")):
            must = "every key must name a linear layer of a block of the text decoder"
            raise TliError(folder / ADAPTER_FILE, must, key, "train it on that decoder's layers alone")
        if not (tensor.is_floating_point() and tensor.isfinite().all() and tensor.ndim == (2 if match["factor"] else 1)):
            must = "every factor must be a matrix, every magnitude a vector, of finite numbers"
            raise TliError(folder / ADAPTER_FILE, must, f"others in {key}", "train the adapter again")
        places.add(match["decoder"])
        factors.setdefault(match["path"], {})[f"lora_{match['factor'] or 'magnitude_vector'}"] = tensor.float()
    if config.get("fan_in_fan_out") and not _are_transposed(factors):
        raise TliError(folder / CONFIG_FILE, "the adapter must be plain LoRA", "fan_in_fan_out", "train one without it")
    names = ["lora_A", "lora_B", *["lora_magnitude_vector"] * bool(config.get("use_dora"))]
    for path, found in factors.items():
        if set(found) != set(names):
            must, got = f"{path} must have {' and '.join(names)}", f"only {', '.join(sorted(found))}"
            raise TliError(folder / ADAPTER_FILE, must, got, "save the adapter again")
        if len({len(found[name]) for name in names[1:]}) > 1:
            must = f"{path} must have a magnitude for each of its {len(found['lora_B'])} out-features"
            raise TliError(folder / ADAPTER_FILE, must, len(found[names[2]]), "save the adapter again")
    if len(places) > 1:
        got = " and ".join(sorted(place or "none" for place in places))
        raise TliError(folder / ADAPTER_FILE, "all keys must be of one decoder", got, "save the adapter again")
    inside = "".join(places)
    scale = rank_and_scale({**config, "rank_pattern": None, "alpha_pattern": None}, "")[1]
    scales = {path: own for path in factors if (own := rank_and_scale(config, inside + path)[1]) != scale}
    pairs = {path: (found["lora_A"], found["lora_B"]) for path, found in factors.items()}
    magnitudes = {path: found[names[2]] for path, found in factors.items() if len(names) > 2}
    return Adapter(scale, pairs, inside.rstrip("."), scales, magnitudes)


def rank_and_scale(config: dict, path: str) -> tuple[int, float]:
    """R and s of the linear layer at this path in the class that PEFT adapts, as it takes them from an ``adapter_config.json``."""

    def of(patterns: str, default: str) -> float:
        found = (value for key, value in (config.get(patterns) or {}).items() if _key_pattern(key).fullmatch(path))
        return next(found, config[default])

    rank, alpha = int(of("rank_pattern", "r")), float(of("alpha_pattern", "lora_alpha"))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _key_pattern(key: str) -> Pattern:
    """What a key of rank_pattern or alpha_pattern means in PEFT: the end of a module's path."""
    return pattern(rf"(.*\.)?({key})", "adapter_config.json", "the keys of rank_pattern and alpha_pattern must be regular expressions")


def _are_transposed(paths: Iterable[str]) -> bool:
    """Whether all these linear layers of a decoder, ``h.0.attn.c_attn``, are stored as [K, N]."""
    return all(path.split(".", 2)[2] in TRANSPOSED for path in paths)


def _read_config(file: pathlib.Path) -> dict:
    """An ``adapter_config.json`` of which everything that it says is understood."""
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        for key in (*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})):
            _key_pattern(key)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TliError(file, "the file must be JSON with r and lora_alpha", repr(error), "save the adapter again") from error
    targets, blocks = config.get("target_modules"), config.get("layers_to_transform")
    names = targets if isinstance(targets, list) else [targets or ""]
    numbers = blocks if isinstance(blocks, list) else [blocks or 0]
    if not all(isinstance(name, str) for name in names) or not all(type(number) is int for number in numbers):
        must = "target_modules must be names or an expression, layers_to_transform numbers"
        raise TliError(file, must, f"{targets}, {blocks}", "save the adapter again")
    for rank in ranks:
        if type(rank) is not int or rank < 1:
            raise TliError(file, "every rank must be a whole number of at least 1", rank, "save the adapter again")
    for alpha in alphas:
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise TliError(file, "every lora_alpha must be a finite number above 0", alpha, "save the adapter again")
    if config.get("peft_type") != "LORA" or config.get("bias") not in (None, "none"):
        got = f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise TliError(file, "the adapter must be plain LoRA", got, "train one without it")
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        remedy = "save it in PEFT with path_initial_model_for_weight_conversion, which makes it plain LoRA"
        raise TliError(file, "the adapter must be plain LoRA on the model as it is", f"init_lora_weights {start}", remedy)
    odd = [key for key, value in config.items() if value and key not in (*_COMPUTED, *_WITHOUT_EFFECT)]
    if odd:
        raise TliError(file, "the adapter must be plain LoRA", ", ".join(odd), "train one without it")
    return config


def _targets(decoder: "Decoder", index: int, targets: str) -> list[str]:
    """Paths of the linear layers of block ``index`` that ``targets`` means."""
    blocks, name_of_blocks = blocks_of(decoder), traits_of(decoder).blocks
    block = blocks[index]
    linear = [path for path, child in block.named_modules() if isinstance(child, nn.Linear)]
    if targets == "all-linear":
        chosen = linear
    elif re.fullmatch(r"\w+(\s*,\s*\w+)*", targets):
        names = [name.strip() for name in targets.split(",")]
        unknown = [name for name in names if not any(path.rpartition(".")[2] == name for path in linear)]
        if unknown:
            available = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in linear))
            raise TliError(
                "--targets", f"each target must be a linear layer of the model ({available})", ", ".join(unknown), "choose among these"
            )
        chosen = [path for path in linear if path.rpartition(".")[2] in names]
    else:
        wanted = target_pattern(targets)
        chosen = [path for path in linear if wanted.fullmatch(path) or wanted.fullmatch(f"{name_of_blocks}.{index}.{path}")]
        if not any(
            wanted.fullmatch(path) or wanted.fullmatch(f"{name_of_blocks}.{i}.{path}") for i in range(len(blocks)) for path in linear
        ):
            raise TliError("--targets", f"the expression must match a linear layer ({', '.join(linear)})", targets, "correct it")
    return [f"{name_of_blocks}.{index}.{path}" for path in chosen]


def _start(lora_a: Tensor, init: str, seed: int, path: str) -> None:
    # 32 bits are all that torch's generator takes of a seed on a CPU
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))
    start = torch.empty(lora_a.shape)
    if init == "normal":
        start.normal_(std=lora_a.shape[1] ** -0.5, generator=generator)
    else:
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    lora_a.data.copy_(start)


def _replace(module: nn.Module, path: str, child: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, child)


def _peft_config(paths: list[str], config: LoRAConfig, base_model: str, inside: str, task: str) -> dict:
    by_block: dict[int, set[str]] = {}
    for path in paths:
        _, block, name = path.split(".", 2)
        by_block.setdefault(int(block), set()).add(name.rpartition(".")[2])
    everywhere = set.intersection(*by_block.values())
    # elsewhere in a model of several towers a short name may be another tower's, too
    uniform = inside == "model." and all(names == everywhere for names in by_block.values())
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": _are_transposed(paths),
        # short names mean every chosen block; full paths where blocks differ
        "target_modules": sorted(everywhere) if uniform else sorted(paths if inside == "model." else (inside + path for path in paths)),
        "layers_to_transform": sorted(by_block),
    }
