"""The only importer of the ops in ``tli_kernels``: resolves a run's implementation of them, once, and says which and why.

The reference ops are plain PyTorch, run everywhere, and are transformers' own layers bit for bit. On a GPU the fused Triton ops
replace them; on a CPU the linear layers use the library with the fastest matmul, equal to rounding. Nothing is assumed of a machine:
fast ops are checked on small operands first, forward and backward, against the reference. What was asked for explicitly is used or is
an error, never a silent fallback.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from tli_kernels import blocked, checks, cpu, launch, reference, shapes
from tli_kernels.cpu import PLAIN, Matmul  # noqa: F401
from tli_kernels.launch import ALWAYS  # noqa: F401
from tli_kernels.nf4_weight import NF4Weight  # noqa: F401
from tli_kernels.token_table import TokenTable  # noqa: F401
from torch import Tensor

from tli.runtime.errors import TliError, one_line
from tli.runtime.files import cache_folder, write_text

dequantise, transpose_paths = reference.dequantise, reference.transpose_paths
nf4_decoder = cpu.nf4_decoder
LIBRARIES = tuple(cpu.LIBRARIES)

_LIBRARY_NAMES = {"onednn": "oneDNN", "torch": "torch's own product"}


@dataclasses.dataclass(frozen=True)
class Ops:
    """The ops of a run, each with the signature of its reference in ``tli_kernels.reference``.

    kind         which implementation
    description  one line for the console: which implementation, and why
    matmul       the matmul of the linear layers on a CPU; None elsewhere
    """

    kind: Literal["reference", "cpu", "fused"]
    linear: Callable[..., Tensor]
    lora_linear: Callable[..., Tensor]
    pool_norm: Callable[..., Tensor]
    infonce: Callable[..., Tensor]
    hinge: Callable[..., Tensor]
    description: str = ""
    matmul: Matmul | None = None

    @property
    def exact(self) -> bool:
        """Whether they are transformers' own layers bit for bit: then no products are precomputed, and NF4 is dequantised once, at loading.

        All ops compute from every kind of weight, but from a packed one the reference ops would dequantise it for each matmul, and
        autograd would keep each layer's copy for the backward pass.
        """
        return self.kind == "reference"


# the losses are blocked: equal to the reference's, without holding batch x batch cosines of a large batch
REFERENCE = Ops("reference", reference.linear, reference.lora_linear, reference.pool_norm, blocked.infonce, blocked.hinge, "reference ops")


def on_cpu(matmul: Matmul, description: str = "") -> Ops:
    """The reference ops, with the linear layers through ``matmul``."""
    linear, lora_linear = (functools.partial(op, matmul=matmul) for op in (cpu.linear, cpu.lora_linear))
    return dataclasses.replace(REFERENCE, kind="cpu", linear=linear, lora_linear=lora_linear, description=description, matmul=matmul)


def fused(description: str = "") -> Ops:
    """The Triton ops; importing them needs Triton."""
    from tli_kernels import hinge, infonce, nf4_lora, pool_norm

    return Ops("fused", nf4_lora.linear, nf4_lora.lora_linear, pool_norm.pool_norm, infonce.infonce, hinge.hinge, description)


def resolve(impl: str, dtype: torch.dtype, device: torch.device, matmul: Callable[[], Matmul], weights: str = "full") -> Ops:
    """Choose the ops for an implementation, a dtype and a device.

    Args:
        impl:     auto, reference or fused
        dtype:    the compute dtype
        device:   where the run computes
        matmul:   returns this CPU's matmul; called only where it is needed, since it may measure
        weights:  full or nf4

    Raises:
        TliError: ``fused`` where the fused ops cannot run.
    """
    if impl == "reference":
        # it is used as asked for, with a warning where it is slow
        slow = dtype.itemsize < 4 and device.type == "cpu" and matmul().in_float32
        return _reference(f"asked for; {name_of(dtype)} products are slow on this processor" if slow else "asked for")
    if impl == "fused" or device.type == "cuda":
        problem = _against_fused(dtype, device)
        if impl == "fused" and problem:
            raise TliError("--impl", "the fused ops must be able to run", problem, "use --impl auto or reference")
        if problem:
            return _reference(problem)
        return fused(f"fused ops ({'asked for' if impl == 'fused' else 'on a GPU'}): {_dispatch(device)}")
    if device.type != "cpu":
        return _reference(f"device {device}")
    chosen = matmul()
    if chosen.in_float32 and dtype != torch.float32:
        how = f"linear layers in float32, rounded to {name_of(dtype)}: this processor has no fast products of it, --dtype float32 is faster"
    else:
        how = f"linear layers by {_LIBRARY_NAMES[chosen.library]} ({name_of(dtype)} on a CPU)"
    decoded = f", NF4 decoded by {nf4_decoder().name}" if weights == "nf4" else ""
    return on_cpu(chosen, f"reference ops, {how}{decoded}")


def _reference(why: str) -> Ops:
    return dataclasses.replace(REFERENCE, description=f"reference ops ({why})")


def name_of(dtype: torch.dtype) -> str:
    """A dtype as the options spell it: float32."""
    return str(dtype).removeprefix("torch.")


def _against_fused(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the fused ops cannot run here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "no triton on this machine"
    if device.type != "cuda":
        if not checks.interpreted():
            return f"device {device} without TRITON_INTERPRET=1"
        return "bfloat16, which Triton's interpreter does not know" if dtype == torch.bfloat16 else None
    # a compiler, a driver or a card may raise anything
    try:
        return None if _fused_agree(dtype, device) else "the fused ops, tried on this GPU, gave other numbers"
    except Exception as error:
        return f"the fused ops, tried on this GPU, failed: {one_line(error)}"


@functools.cache
def _fused_agree(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether each fused op's results and gradients on small operands are the reference's, to rounding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, weight, a, b, dy = normal(48, 128), normal(64, 128) / 11, normal(16, 128) / 11, normal(64, 16) / 4, normal(48, 64)
    units, indptr, false_negatives = normal(8, 64), torch.arange(0, 33, 4), torch.tensor([[0, 1], [1, 0]])
    indices = torch.arange(32)

    def found(ops: Ops, where: torch.device, kind: torch.dtype) -> list[Tensor]:
        # cloned: where nothing is to be converted, to() gives the operand itself, which must not want gradients in the next turn
        leaves = [value.to(where, kind if i == 0 else torch.float32).clone().requires_grad_() for i, value in enumerate((x, a, b))]
        y = ops.lora_linear(leaves[0], weight.to(where, kind), *leaves[1:], 0.5, dropout=0.25, seed=7)
        y.backward(dy.to(where, kind))
        states = x.to(where, kind).clone().requires_grad_()
        vectors = ops.pool_norm(states, indptr.to(where), indices.to(where), None)
        sources, targets = vectors.detach().chunk(2)
        losses = []
        for loss, scale in ((ops.infonce, 0.1), (ops.hinge, 0.4)):
            sides = [side.clone().requires_grad_() for side in (sources, targets)]
            value = loss(*sides, scale, false_negatives.to(where))
            value.backward()
            losses += [value.detach(), *(side.grad for side in sides)]
        vectors.backward(units.repeat(1, 2).to(where))
        # after backward every leaf has its gradient, which Tensor.grad's type cannot say
        results: list[Any] = [y, *(leaf.grad for leaf in leaves), vectors, states.grad, *losses]
        return [value.detach().cpu().double() for value in results]

    # the reference's own error in this dtype is measured, not guessed
    truth = found(REFERENCE, torch.device("cpu"), torch.float32)
    plain = found(REFERENCE, device, dtype)
    room = 16 * max(torch.finfo(dtype).eps, 2**-13)
    return all(
        (got - exact).norm() <= 4 * (eager - exact).norm() + room * exact.norm()
        for got, eager, exact in zip(found(fused(), device, dtype), plain, truth)
    )


def projections(model: str) -> list[tuple[int, int]]:
    """The distinct sizes (N, K) of a named model's linear layers."""
    return sorted(set(shapes.MODELS[model].projections().values()))


@contextlib.contextmanager
def override_dispatch(device: torch.device, decode_rows: int, fused_rows: int) -> Iterator[None]:
    """Override the fused ops' dispatch by number of rows (``launch.Dispatch``) while the context is open."""
    launch.use(launch.capability(device), launch.Dispatch(decode_rows, fused_rows))
    try:
        yield
    finally:
        launch.use(launch.capability(device), None)


def dispatch_file() -> pathlib.Path:
    """Where ``tli.tune`` keeps its measurements."""
    return cache_folder() / "tune.json"


def tuned() -> dict[str, dict]:
    """The measurements of ``tli.tune``: the fields of ``launch.Dispatch`` by GPU and versions of triton and torch; no others are kept."""
    names = {field.name for field in dataclasses.fields(launch.Dispatch)}

    def is_dispatch(kept: object) -> bool:
        return isinstance(kept, dict) and kept.keys() == names and all(type(rows) is int and rows >= 0 for rows in kept.values())

    try:
        return {gpu: kept for gpu, kept in json.loads(dispatch_file().read_text(encoding="utf-8")).items() if is_dispatch(kept)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def save_tuned(device: torch.device, decode_rows: int, fused_rows: int) -> None:
    """Store the dispatch measured on this GPU, and use it from now on."""
    dispatch = launch.Dispatch(decode_rows, fused_rows)
    write_text(dispatch_file(), json.dumps({**tuned(), _gpu(device): dataclasses.asdict(dispatch)}, indent=1) + "\n")
    launch.use(launch.capability(device), dispatch)


def _dispatch(device: torch.device) -> str:
    """Use the dispatch measured on this GPU, if there is one, and describe it."""
    capability, measured = launch.capability(device), tuned().get(_gpu(device))
    launch.use(capability, None if measured is None else launch.Dispatch(**measured))
    used = launch.dispatch(capability)
    source = "from the table; python -m tli.tune measures it" if measured is None else "measured by tli.tune"
    products = f"; cuBLAS above {max(used.decode_rows, used.fused_rows)} rows" if used.fused_rows < ALWAYS else ""
    return f"NF4 decoded in the product up to {used.decode_rows} rows{products} ({source})"


def _gpu(device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, triton {triton.__version__}, torch {torch.__version__}"
