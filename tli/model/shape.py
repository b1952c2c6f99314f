"""A decoder's sizes out of its config.json, without transformers: what its linear layers measure, and what a block weighs.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import re

from tli.model.families import FAMILIES, Family, family_of
from tli.runtime.errors import TliError
from tli.runtime.patterns import Pattern, pattern

QUANTISED = "the weights must be unquantised or bitsandbytes' NF4"
# under these a config.json speaks of quantised weights, and under those of the model that they were made from
_QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
_ORIGINAL_KEYS = ("base_model_name_or_path", "base_model", "_name_or_path", "model_name_or_path")

NF4_BYTES = 0.5 + 4 / 64

# tokens of a window of a page of text: several of them make an interval, and a step of training looks at some
SHORT_WIDTH, KEPT_WINDOWS = 64, 4
# of tables, where the weights that they replace are smaller
MOST_TABLE_BYTES = 64 << 20

Layer = int | str


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder's sizes; ``family`` is its name in ``families.FAMILIES``.

    biases      last names of the linear layers that have them
    norms       norms of a block that are as wide as the model
    head_norms  queries and keys have norms, too
    beside      numbers held beside embedding, blocks and final norm: learned positions, a norm behind the embedding
    """

    family: str
    blocks: int
    width: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    biases: tuple[str, ...]
    norms: int = 2
    head_norms: bool = False
    beside: int = 0

    @classmethod
    def from_config(cls, config: dict, name: str) -> Shape:
        """The shape that a ``config.json`` describes; of a model of text and images the decoder's.

        Raises:
            TliError: another family, quantised weights other than NF4, or a size that is missing or no number.
        """
        require_unquantised(config, name)
        # a config's own names for its text part, as transformers reads them
        config = next((config[key] for key in ("text_config", "decoder", "text_encoder") if isinstance(config.get(key), dict)), config)
        family = str(config.get("model_type"))
        traits = family_of(family, name)
        config = traits.read(config, name)
        try:
            width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            head_dim = int(config.get("head_dim", width // heads))
            keys = int(traits.key_heads(config) if traits.key_heads else config.get("num_key_value_heads", heads))
            inside = config["intermediate_size"] if traits.inside is None else config.get("intermediate_size", traits.inside * width)
            blocks, hidden, vocabulary = int(config["num_hidden_layers"]), int(inside), int(config["vocab_size"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise TliError(name, "config.json must give the model's sizes", repr(error), "check the file") from error
        biases = tuple(path for key, paths in traits.biases.items() if key == "always" or config.get(key) for path in paths)
        head_norms = bool(config.get(traits.head_norms) if isinstance(traits.head_norms, str) else traits.head_norms)
        beside = width * traits.rows_beside(config)
        return cls(family, blocks, width, hidden, heads, keys, head_dim, vocabulary, biases, traits.norms(config), head_norms, beside)

    @property
    def traits(self) -> Family:
        """What sets its family apart."""
        return FAMILIES[self.family]

    @property
    def down(self) -> str:
        """The path of the linear layer that ends the MLP."""
        return next(reversed(self.traits.linear))

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.key_heads * self.head_dim

    def linear(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each linear layer of a block, by its path in the block."""
        size = {"d": self.width, "i": self.hidden, "q": self.queries, "k": self.keys}
        return {path: (sum(size[part] for part in n), size[k]) for path, (n, k) in self.traits.linear.items()}

    def block_bytes(self, weights: str, element: int) -> int:
        """Of one block's frozen weights: linear ones in the compute dtype or NF4, biases and norms in the compute dtype."""
        linear, traits = self.linear(), self.traits
        numbers = sum(n * k for n, k in linear.values())
        biases = sum(n for path, (n, _) in linear.items() if path.rpartition(".")[2] in self.biases)
        normed = self.queries + self.keys if traits.across_heads else 2 * self.head_dim
        norms = (self.norms + 2 * traits.norms_behind) * self.width * (1 + traits.norm_biases) + normed * self.head_norms
        return int(numbers * (NF4_BYTES if weights == "nf4" else element)) + element * (biases + norms + traits.numbers)


def require_unquantised(config: dict, name: str) -> None:
    """Raise ``TliError`` where a ``config.json`` speaks, in whichever of its parts, of quantised weights other than bitsandbytes' NF4."""
    for part in _parts(config):
        for key in _QUANTISED_KEYS:
            stored = part.get(key) or {}
            # whatever else it may be, it is not NF4
            told = stored if isinstance(stored, dict) else {"quant_method": stored}
            method, kind = told.get("quant_method"), "int8" if told.get("load_in_8bit") else told.get("bnb_4bit_quant_type")
            if told and (method, kind) != ("bitsandbytes", "nf4"):
                got = f"{key} {method}, {kind or 'no NF4'}"
                raise TliError(name, QUANTISED, got, original_of(config, name))


def original_of(config: dict, name: str) -> str:
    """What to do about quantised weights: use those that they were made from, whose name a ``config.json`` may tell."""
    told = (part[key] for key in _ORIGINAL_KEYS for part in _parts(config) if isinstance(part.get(key), str))
    # many give their own name there
    original = next(
        (found for found in told if found.rstrip("/").rpartition("/")[2] not in ("", name.rstrip("/").rpartition("/")[2])), None
    )
    return "use the model's original checkpoint" + (f": config.json names {original}" if original else "")


def _parts(config: dict) -> list[dict]:
    """A config and the configs within it, the outer before the inner."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    return [config, *(part for value in inner for part in _parts(value))]


def targets_of(family: Family, block: int, targets: str) -> tuple[str, ...]:
    """The linear layers of this block that ``--targets`` means; what nothing matches is for the injector to refuse."""
    linear = tuple(family.linear)
    if targets == "all-linear":
        return linear
    if re.fullmatch(r"\w+(\s*,\s*\w+)*", targets):
        names = [name.strip() for name in targets.split(",")]
        return tuple(path for path in linear if path.rpartition(".")[2] in names)
    wanted = target_pattern(targets)
    return tuple(path for path in linear if wanted.fullmatch(path) or wanted.fullmatch(f"{family.blocks}.{block}.{path}"))


def target_pattern(targets: str) -> Pattern:
    """The regular expression that ``--targets`` is where it is no list of names."""
    return pattern(targets, "--targets", "the targets must be names or a regular expression")


def table_bytes(rows: int, outputs: int, element: int, weight_bytes: int) -> int | None:
    """How large the tables of block 0's q, k and v products are, or None where they would take more memory than they are worth.

    Args:
        rows:          V, the embedding rows that are kept: a product for each
        outputs:       out-features of q, k and v together
        element:       bytes of a number in the compute dtype
        weight_bytes:  what the weights that they replace take, as they are held
    """
    wanted = rows * outputs * element
    return wanted if wanted <= max(MOST_TABLE_BYTES, weight_bytes) else None
