"""The named shapes that every op is tested, compiled, tuned and timed on: the linear layers of five real models.

Source: the models' config.json. Letters: M rows, K in-features, N out-features.
"""

import dataclasses

# rows of x: one word, a batch of words as a trie, a packed epoch
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)


@dataclasses.dataclass(frozen=True)
class Model:
    """What a decoder's linear layers follow from."""

    width: int
    queries: int
    keys: int
    hidden: int

    def projections(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each linear layer's weight."""
        return {
            "q_proj": (self.queries, self.width),
            "k_proj": (self.keys, self.width),
            "v_proj": (self.keys, self.width),
            "o_proj": (self.width, self.queries),
            "gate_proj": (self.hidden, self.width),
            "up_proj": (self.hidden, self.width),
            "down_proj": (self.width, self.hidden),
        }


MODELS = {
    "smollm2-135m": Model(width=576, queries=576, keys=192, hidden=1536),
    "llama-3.2-1b": Model(width=2048, queries=2048, keys=512, hidden=8192),
    "llama-3-8b": Model(width=4096, queries=4096, keys=1024, hidden=14336),
    "qwen3-4b": Model(width=2560, queries=4096, keys=1024, hidden=9728),
    "gemma-3-4b": Model(width=2560, queries=2048, keys=1024, hidden=10240),
}


def weights() -> dict[str, tuple[int, int]]:
    """(N, K) by ``model/projection``, each distinct size of a model once."""
    named = {}
    for name, model in MODELS.items():
        sizes = {size: projection for projection, size in reversed(model.projections().items())}
        named.update({f"{name}/{projection}": size for size, projection in reversed(sizes.items())})
    return named


def twin(size: tuple[int, int]) -> tuple[int, int]:
    """A small size with the same remainders as ``size``: what the interpreter can do in a moment.

    K stays a multiple of 64 (and odd multiples stay odd); N keeps its remainder by 128.
    """
    n, k = size
    return 128 + n % 128 + (64 if n > k else 0), 64 * (2 + (k // 64) % 2)
