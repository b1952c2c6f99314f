"""A linear layer's products, looked up: y = table[token], where the layer's input depends on the token alone.

That is so of the first block's q, k and v in front of the first adapter: embedding and norm see one token at a time. The products
stand in the place of the weight, as an ``NF4Weight`` does. Letters: V distinct tokens, M rows, N out-features, K in-features.
"""

import dataclasses

import torch
from tli_kernels.checks import require
from torch import Tensor


@dataclasses.dataclass(eq=False)
class TokenTable:
    """The products of V tokens' inputs with one layer's weight [N, K], its bias in them, in the place of that weight.

    Fields:
        products  [V, N]             in the compute dtype
        shape     torch.Size (N, K)  of the weight
        tokens    int64 [...]        whose products the next call wants, M in all: set by whoever runs the model

    There is no way back to the input: it must want no gradient.
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

    def looked_up(self, x: Tensor) -> Tensor:
        """The products of the rows x [M, K]: [M, N], in memory of their own.

        Raises:
            ValueError: tokens that are not those of x's rows, or an x that wants a gradient.
        """
        rows = None if self.tokens is None else self.tokens.numel()
        require(rows == x.shape[0], "token table", f"the tokens of {x.shape[0]} rows must have been set", lambda: rows, "run the model")
        require(not x.requires_grad, "token table", "the input must want no gradient", lambda: "one that does", "keep the weight itself")
        return self.products[self.tokens.flatten()]
