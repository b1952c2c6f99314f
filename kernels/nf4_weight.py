"""A linear layer's weight in NF4 (4-bit NormalFloat), in bitsandbytes' byte layout. Imports no triton, for machines without it.

    W_nk = code[q_nk] · scale_b,  b = (n·K + k) // 64
    scale_b = absmax_b                                                      one level of scales, fp32
    scale_b = nested_code[absmax_b] · nested_absmax_{b // 256} + offset     nested: absmax_b is an 8-bit number

Letters: N out-features, K in-features, q 4-bit numbers, b blocks.
Source: QLoRA (arXiv 2305.14314); bytes and key names are those of bitsandbytes.
"""

import dataclasses
import json

import torch
from tli_kernels.checks import require
from torch import Tensor

# how many elements share a scale, and how many scales share a nested one
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
# numbers of a weight on a CPU
_PACKED_AT_ONCE = 1 << 22

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STATE = "quant_state.bitsandbytes__"
_REMEDY = "quantise the original weight again"


@dataclasses.dataclass(frozen=True, eq=False)
class NF4Weight:
    """The packed weight of a linear layer, used like a Tensor [N, K].

    Fields:
        codes          uint8 [N·K/2]         two 4-bit numbers a byte, row-major, the even element in the high half
        absmax         fp32 [N·K/64], or uint8 [N·K/64] where nested
        code           fp32 [16]             the values of the 4-bit codes
        shape          torch.Size (N, K)     K a multiple of 64
        dtype          torch.dtype           of the weight before it was packed
        nested_absmax  fp32 [⌈N·K/64/256⌉]   these three where nested, else None
        nested_code    fp32 [256]
        offset         fp32 []

    Raises ValueError where sizes, dtypes or devices do not match.
    """

    codes: Tensor
    absmax: Tensor
    code: Tensor
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None

    blocksize = BLOCKSIZE
    ndim = 2

    def __post_init__(self):
        object.__setattr__(self, "shape", torch.Size(self.shape))
        _require_packable(self.shape, self.dtype)
        blocks = self.shape.numel() // BLOCKSIZE
        layout = {"codes": (torch.uint8, (self.shape.numel() // 2,)), "code": (torch.float32, (16,))}
        layout["absmax"] = (torch.uint8 if self.nested else torch.float32, (blocks,))
        if self.nested:
            layout |= {"nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCKSIZE),)), "nested_code": (torch.float32, (256,))}
            layout["offset"] = (torch.float32, ())
        for name, (dtype, size) in layout.items():
            self._require_field(name, dtype, size)
        devices = {tensor.device for tensor in self._tensors().values()}
        require(len(devices) == 1, "nf4 weight", "all its tensors must be on one device", lambda: sorted(map(str, devices)), "move them")

    def _require_field(self, name: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
        tensor, n, k = getattr(self, name), *self.shape
        require(tensor is not None, "nf4 weight", f"nested scales need {name}", lambda: None, _REMEDY)
        require(tensor.dtype == dtype, "nf4 weight", f"{name} must be {dtype}", lambda: tensor.dtype, _REMEDY)
        fits, got = tensor.shape == size and tensor.is_contiguous(), lambda: f"{list(tensor.shape)}, packed for other sizes"
        require(fits, "nf4 weight", f"{name} of a [{n}, {k}] weight must be contiguous {list(size)}", got, _REMEDY)

    @classmethod
    def quantise(cls, weight: Tensor, nested: bool = False) -> "NF4Weight":
        """Pack a weight [N, K] of any of the three float dtypes by bitsandbytes, on its device; ``nested``: 8-bit scales."""
        _require_packable(weight.shape, weight.dtype)
        if weight.device.type == "cpu" and not nested and weight.numel() > _PACKED_AT_ONCE:
            # blocks are independent; all at once, bitsandbytes would hold several fp32 copies of them
            numbers = weight.detach().reshape(-1)
            codes, absmax = torch.empty(len(numbers) // 2, dtype=torch.uint8), torch.empty(len(numbers) // BLOCKSIZE)
            for start in range(0, len(numbers), _PACKED_AT_ONCE):
                part = cls.quantise(numbers[None, start : start + _PACKED_AT_ONCE])
                codes[start // 2 :][: len(part.codes)] = part.codes
                absmax[start // BLOCKSIZE :][: len(part.absmax)] = part.absmax
            return cls(codes, absmax, part.code, weight.shape, weight.dtype)
        codes, state = bitsandbytes_functional().quantize_4bit(
            weight.detach().contiguous(), blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=nested
        )
        second = (state.state2.absmax, state.state2.code, state.offset) if nested else ()
        return cls(codes.flatten(), state.absmax, state.code, weight.shape, weight.dtype, *second)

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor], name: str = "weight") -> "NF4Weight":
        """Read a weight from a checkpoint's tensors, under bitsandbytes' key names; its bytes stay as they are."""
        found = [key.removeprefix(f"{name}.{_STATE}") for key in tensors if key.startswith(f"{name}.{_STATE}")]
        key, got = f"{name}.{_STATE}nf4", lambda: ", ".join(found) or "none"
        require(found == ["nf4"], name, f"the checkpoint must hold {key}", got, "load an NF4 checkpoint")
        state = _unpacked(tensors[key], name)
        nested = "nested_offset" in state
        expected = {"quant_type": "nf4", "blocksize": BLOCKSIZE}
        if nested:
            expected |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        for key, value in expected.items():
            require(state.get(key) == value, name, f"{key} must be {value}", lambda key=key: state.get(key), _REMEDY)
        require(state.get("dtype") in _DTYPES, name, f"dtype must be one of {', '.join(_DTYPES)}", lambda: state.get("dtype"), _REMEDY)
        shape, offset = state.get("shape"), state.get("nested_offset", 0.0)
        sizes = isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)
        require(sizes, name, "shape must be a list of whole numbers", lambda: shape, _REMEDY)
        require(isinstance(offset, int | float), name, "nested_offset must be a number", lambda: offset, _REMEDY)
        keys = [name + key for key in ("", ".absmax", ".quant_map", *((".nested_absmax", ".nested_quant_map") if nested else ()))]
        missing = [key for key in keys if key not in tensors]
        require(not missing, name, "the checkpoint must hold all parts of the weight", lambda: f"no {missing[0]}", "download it again")
        # some checkpoints store the bytes in a float dtype, for tools that shard only floats
        codes, *parts = (tensors[key] for key in keys)
        second = (*parts[2:], torch.tensor(offset, dtype=torch.float32, device=codes.device)) if nested else ()
        codes = codes.contiguous().flatten().view(torch.uint8)
        return cls(codes, *parts[:2], torch.Size(shape), _DTYPES[state["dtype"]], *second)

    def state_dict(self, name: str = "weight") -> dict[str, Tensor]:
        """The tensors of a checkpoint as bitsandbytes writes them: its key names, shapes and bytes."""
        dtype = next(key for key, value in _DTYPES.items() if value == self.dtype)
        state = {"quant_type": "nf4", "blocksize": BLOCKSIZE, "dtype": dtype, "shape": list(self.shape)}
        tensors = {name: self.codes.view(-1, 1), f"{name}.absmax": self.absmax, f"{name}.quant_map": self.code}
        if self.nested:
            tensors |= {f"{name}.nested_absmax": self.nested_absmax, f"{name}.nested_quant_map": self.nested_code}
            state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": self.offset.item()}
        return tensors | {f"{name}.{_STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised to 8 bits (double quantisation)."""
        return not (self.nested_absmax is self.nested_code is self.offset is None)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """A kernel's arguments: codes, absmax, nested_absmax, nested_code, offset, code; absmax in place of absent nested ones."""
        second = (self.nested_absmax, self.nested_code, self.offset) if self.nested else (self.absmax,) * 3
        return self.codes, self.absmax, *second, self.code

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same weight on another device."""
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def is_floating_point(self) -> bool:
        """False, as for a Tensor of bytes."""
        return False

    def _tensors(self) -> dict[str, Tensor]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def _require_packable(shape: torch.Size, dtype: torch.dtype) -> None:
    two, allowed = len(shape) == 2, ", ".join(_DTYPES)
    require(two, "nf4 weight", "a linear layer's weight must have two dimensions", lambda: list(shape), "pass [out, in]")
    multiple = f"the in-features must be a multiple of the block size {BLOCKSIZE}"
    require(shape[1] % BLOCKSIZE == 0, "nf4 weight", multiple, lambda: shape[1], "keep this layer in 16 bits")
    require(dtype in _DTYPES.values(), "nf4 weight", f"the weight's dtype must be one of {allowed}", lambda: dtype, "convert it first")


def _unpacked(packed: Tensor, name: str) -> dict:
    """The JSON in bitsandbytes' quant_state tensor."""
    try:
        return dict(json.loads(bytes(packed.cpu().numpy())))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {_STATE}nf4 must be JSON, got {error}; download the checkpoint again") from error


def bitsandbytes_functional():
    import logging

    # at import bitsandbytes logs that an optional kernel package is absent
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional
