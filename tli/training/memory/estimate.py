"""How much memory a training run takes at most, by arithmetic: the model's shape and the batch's nodes in, bytes by category out.

A run is largest in one of three moments, and what is alive then is counted tensor by tensor:

    loss       all that the forward pass saves, and what the loss needs beside it
    backward   the same without the loss's share, and what the last block's MLP needs for its gradients
    optimiser  the gradients of the adapters, and AdamW's temporaries

Letters: T nodes of a part (padding included), D width, I the MLP's inside, Q and KV of queries and keys, R rank, e bytes of a number in
the compute dtype, P the adapters' parameters. A norm saves its input in fp32; a linear layer with an adapter saves its input and
kept(x)·Aᵀ, a frozen one nothing. Imports neither torch nor transformers: it must answer at once, and before anything is loaded.
"""

import dataclasses
import math

from tli.model.shape import KEPT_WINDOWS, NF4_BYTES, Shape, table_bytes, targets_of

CATEGORIES = ("weights", "embedding rows", "activations", "gradients and optimiser", "workspace", "words")
MB = 10**6

# anonymous memory of a process with torch 2.13 and transformers 5.23 imported, and of bitsandbytes on top; measured, Linux
IMPORTS_BYTES, BITSANDBYTES_BYTES = 290 * MB, 25 * MB
# of a byte of tokenizer.json, or, where that is not at hand, of an entry of the vocabulary; measured on 49 and 128 thousand entries
TOKENIZER_BYTES_PER_BYTE, TOKENIZER_BYTES_PER_ENTRY = 12.5, 1500
# what is loaded or compiled with the first steps, and the holes in glibc's heap, of a step's bytes and of the adapters' gradients; a
# rule of thumb, fitted to ten runs (docs/performance.md), glibc 2.36. Larger tensors than 32 MB are not on the heap
FIRST_STEPS_BYTES, HOLES, HOLES_OF_LARGE, GRADIENT_HOLES, MAPPED_BYTES = 60 * MB, 0.8, 0.2, 6, 32 << 20
# of oneDNN's programs in bf16: what one run of a small model had beyond all this; with a large one nothing was seen
PROGRAMS_BYTES = 120 * MB
# not measured: no GPU was at hand. A context with kernels of torch and Triton; cuBLAS's workspace, which torch allocates
CUDA_CONTEXT_BYTES, CUBLAS_BYTES = 450 * MB, 8_519_680
# of a pair of the list (bench/long_lists.py)
PAIR_BYTES = 100
# of numbers decoded at a time on a CPU (kernels/cpu.py), of cosines in a block (kernels/blocked.py), of keys by which dropout keeps
# (kernels/reference.py)
_DECODED, _COSINES, _KEYS = 1 << 22, 1 << 24, 1 << 17
# of a common card, where sums are split so that each has work
_PROCESSORS = 108


@dataclasses.dataclass(frozen=True)
class Part:
    """What goes through the model at once: the packed words of ``pairs`` pairs, T = bins·width nodes."""

    pairs: int
    bins: float
    width: int

    @property
    def nodes(self) -> float:
        return self.bins * self.width

    def of(self, pairs: int) -> "Part":
        """About what so many pairs would be: nodes grow with the pairs, the largest width stays."""
        return self if pairs == self.pairs else Part(pairs, max(1.0, self.bins * pairs / self.pairs), self.width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run as far as memory goes; ``device`` is cpu (its fastest products) or gpu (the fused ops), or ``exact``: the reference ops."""

    shape: Shape
    part: Part
    batch: int
    list_pairs: int
    rows: int
    arm: str = "early"
    layer: int = 2
    rank: int = 16
    targets: str = "all-linear"
    dropout: float = 0.2
    weights: str = "full"
    checkpointing: bool = False
    micro_batch: int | None = None
    device: str = "cpu"
    element: int = 4
    token_norm: bool = True
    exact: bool = False
    eager_attention: bool | None = None
    # products of 16-bit numbers are made in fp32 (a CPU without 16-bit ones)
    in_float32: bool = False
    tokenizer_bytes: int | None = None
    # windows of kept text, and their tokens
    kept_windows: int = 0
    kept_width: int = 0

    @property
    def blocks(self) -> int:
        return self.layer if self.arm == "early" else self.shape.blocks

    def adapted(self, block: int) -> tuple[str, ...]:
        return targets_of(self.shape.traits, block, self.targets) if self.arm == "full" or block < self.layer else ()

    @property
    def parameters(self) -> int:
        """P, of all adapters."""
        linear = self.shape.linear()
        return self.rank * sum(sum(linear[path]) for block in range(self.blocks) for path in self.adapted(block))

    @property
    def fused(self) -> bool:
        return self.device == "gpu"

    @property
    def eager(self) -> bool:
        """Whether attention keeps its T × T weights: for soft-capping, and, where nobody says it, in 16 bits on a CPU."""
        always = self.shape.traits.soft_caps or self.shape.traits.only_eager
        if self.eager_attention is not None:
            return always or self.eager_attention
        return always or (self.element < 4 and not self.fused and not self.exact)

    @property
    def in_parts(self) -> bool:
        return self.micro_batch is not None and self.micro_batch < self.batch

    @property
    def current(self) -> Part:
        """What goes through the model at once."""
        return self.part.of(min(self.batch, self.micro_batch or self.batch))


def predict(run: Run) -> dict[str, int]:
    """Bytes by category at the run's largest moment: ``CATEGORIES``, and what the process or the CUDA context takes beside them."""
    shape, parameters = run.shape, run.parameters
    tables, replaced = _tables(run)
    weights = run.blocks * shape.block_bytes(run.weights, run.element) - replaced
    # the norm behind the last block, and the token norm's copy of it
    final = shape.width * (1 + shape.traits.norm_biases)
    weights += run.element * (final * (run.arm != "early") + shape.beside) + 4 * shape.width * run.token_norm
    held, workspace, gradients = max([*_moments(run).values(), *_moments_of_kept_text(run)], key=sum)
    bytes_of = {
        "weights": weights,
        "embedding rows": run.element * run.rows * shape.width + tables,
        "activations": held,
        # AdamW keeps two moments beside each parameter, all in fp32
        "gradients and optimiser": 12 * parameters + gradients,
        "workspace": workspace + _kept_workspace(run),
        "words": words_bytes(run),
    }
    if run.fused:
        bytes_of["CUDA context"] = CUDA_CONTEXT_BYTES
    else:
        bytes_of["imports and tokenizer"] = process_bytes(run)
        bytes_of["allocator"] = FIRST_STEPS_BYTES + _holes(run, held + workspace)
    return {name: int(value) for name, value in bytes_of.items()}


def _moments(run: Run) -> dict[str, tuple[float, float, float]]:
    """(activations, workspace, gradients) at each moment that can be the largest."""
    shape, blocks, parameters = run.shape, run.blocks, 4 * run.parameters
    nodes, element, width = run.current.nodes, run.element, shape.width
    held = [saved_activations(run, block) for block in range(blocks)]
    again = [0.0] * blocks
    if run.checkpointing:
        # of each block what goes in; one at a time is computed again, and then it is workspace
        inputs = nodes * element * width
        again, held = [own - inputs for own in held], [inputs] * blocks
    # cosines and sines of the positions, for both kinds of frequencies where there are two
    angles = 2 * nodes * shape.head_dim * element * shape.traits.rotary_kinds
    # behind the hook a graph is built, and dropped
    above = run.layer if run.arm == "full-hook" else blocks
    head, words, mlp = _head(run), 8 * run.batch * width, _mlp_workspace(run) + nodes * width * element
    # the gradient cache holds the words' vectors twice, and their gradients (tli/training/grad_cache.py)
    cached, before = 3 * words * run.in_parts, parameters * run.in_parts
    largest = max(n * k for n, k in shape.linear().values())
    factor = run.rank * max((max(shape.linear()[path]) for path in run.adapted(0)), default=0)
    # an NF4 weight is made from the whole tensor on a GPU, from a part on a CPU, with bitsandbytes' copies
    packing = (2 * largest if run.fused else 16 * min(largest, _DECODED)) if run.weights == "nf4" else 0
    # what the functions on the way still name: the embedding's output, the block's, the residual, the MLP's; and its product, unsaved
    on_the_way = _product_parts(run, width, shape.hidden) + (5 if element < 4 else 2) * nodes * width * element
    on_the_way += nodes * shape.hidden * element * (shape.down not in run.adapted(blocks - 1))
    return {
        "loading": (0, max(0, packing - _kept_workspace(run)), 0),
        "forward": (sum(held) + angles, on_the_way, before),
        "loss": (head if run.in_parts else sum(held[:above]) + angles + head, _loss_workspace(run) + cached, before),
        # each block in its turn, when those above it have let go of theirs and have their gradients
        **{
            f"block {block}": (
                sum(held[: block + 1]) + angles,
                mlp + again[block] + cached,
                max(before, parameters * (above - 1 - block) / above),
            )
            for block in range(above)
        },
        # AdamW takes roots and quotients of all second moments at once on a GPU, of one parameter's at a time on a CPU
        "optimiser": (0, parameters if run.fused else 12 * factor, parameters),
    }


def _moments_of_kept_text(run: Run) -> list[tuple[float, float, float]]:
    """The same of the pass over kept text, behind the words' own, whose gradients are all there by then."""
    if not run.kept_windows:
        return []
    # its head is no larger than that of two words: a difference in fp32
    part = Part(2, min(KEPT_WINDOWS, run.kept_windows), run.kept_width)
    moments = _moments(dataclasses.replace(run, part=part, batch=2, micro_batch=None, kept_windows=0))
    return [(*moments[name][:2], 4 * run.parameters) for name in moments if name not in ("loading", "optimiser")]


def _saved_at_most(run: Run, block: int) -> float:
    """Bytes that block ``block`` saves for its backward pass, at most, of a family whose parts are not counted one by one.

    As if every linear layer and norm kept its input, fused or not.
    """
    shape, part, e = run.shape, run.current, run.element
    t, d, i, q, kv = part.nodes, shape.width, shape.hidden, shape.queries, shape.keys
    adapted = run.adapted(block)
    if not adapted and not any(run.adapted(below) for below in range(block)):
        return 0.0
    low = 4 if run.fused or run.in_float32 else e
    saved = sum(low * t * run.rank * _low_rank_parts(run, shape.linear()[path][1]) for path in adapted)
    saved += sum((e + (e + 1) * bool(run.dropout and run.exact)) * t * shape.linear()[path][1] for path in adapted)
    saved += 4 * t * (d + 2) * shape.norms + 4 * t * (q + kv) * shape.head_norms + e * t * i * (shape.traits.kept_inside or 0)
    saved += 4 * e * t * q
    return saved + (part.bins * shape.heads * part.width**2 * (4 + 2 * e * (e < 4)) if run.eager else 4 * t * shape.heads)


def saved_activations(run: Run, block: int) -> float:
    """Bytes that block ``block`` saves for its backward pass."""
    if run.shape.traits.kept_inside is not None:
        return _saved_at_most(run, block)
    shape, part, e = run.shape, run.current, run.element
    t, d, i, q, kv = part.nodes, shape.width, shape.hidden, shape.queries, shape.keys
    adapted = {path.rpartition(".")[2] for path in run.adapted(block)}
    # whether a gradient reaches what goes in
    flows = any(run.adapted(below) for below in range(block))
    low = 4 if run.fused or run.in_float32 else e
    saved = sum(low * t * run.rank * _low_rank_parts(run, shape.linear()[path][1]) for path in run.adapted(block))
    if run.dropout and run.exact:
        # the reference ops keep the dropped copy and its mask
        saved += sum((e + 1) * t * shape.linear()[path][1] for path in run.adapted(block))
    saved += 4 * t * d * flows + e * t * d * bool(adapted & {"q_proj", "k_proj", "v_proj"})
    into_queries, into_keys = flows or "q_proj" in adapted, flows or "k_proj" in adapted
    if shape.head_norms:
        saved += 4 * t * (q * into_queries + kv * into_keys)
    attends = into_queries or into_keys or "v_proj" in adapted
    if attends and not run.eager:
        # queries, keys and values for each query head, what comes out, and the logarithms of the sums
        saved += 4 * e * t * q + 4 * t * shape.heads
    elif attends:
        # keys and values for the queries' gradient, queries and values for the keys', and what comes out as o_proj's input
        saved += e * t * q * (into_queries + into_keys + (into_queries or into_keys) + ("o_proj" in adapted))
        weights = part.bins * shape.heads * part.width**2
        saved += weights * (4 + 2 * e * (e < 4) + e * (e == 4) * shape.traits.soft_caps)
    else:
        saved += e * t * q * ("o_proj" in adapted)
    flows = attends or flows or "o_proj" in adapted
    saved += 4 * t * d * flows * (2 if shape.traits.norms_behind else 1) + e * t * d * bool(adapted & {"gate_proj", "up_proj"})
    into_gate, into_up = flows or "gate_proj" in adapted, flows or "up_proj" in adapted
    # gate, its activation, up, and their product
    saved += e * t * i * (into_gate + into_up + into_gate + ("down_proj" in adapted))
    return saved + 4 * t * d * shape.traits.norms_behind * (into_gate or into_up or "down_proj" in adapted)


def _mlp_workspace(run: Run) -> float:
    """Of a block's MLP, backward: what its gradients take, less what is let go meanwhile."""
    t, e, i = run.current.nodes, run.element, run.shape.hidden
    adapted = run.shape.down in run.adapted(run.layer - 1 if run.arm == "full-hook" else run.blocks - 1)
    # of the product and its two factors; down_proj's adapter has let go of the product
    inside = e * t * i * (3 - adapted)
    # the gradients of its own factors, while the last of them is made
    factors = 4 * run.rank * (i + run.shape.width) * adapted
    if run.fused:
        return max(inside, e * t * i + _product_parts(run, i, run.shape.width))
    if run.exact:
        return inside
    if run.in_float32:
        # dy, the input and what is kept of it, in fp32; then the weight and dx (of a decoded part its product beside dx), or dx and the
        # low-rank term's
        wide = 4 * t * (run.shape.width + i * (1 + bool(run.dropout and adapted)))
        weight = 4 * run.shape.width * i + 4 * t * i
        if run.weights == "nf4":
            weight = (4 + e) * min(_DECODED, run.shape.width * i) + 8 * t * i
        return max(inside, wide + max(weight, 8 * t * i * adapted)) + factors
    if run.weights == "nf4":
        # dx is summed in fp32
        kept = e * t * i * bool(run.dropout and adapted)
        inside = max(inside, (4 + e) * t * i + kept + e * min(_DECODED, run.shape.width * i))
    if not (run.dropout and adapted):
        return inside + factors
    # dx, the low-rank term's, and what dropout keeps; or that while it is made
    return max(inside + factors, 3 * e * t * i + factors, e * t * i + (8 + e) * min(t * i, _KEYS))


def _splits(terms: int, least: int, tiles: int) -> int:
    """Into how many parts the fused ops split a sum whose result has few tiles (kernels/launch.py, on a card of 108 processors)."""
    wanted = max(1, 2 * _PROCESSORS // max(1, tiles))
    return -(-terms // (-(-terms // (least * wanted)) * least))


def _low_rank_parts(run: Run, terms: int) -> int:
    """How many partial sums of kept(x)·Aᵀ are kept."""
    rows, columns, least = (32, 16, 128) if run.element == 4 else (64, 32, 256)
    return _splits(terms, least, math.ceil(run.current.nodes / rows) * -(-run.rank // columns)) if run.fused else 1


def _product_parts(run: Run, length: int, terms: int) -> float:
    """Bytes of a product's partial sums, fp32 [parts, T, length]; none where its result has tiles enough."""
    t, few = run.current.nodes, run.weights == "nf4" or run.current.nodes <= 64
    rows, columns, least = (32, 64, 256) if run.element == 4 else (min(64, 1 << math.ceil(math.log2(max(16, t)))), 64, 256)
    if run.element < 4 and not few:
        rows, columns, least = 128, 128, 128
    parts = _splits(terms, least, math.ceil(t / rows) * -(-length // columns)) if run.fused else 1
    return 4 * parts * t * length if parts > 1 else 0.0


def _head(run: Run) -> float:
    """Saved behind the last block: final or token norm, pooled words, the loss."""
    words, nodes, d = 2 * run.batch, run.current.nodes, run.shape.width
    states = nodes * d * (run.element if run.fused or run.element == 4 else 4 + run.element)
    pooled = words * d * 4 * (1 if run.fused else 2)
    whole = run.batch**2 <= _COSINES and not run.fused
    return states * (run.token_norm or run.arm == "full") + pooled + (8 * run.batch**2 if whole else 0)


def _loss_workspace(run: Run) -> float:
    """Of the loss, backward: cosines, or blocks of them, and the words' gradients."""
    gradients = 2 * run.batch * run.shape.width * 4
    if run.fused:
        # squares of weights in two halves of 16 bits, and rows split likewise (kernels/infonce.py)
        return 2 * gradients + 4 * min(run.batch, 2048) ** 2
    return gradients + 16 * min(run.batch**2, _COSINES)


def _kept_workspace(run: Run) -> int:
    """Of a GPU, for good: cuBLAS's, and one dequantised weight that all layers share (kernels/nf4_lora.py)."""
    if not run.fused:
        return 0
    decoded = run.element * max(n * k for n, k in run.shape.linear().values()) if run.weights == "nf4" and run.current.nodes > 64 else 0
    return CUBLAS_BYTES + decoded


def _tables(run: Run) -> tuple[int, int]:
    """Bytes of the tables in the place of block 0's q, k and v weights (tli/model/token_table.py), and of those weights and biases."""
    replaced = {path: run.shape.linear()[path] for path in run.shape.traits.tables}
    weights = int(sum(n * k for n, k in replaced.values()) * (NF4_BYTES if run.weights == "nf4" else run.element))
    tables = None if run.exact or not replaced else table_bytes(run.rows, sum(n for n, _ in replaced.values()), run.element, weights)
    biases = run.element * sum(n for path, (n, _) in replaced.items() if path.rpartition(".")[2] in run.shape.biases)
    return (0, 0) if tables is None else (tables, weights + biases)


def words_bytes(run: Run) -> int:
    """Of the words: of each pair where it lies on disk and its words' keys; of a batch's nodes a row of the mask and five numbers; of
    kept text the states that are to stay."""
    nodes = run.part.of(run.batch).nodes
    kept = run.kept_windows * run.kept_width * run.shape.width * run.element
    return int(nodes * (run.part.width * run.element + 5 * 8) + run.list_pairs * PAIR_BYTES + kept)


def process_bytes(run: Run) -> int:
    """Of the process before anything is loaded: imports and the tokenizer."""
    tokenizer: float = TOKENIZER_BYTES_PER_ENTRY * run.shape.vocabulary
    if run.tokenizer_bytes is not None:
        tokenizer = TOKENIZER_BYTES_PER_BYTE * run.tokenizer_bytes
    return int(IMPORTS_BYTES + tokenizer + BITSANDBYTES_BYTES * (run.weights == "nf4"))


def _holes(run: Run, step: float) -> float:
    """Bytes that glibc's heap holds and nobody uses: many where a model's weights lie on it, too, few where they do not."""
    on_heap = 4 * max(n * k for n, k in run.shape.linear().values()) < MAPPED_BYTES
    programs = PROGRAMS_BYTES * (run.element < 4 and not run.exact)
    return HOLES * step + GRADIENT_HOLES * 4 * run.parameters + programs if on_heap else HOLES_OF_LARGE * step


def total(bytes_of: dict[str, int]) -> int:
    """The sum over all categories."""
    return sum(bytes_of.values())


def allocations(bytes_of: dict[str, int]) -> int:
    """The sum over what a run allocates itself: ``CATEGORIES``."""
    return sum(bytes_of[name] for name in CATEGORIES)
