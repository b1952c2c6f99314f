"""What a run is made of: frozen dataclasses, from which the commands' flags and help are derived.

A field is declared once, with its default, its group and its help; ``tli/runtime/cli.py`` makes flags of them.
"""

import dataclasses
import os
import pathlib
import re
from typing import ClassVar, Literal, get_args

from tli.runtime.cli import argument, check, option
from tli.runtime.errors import TliError

Arm = Literal["early", "full", "full-hook"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Impl = Literal["auto", "reference", "fused"]
Split = Literal["families", "words"]
MapChoice = Literal["auto", "none"]
Recipe = Literal["default", "contrastive", "paper"]
TokenNorm = Literal["auto", "final", "rms", "none"]
Weights = Literal["full", "nf4"]
# whose shapes the kernels know by name (kernels/shapes.py)
Model = Literal["smollm2-135m", "llama-3.2-1b", "llama-3-8b", "qwen3-4b", "gemma-3-4b"]
MODELS: tuple[str, ...] = get_args(Model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListConfig:
    """What every command that reads a word list is told of it."""

    pairs: str | None = option(
        None,
        "words",
        "word pairs: a file of any format of docs/formats.md, or - for standard input (default: the shipped Swahili-English list)",
    )
    source: str = option("swahili", "words", "name of the source language's column or key, or of the language")
    target: str = option("english", "words", "name of the target language's column or key, or of the language")
    skip_bad_rows: bool = option(False, "words", "leave out rows that hold no pair of words, in place of an error that lists them")
    split_glosses: bool = option(False, "words", "split cells such as 'house, home (of people)' into glosses, without notes and markup")


LIST_OPTIONS = tuple(field.name for field in dataclasses.fields(ListConfig))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(ListConfig):
    """Train LoRA adapters that align word pairs at one layer of a language model."""

    EXAMPLE: ClassVar[str] = "{prog} --rank 16 --layer 2"

    model: str | None = option(None, "model", "local folder or hub name of a Hugging Face checkpoint (default: the starter, SmolLM2-135M)")
    arm: Arm = option(
        "early",
        "model",
        "early: the model ends at --layer, adapters in all its blocks; full: the whole model, adapters in all its blocks, the loss at the "
        "output, after the final norm; full-hook: early's adapters and loss, caught by a hook in the whole model",
    )
    layer: int | Literal["auto"] = option(
        "auto",
        "model",
        "hidden state to align: the residual stream after this many blocks; auto takes the one where the trained pairs' gap is surely the "
        "largest before training, which wants one pass over all blocks (--arm full aligns the output, and its report shows this layer "
        "beside it)",
        contrastive=2,
        paper=2,
    )
    weights: Weights = option("full", "model", "frozen weights: full precision, or rounded to NF4", paper="nf4")
    all_rows: bool = option(False, "model", "keep the whole embedding table, not only the rows that the words use")
    dtype: DType = option(
        "auto",
        "model",
        "compute dtype; auto is bfloat16 on a GPU; on a CPU float32 for whatever is measured, and for training the faster of the two",
        paper="bfloat16",
    )
    device: str = option("auto", "model", "cpu, cuda or cuda:N (auto: a GPU if there is one)")
    impl: Impl = option("auto", "model", "which implementation of the ops")

    prefix: str = option(" ", "words", "text before each word, never pooled; a space gives words as they stand in running text", paper="")
    held_out: float = option(0.1, "words", "share of the pairs kept out of training", above=0, below=1)
    split: Split = option(
        "families",
        "words",
        "what never stands on both sides: families, words of one stem (four letters in a row, in both languages; or a column family), or "
        "just the same words",
    )
    held_out_pairs: str | None = option(None, "words", "a list of its own to hold out, in place of a share of --pairs")
    shuffle_pairs: bool = option(False, "words", "control: train on mismatched pairs; whatever still rises is not alignment")

    rank: int = option(16, "adapter", "LoRA rank R", least=1)
    # None only until ``__post_init__``, as is every ``output`` that is typed so
    alpha: float = option(None, "adapter", "LoRA alpha; the scale is alpha/R (default: 2R)", above=0, most=1e6)
    rslora: bool = option(False, "adapter", "scale by alpha/sqrt(R) in place of alpha/R")
    targets: str = option(
        "all-linear", "adapter", "all-linear, a comma list of names, or a regular expression over module names", paper="q_proj,v_proj"
    )
    dropout: float = option(0.2, "adapter", "dropout on the adapters' input", least=0, below=1, paper=0.05)
    init: Literal["normal", "kaiming"] = option("normal", "adapter", "start of A: N(0, 1/K), or peft's Kaiming uniform", paper="kaiming")

    loss: Literal["infonce", "hinge"] = option(
        "infonce", "objective", "symmetric InfoNCE, or hinge with the hardest negative", paper="hinge"
    )
    temperature: float = option(0.1, "objective", "InfoNCE temperature", above=0)
    margin: float = option(0.4, "objective", "margin of the hinge", least=0)
    map: MapChoice = option(
        "auto",
        "objective",
        "auto: save beside the adapter a closed-form map of each language's trained states, of the kind that finds most of a part of the "
        "trained pairs in the frozen ones",
        contrastive="none",
        paper="none",
    )
    token_norm: TokenNorm = option(
        "auto",
        "objective",
        "what a token state goes through before the mean: the model's final norm, plain RMS, or nothing; auto is final, or rms where "
        "only that would need another shard",
        paper="none",
    )
    pool_bos: bool = option(False, "objective", "pool the first position (the attention sink) into every word while training", paper=True)
    eval_pool_bos: bool = option(False, "objective", "pool it in the measurements, too")

    batch: int = option(128, "training", "pairs per step", least=2, paper=8)
    micro_batch: int | None = option(
        None,
        "training",
        "run a batch through the model in parts of so many pairs: the memory of one part, equal gradients, more time",
        least=1,
    )
    epochs: int = option(
        8, "training", "passes over the trained pairs; 0 trains nothing and fits tli map's map", least=0, contrastive=50, paper=5
    )
    lr: float = option(2e-3, "training", "peak learning rate of AdamW", above=0, paper=2e-4)
    warmup: int = option(20, "training", "steps of linear warm-up", least=0, paper=50)
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "training", "decay after the warm-up")
    weight_decay: float = option(0.01, "training", "AdamW weight decay", least=0)
    clip: float = option(1.0, "training", "largest gradient norm; 0 turns clipping off", least=0)
    keep: str | None = option(
        None,
        "language model",
        "running text whose states at the layer should stay where they are (default: two shipped pages of Swahili and English, other ones "
        "than harm is measured on)",
    )
    keep_weight: float = option(
        100.0, "language model", "weight of that in the loss; 0 lets the text go", least=0, contrastive=0.0, paper=0.0
    )
    text: str | None = option(
        None,
        "language model",
        "running text that shows what training cost the language model (default: a shipped page of Swahili and one of English)",
    )

    checkpointing: bool = option(
        False, "training", "keep of each block only what goes in, and compute it again for the gradients: less memory, more time"
    )
    seed: int = option(0, "training", "fixes the split, the order, the adapters' start and the dropout", least=0, most=2**63 - 1)
    recipe: Recipe = option("default", "training", "where the defaults come from; flags that are given win")

    output: str = option(None, "output", "folder for the adapter and the report (default: runs/<recipe>[-<arm>]-layer<L>-rank<R>-seed<S>)")
    overwrite: bool = option(False, "output", "allow an output folder that is not empty")
    resume: bool = option(False, "output", "go on with the interrupted run in the output folder")
    no_report: bool = option(False, "output", "skip the measurements before and after")
    profile: bool = option(False, "output", "measure memory beside its prediction, and write a trace and a figure of one step")
    tensorboard: bool = option(False, "output", "also write TensorBoard events (needs tensorboard installed)")
    json: bool = option(False, "output", "print one JSON object on standard output when done")

    def __post_init__(self):
        check(self)
        if self.layer != "auto" and not isinstance(self.layer, int):
            raise TliError("--layer", "the layer must be a whole number or auto", repr(self.layer), "choose one of these")
        for name in ("model", "pairs", "held_out_pairs", "keep", "text"):
            # others read them out of the report, from wherever they stand
            if (path := getattr(self, name)) is not None and os.path.exists(os.path.expanduser(path)):
                object.__setattr__(self, name, os.path.abspath(os.path.expanduser(path)))
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        if self.output is None and self.epochs == 0:
            object.__setattr__(self, "output", _map_folder(self.model, self.seed))
        elif self.output is None:
            arm, shuffled = "" if self.arm == "early" else f"-{self.arm}", "-shuffled" if self.shuffle_pairs else ""
            object.__setattr__(self, "output", f"runs/{self.recipe}{arm}-layer{self.layer}-rank{self.rank}-seed{self.seed}{shuffled}")


def _as_in_training(name: str, by_recipe: bool = False, **changes):
    """The field of ``TrainConfig`` with this name, for another command; ``changes`` of its default, group or help."""
    field = next(field for field in dataclasses.fields(TrainConfig) if field.name == name)
    recipes = field.metadata["recipes"] or {"default": field.default}
    told = {"default": recipes["default"], "group": field.metadata["group"], "help": field.metadata["help"], **field.metadata["bounds"]}
    return option(**told | changes, **{name: value for name, value in recipes.items() if by_recipe and name != "default"})


def _named_after(model: str | None) -> str:
    """A path's last part, or that of a hub name."""
    return pathlib.Path(model or "starter").expanduser().resolve().name


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Measure on this GPU from how many rows on each way of a product is the fastest, and keep it for later runs."""

    EXAMPLE: ClassVar[str] = "{prog} --like llama-3-8b"

    device: str = option("cuda", "tuning", "the GPU: cuda or cuda:N")
    like: Model = option("llama-3-8b", "tuning", "the model whose linear layers are timed")
    dtype: Literal["bfloat16", "float16"] = option("bfloat16", "tuning", "compute dtype")
    rank: int = option(16, "tuning", "LoRA rank", least=1)
    dry_run: bool = option(False, "tuning", "measure and print, keep nothing")
    json: bool = _as_in_training("json", group="tuning")

    def __post_init__(self):
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig(ListConfig):
    """Predict, from config.json alone, the memory that training takes at most, by category, and what fits on a device of some size."""

    EXAMPLE: ClassVar[str] = "{prog} --arm full --batch 64"

    model: str | None = _as_in_training("model")
    arm: Arm = _as_in_training("arm")
    layer: int = option(2, "model", "hidden state to align: the residual stream after this many blocks", least=1)
    all_rows: bool = _as_in_training("all_rows")

    prefix: str = _as_in_training("prefix")
    held_out: float = _as_in_training("held_out", help="share of the pairs kept out of training", above=None, least=0)

    rank: int = _as_in_training("rank")
    targets: str = _as_in_training("targets")
    dropout: float = _as_in_training("dropout")

    batch: int = _as_in_training("batch")
    micro_batch: int | None = _as_in_training("micro_batch")
    checkpointing: bool = _as_in_training("checkpointing")
    keep_weight: float = _as_in_training("keep_weight")

    json: bool = _as_in_training("json")

    def __post_init__(self):
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanConfig(ListConfig):
    """Measure word pairs at every layer of a language model, in one pass with one block in memory at a time."""

    EXAMPLE: ClassVar[str] = "{prog} --sample 686"

    model: str | None = _as_in_training("model")
    adapter: str | None = option(None, "model", "folder of a PEFT adapter: it is scanned, too, beside the base")
    weights: Weights = _as_in_training("weights", by_recipe=True)
    dtype: DType = _as_in_training("dtype", by_recipe=True)
    device: str = _as_in_training("device")
    impl: Impl = _as_in_training("impl")

    prefix: str = _as_in_training("prefix", by_recipe=True)
    split: Literal["all", "trained", "held_out"] = option(
        "all",
        "words",
        "which of the pairs: all, or one side of the split that training makes with the same --held-out and --seed, and this "
        "--split-by as its --split",
    )
    held_out: float = option(0.1, "words", "share of the pairs that training keeps out", above=0, below=1)
    split_by: Split = _as_in_training("split")
    sample: int | None = option(None, "words", "take so many of these pairs, at random (default: all, of more than 5,000 as many as that)")
    seed: int = option(0, "words", "fixes the split, the sample and the intervals", least=0, most=2**63 - 1)

    token_norm: TokenNorm = option(
        "auto",
        "vectors",
        "what a token state goes through before the mean: the model's final norm, plain RMS, or nothing; auto is what training would "
        "take. The paper's vectors, with nothing and with BOS pooled, are always measured beside it",
        paper="none",
    )
    recipe: Recipe = _as_in_training("recipe", group="vectors")

    output: str = option(None, "output", "folder for scan.json and scan.png (default: runs/scan-<model>, or runs/scan-<adapter's folder>)")
    overwrite: bool = _as_in_training("overwrite")
    json: bool = _as_in_training("json")

    def __post_init__(self):
        check(self)
        if self.output is None:
            object.__setattr__(self, "output", f"runs/scan-{_named_after(self.adapter or self.model)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapConfig(ListConfig):
    """Fit the best closed-form map between the word states of two languages, in seconds and without training the model."""

    EXAMPLE: ClassVar[str] = "{prog} --layer auto"

    model: str | None = _as_in_training("model")
    layer: int | Literal["auto", "output"] = option(
        "auto", "model", "hidden state to map; auto takes the one whose map finds most of a part of the trained pairs"
    )
    weights: Weights = _as_in_training("weights")
    dtype: DType = _as_in_training("dtype")
    device: str = _as_in_training("device")
    impl: Impl = _as_in_training("impl")

    prefix: str = _as_in_training("prefix")
    held_out: float = _as_in_training("held_out", help="share of the pairs kept out of the fit, to judge it by")
    split: Split = _as_in_training("split")
    seed: int = option(0, "words", "fixes the split, the part that chooses, and the intervals", least=0, most=2**63 - 1)

    token_norm: TokenNorm = _as_in_training("token_norm", group="vectors")

    output: str = option(None, "output", "folder for map.safetensors and map.json (default: runs/map-<model>-seed<S>)")
    overwrite: bool = _as_in_training("overwrite")
    json: bool = _as_in_training("json")

    def __post_init__(self):
        check(self)
        if self.layer not in ("auto", "output") and not isinstance(self.layer, int):
            raise TliError("--layer", "the layer must be a whole number, output or auto", repr(self.layer), "choose one of these")
        if self.output is None:
            object.__setattr__(self, "output", _map_folder(self.model, self.seed))


def _map_folder(model: str | None, seed: int) -> str:
    return f"runs/map-{_named_after(model)}-seed{seed}"


def closed_form(config: TrainConfig) -> MapConfig:
    """What ``--epochs 0`` means: the closed-form map of the same model, list and layer.

    Raises:
        TliError: if an option asks for what a map does not know.
    """
    for name, given in (("--held-out-pairs", config.held_out_pairs), ("--shuffle-pairs", config.shuffle_pairs or None)):
        if given is not None:
            raise TliError(name, "a map, which is what --epochs 0 fits, must go without this option", given, "leave one of the two out")
    same = {field.name: getattr(config, field.name) for field in dataclasses.fields(MapConfig)}
    return MapConfig(**same | ({"layer": "output"} if config.arm == "full" else {}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare adapters with the base model, on trained and held-out words; or test a table of values from any source (--from-csv)."""

    EXAMPLE: ClassVar[str] = "{prog} runs/default-layer2-rank16-seed0 --text README.md"

    adapters: tuple[str, ...] = option((), "model", "folders of PEFT adapters, tli's own or another tool's")
    model: str | None = option(None, "model", "local folder or hub name of the model (default: the one that the adapter names)")
    weights: Weights | None = option(
        None, "model", "frozen weights: full precision, or rounded to NF4 (default: as in training, else full)"
    )
    dtype: DType = _as_in_training("dtype")
    device: str = _as_in_training("device")
    impl: Impl = _as_in_training("impl")

    pairs: str | None = option(None, "words", "word pairs (default: the list and the split of the training run, else the shipped list)")
    held_out_pairs: str | None = option(None, "words", "a list of words that training never saw, in place of the recorded split's")
    held_out: float | None = option(
        None, "words", "where no split is recorded: the share of --pairs that --seed of training held out", above=0, below=1
    )
    split: Split = _as_in_training("split", help="where no split is recorded: what that split kept on one side, families or words")
    source: str | None = option(None, "words", "name of the source language's column or key (default: as in training, else swahili)")
    target: str | None = option(None, "words", "name of the target language's column or key (default: as in training, else english)")
    skip_bad_rows: bool | None = option(None, "words", "leave out rows that hold no pair of words (default: as in training)")
    split_glosses: bool | None = option(None, "words", "split cells of several glosses (default: as in training)")
    prefix: str | None = option(None, "words", "text before each word, never pooled (default: as in training, else a space)")

    layers: str | None = option(None, "measures", "such as 2,8,output, or all (default: the aligned layer, the middle one and the output)")
    token_norm: TokenNorm | None = option(
        None,
        "measures",
        "what a token state goes through before the mean (default: as in training, else auto)",
    )
    sink: Literal["out", "in"] | None = option(
        None, "measures", "whether the first position is pooled into words (default: as in the run's own report)"
    )
    margin: float | None = option(
        None,
        "measures",
        "largest difference of mean gains that counts as none in the equivalence test (default: 0.05 of cosine; no such test of a table)",
        above=0,
    )
    seed: int | None = option(None, "measures", "fixes the resamples (default: the training run's, else 0)", least=0, most=2**63 - 1)

    text: str | None = option(
        None,
        "language model",
        "running text to measure perplexity and next-token distributions on (default: a shipped page of Swahili and one of English, where "
        "the output is among the layers)",
    )
    text_tokens: int = option(8192, "language model", "read no more of --text than this", least=2)
    window: int | None = option(None, "language model", "tokens of --text that see each other (default: 256, or what the model can see)")

    from_csv: str | None = option(None, "table", "statistics alone, on a table of per-pair values; no model is read")
    before: str = option("before", "table", "name of the column of values before")
    after: str = option("after", "table", "name of the column of values after")
    group: str | None = option(None, "table", "name of a column: test group by group, and group against group")
    cluster: str | None = option(None, "table", "name of a column: rows of one value, a shared word for instance, are resampled together")

    output: str | None = option(
        None, "output", "folder for evaluation.json and .md (default: ADAPTER/evaluation; a table's is only printed)"
    )
    overwrite: bool = _as_in_training("overwrite")
    json: bool = _as_in_training("json")

    def __post_init__(self):
        check(self)
        if bool(self.adapters) == (self.from_csv is not None):
            got = "both" if self.adapters else "neither"
            raise TliError("ADAPTER", "there must be adapters, or a table with --from-csv", got, "name one or the other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(ListConfig):
    """How alignment depends on LoRA rank, for an early layer against the full model: a grid of equal runs. (Another study, with its own
    options: python -m tli.study protocol, the paper's protocol with one switch changed at a time.)"""

    EXAMPLE: ClassVar[str] = "{prog} --ranks 1,4,16,64 --seeds 3 --jobs 2"

    ranks: str = option("1,2,4,8,16,32,64,128", "grid", "LoRA ranks, ascending, a comma between them; more can be added later")
    arms: str = option("early,full", "grid", "early, full, or both with a comma between them")
    seeds: int = option(
        5, "grid", "runs of each cell: seeds 0, 1, ... fix split, order, start and dropout; more can be added later", least=1
    )
    alpha_rule: Literal["2R", "rslora"] = option(
        "2R",
        "grid",
        "2R: alpha is twice the rank, so the scale is 2; rslora: the scale is 8/sqrt(R), 2 at rank 16",
    )
    rates: str = option("1e-4,3e-4,1e-3,3e-3", "grid", "learning rates tried once per arm; a single one is taken as it is")
    search_rank: int = option(16, "grid", "rank at which the rate is searched and the control on shuffled pairs is run", least=1)
    search_seeds: int = option(
        2, "grid", "runs of each rate that is tried: that rate is taken whose worst run finds most, as one alone may be luck", least=1
    )
    search_share: float = option(
        0.1, "grid", "share of --pairs that the search is judged by; no cell of the grid ever sees them", above=0, below=1
    )

    model: str | None = _as_in_training("model")
    layer: int = option(2, "model", "hidden state that the early arm aligns")
    weights: Weights = _as_in_training("weights")
    dtype: DType = _as_in_training("dtype")
    device: str = _as_in_training("device", help="cpu, cuda or cuda:N (auto: a GPU if there is one, under torchrun that of the process)")

    prefix: str = _as_in_training("prefix")
    held_out: float = _as_in_training("held_out", help="share of the pairs that each seed keeps out of training")
    split: Split = _as_in_training("split")
    targets: str = _as_in_training("targets")
    dropout: float = _as_in_training("dropout")
    temperature: float = _as_in_training("temperature")
    batch: int = _as_in_training("batch")
    epochs: int = _as_in_training("epochs", default=10, least=1)
    warmup: int = _as_in_training("warmup")
    keep_weight: float = _as_in_training("keep_weight")
    checkpointing: bool = _as_in_training("checkpointing", help="in the full arm, compute each block's inside again for the gradients")

    jobs: int = option(
        1, "running", "cells that run at the same time, each in a process of its own with its share of the processors", least=1
    )
    cells: str | None = option(
        None,
        "running",
        "i/n: run the i-th of n parts of the grid, as one job of a batch queue; no coordinator is needed (under torchrun by itself)",
    )
    output: str = option(None, "output", "folder of the study; a study that was stopped goes on there (default: runs/study-<model>)")
    json: bool = _as_in_training("json")

    def __post_init__(self):
        check(self)
        ranks = [int(part) if part.strip().isdecimal() else 0 for part in self.ranks.split(",")]
        if min(ranks) < 1 or ranks != sorted(set(ranks)):
            raise TliError("--ranks", "the ranks must be whole numbers from 1 on, ascending, each once", repr(self.ranks), "correct them")
        arms = self.arms.split(",")
        if not set(arms) <= {"early", "full"} or len(set(arms)) < len(arms):
            raise TliError("--arms", "the arms must be early, full, or early,full", repr(self.arms), "choose among these")
        if not all(_is_rate(rate) for rate in self.rates.split(",")):
            raise TliError("--rates", "the rates must be numbers above 0, a comma between them", repr(self.rates), "correct them")
        part = re.fullmatch(r"([1-9][0-9]*)/([1-9][0-9]*)", self.cells or "1/1")
        if part is None or int(part[1]) > int(part[2]):
            raise TliError("--cells", "the part must be i/n with i from 1 to n", repr(self.cells), "write 1/4 for the first of four")
        if self.output is None:
            object.__setattr__(self, "output", f"runs/study-{_named_after(self.model)}")


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolConfig(ListConfig):
    """The paper's protocol with one switch changed at a time, and the number that each choice makes."""

    EXAMPLE: ClassVar[str] = "{prog} --epochs 1"

    model: str | None = _as_in_training("model")
    seed: int = _as_in_training("seed")
    epochs: int | None = option(None, "training", "passes over the trained pairs, for a quick look (default: the paper's 5)", least=1)

    jobs: int = option(1, "running", "trainings at the same time, each in a process of its own with its share of the processors", least=1)
    output: str = option(None, "output", "folder of the protocol; one that was stopped goes on there (default: runs/protocol-<model>)")
    overwrite: bool = option(False, "output", "begin anew in an output folder that is not empty")
    json: bool = _as_in_training("json")

    def __post_init__(self):
        check(self)
        if self.pairs == "-":
            raise TliError("--pairs", "the list must be a file that each of the runs can read", "standard input", "save it first")
        if self.output is None:
            object.__setattr__(self, "output", f"runs/protocol-{_named_after(self.model)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Merge an adapter into a copy of its whole model, which transformers loads without peft."""

    EXAMPLE: ClassVar[str] = "{prog} runs/default-layer2-rank16-seed0 merged"

    adapter: str = argument("folder of a PEFT adapter, tli's own or another tool's")
    output: str = argument("folder for the merged model, new or empty; it is complete or absent")
    model: str | None = option(None, "model", "local folder or hub name of the model (default: the one that the adapter names)")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "model", "what all weights are rounded to")
    shard_gb: float = option(2.0, "output", "largest weight file in GB, and about the memory that it takes to make it", above=0)
    json: bool = _as_in_training("json")

    def __post_init__(self):
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LexiconConfig(ListConfig):
    """Look after lists of word pairs: show what is understood of one, convert it to tli's own TSV, or compare it with a dictionary."""

    EXAMPLE: ClassVar[str] = "{prog} show words.tmx"

    action: Literal["show", "convert", "check"] = argument(
        "show: print what is understood of LIST; convert: write the pairs of LIST to OUT as TSV; check: compare a list with a dictd "
        "dictionary, with exit code 1 if they agree too little"
    )
    files: tuple[str, ...] = option((), "arguments", "LIST (default: --pairs), and OUT to convert to")
    dictionary: str | None = option(None, "words", "of check: a dictd dictionary's .index (default: Debian's dict-freedict-swh-eng)")
    overwrite: bool = option(False, "output", "of convert: allow OUT to be there")

    def __post_init__(self):
        check(self)
        most = 2 if self.action == "convert" else 1
        if self.action == "convert" and len(self.files) != 2 or len(self.files) > most:
            got = f"{len(self.files)}: {' '.join(self.files)}".rstrip(": ")
            raise TliError(
                "FILE", f"{self.action} must have {'a list and a file to write' if most == 2 else 'one list'}", got, "see --help"
            )
        if self.files and self.pairs is not None:
            raise TliError("--pairs", "the list must be named once", f"{self.files[0]} and {self.pairs}", "leave one out")
        if self.files:
            object.__setattr__(self, "pairs", self.files[0])


@dataclasses.dataclass(frozen=True)
class StarterConfig:
    """Fetch the starter model into the cache, if it is not there, and print its folder."""

    EXAMPLE: ClassVar[str] = "{prog}"
