"""The only door to ``tli_kernels``: picks the implementation of the ops, and says once which and why.

The reference ops are plain PyTorch and run everywhere, bit for bit as transformers' own layers do. On a GPU the fused Triton
ops take their place; on a CPU the linear layers go through oneDNN, which is equal to rounding and faster. What was
asked for explicitly is taken or is an error, never a silent fall-back.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import pathlib
from collections.abc import Iterator

import torch
from tli_kernels import launch, onednn, reference, shapes
from tli_kernels.launch import ALWAYS  # noqa: F401
from tli_kernels.nf4_weight import NF4Weight  # noqa: F401
from tli_kernels.token_table import TokenTable  # noqa: F401

from tli.errors import TliError
from tli.files import cache_folder, write_text

# the module that each op comes from
_REFERENCE = {"linear": "reference", "nf4_lora": "reference", "pool_norm": "reference", "infonce": "blocked", "hinge": "blocked"}
_ONEDNN = {**_REFERENCE, "linear": "onednn", "nf4_lora": "onednn"}
_FUSED = {"linear": "nf4_lora", "nf4_lora": "nf4_lora", "pool_norm": "pool_norm", "infonce": "infonce", "hinge": "hinge"}

_chosen = _REFERENCE


def _through(name: str):
    """The op of that name, from the module that was chosen last."""

    @functools.wraps(getattr(reference, name))
    def op(*operands, **options):
        return getattr(importlib.import_module(f"tli_kernels.{_chosen[name]}"), name)(*operands, **options)

    return op


linear, nf4_lora, pool_norm, infonce, hinge = map(_through, _REFERENCE)
dequantise, transpose_paths = reference.dequantise, reference.transpose_paths


def choose(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    """Choose the ops for ``impl`` (auto, reference, fused) and return one line that says which were taken and why.

    Raises:
        TliError: ``fused`` where the fused ops cannot run.
    """
    global _chosen
    problem = _against_fused(dtype, device)
    if impl == "fused" and problem:
        raise TliError("--impl", "the fused ops must be able to run", problem, "use --impl auto or reference")
    if impl == "fused" or (impl == "auto" and device.type == "cuda" and not problem):
        _chosen = _FUSED
        return f"fused ops ({'asked for' if impl == 'fused' else 'on a GPU'}): {_dispatch(device)}"
    if impl == "auto" and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and onednn.available():
        _chosen = _ONEDNN
        return f"reference ops, linear layers by oneDNN ({str(dtype)[6:]} on a CPU)"
    _chosen = _REFERENCE
    return f"reference ops ({'asked for' if impl == 'reference' else problem})"


def processor_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x·Wᵀ as ``auto`` makes it on a CPU: what is timed to choose a dtype."""
    return (onednn if onednn.available() else reference).linear(x, weight)


def holds_nf4() -> bool:
    """Whether the chosen ops compute from packed NF4 weights; else a weight is rounded to NF4 and held in the compute dtype.

    (PyTorch's own products would keep a dequantised copy of every layer for the backward pass.)
    """
    return _chosen in (_FUSED, _ONEDNN)


def holds_tables() -> bool:
    """Whether the chosen ops look products up in a ``TokenTable``. The reference ops, bit for bit transformers' own, multiply."""
    return _chosen in (_FUSED, _ONEDNN)


def fused() -> bool:
    """Whether the fused Triton ops were chosen."""
    return _chosen is _FUSED


def _against_fused(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the fused ops cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "no triton on this machine"
    if device.type == "cuda":
        return None
    if not launch.interpreted():
        return f"device {device} without TRITON_INTERPRET=1"
    return "bfloat16, which Triton's interpreter does not know" if dtype == torch.bfloat16 else None


def projections(model: str) -> list[tuple[int, int]]:
    """The distinct sizes (N, K) of a named model's linear layers."""
    return sorted(set(shapes.MODELS[model].projections().values()))


@contextlib.contextmanager
def dispatched(device: torch.device, decode_rows: int, fused_rows: int) -> Iterator[None]:
    """The fused ops, with these numbers of rows up to which each way of a product is taken (``launch.Dispatch``)."""
    global _chosen
    before, _chosen = _chosen, _FUSED
    launch.use(launch.capability(device), launch.Dispatch(decode_rows, fused_rows))
    try:
        yield
    finally:
        _chosen = before
        launch.use(launch.capability(device), None)


def dispatch_file() -> pathlib.Path:
    """Where ``tli.tune`` keeps what it measured."""
    return cache_folder() / "tune.json"


def tuned() -> dict[str, dict]:
    """What ``tli.tune`` measured on this machine: by GPU, triton and torch, the rows up to which each way is taken."""
    try:
        return json.loads(dispatch_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def keep_tuned(device: torch.device, decode_rows: int, fused_rows: int) -> None:
    """Store what was measured on this GPU, and use it from now on."""
    dispatch = launch.Dispatch(decode_rows, fused_rows)
    write_text(dispatch_file(), json.dumps({**tuned(), _gpu(device): dataclasses.asdict(dispatch)}, indent=1) + "\n")
    launch.use(launch.capability(device), dispatch)


def _dispatch(device: torch.device) -> str:
    """Use what was measured on this GPU, if anything was, and say in words how products are made."""
    capability, measured = launch.capability(device), tuned().get(_gpu(device))
    launch.use(capability, None if measured is None else launch.Dispatch(**measured))
    way = launch.dispatch(capability)
    source = "from the table; python -m tli.tune measures it" if measured is None else "measured by tli.tune"
    products = f"; cuBLAS above {max(way.decode_rows, way.fused_rows)} rows" if way.fused_rows < ALWAYS else ""
    return f"NF4 decoded in the product up to {way.decode_rows} rows{products} ({source})"


def _gpu(device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, triton {triton.__version__}, torch {torch.__version__}"
