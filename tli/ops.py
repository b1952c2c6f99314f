"""The only door to ``tli_kernels``: picks the implementation of the ops, and says once which and why.

The reference ops are plain PyTorch and run everywhere. The fused Triton ops are not built yet; asking for them explicitly
is an error, never a silent fall-back.
"""

from tli_kernels import reference

from tli.errors import TliError

nf4_lora = reference.nf4_lora
pool_norm = reference.pool_norm
infonce = reference.infonce
hinge = reference.hinge


def choose(impl: str) -> str:
    """Choose the ops for ``impl`` (auto, reference, fused) and return one line that says which were taken and why."""
    if impl == "fused":
        raise TliError(
            "--impl", "the fused ops must be available", "a version that has only the reference ops", "use --impl auto or reference"
        )
    return "reference ops (plain PyTorch): this version has no fused ones"
