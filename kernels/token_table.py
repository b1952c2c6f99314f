"""Lookup table of a linear layer's outputs by token id: y = table[token], for a layer whose input depends on the token alone.

The first block's q, k and v before the first adapter are such layers: embedding and norm see one token at a time. The table replaces
the weight, as an ``NF4Weight`` does. Letters: V distinct tokens, M rows, N out-features, K in-features.
"""

import dataclasses

import torch
from tli_kernels.checks import require
from torch import Tensor


@dataclasses.dataclass(eq=False)
class TokenTable:
    """The outputs of one linear layer for V tokens, bias included, in place of its weight [N, K].

    Fields:
        products  [V, N]             in the compute dtype
        shape     torch.Size (N, K)  of the weight
        tokens    int64 [...]        the M tokens of the next call's rows; set before each run of the model

    No gradient flows to the input, so it must require none.
    """

    products: Tensor
    shape: torch.Size
    tokens: Tensor | None = None

    ndim = 2

    @property
    def device(self) -> torch.device:
        return self.products.device

    @property
    def nbytes(self) -> int:
        return self.products.nbytes

    def lookup(self, x: Tensor) -> Tensor:
        """The outputs for the rows x [M, K]: [M, N], a copy.

        Raises:
            ValueError: not one token for each row of x, or an x that requires a gradient.
        """
        rows = None if self.tokens is None else self.tokens.numel()
        require(rows == x.shape[0], "token table", f"the tokens of {x.shape[0]} rows must have been set", lambda: rows, "run the model")
        require(not x.requires_grad, "token table", "the input must want no gradient", lambda: "one that does", "keep the weight itself")
        return self.products[self.tokens.flatten()]
