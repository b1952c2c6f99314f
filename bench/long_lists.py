"""``python -m bench.long_lists``: what a pair costs in lists of a thousand to a million, and the memory that the lists take. Linux.

Each list is measured in a process of its own, which does what ``tli.train`` does: read, split, hash, tokenise with the starter's tokenizer,
pack every batch of an epoch, take steps. The steps are those of a tiny model with random weights: whether they cost the same in a long
list as in a short one does not depend on the model. Times are the processor's, over all threads, as the machine may be shared. *Own
memory* is what the kernel counts as anonymous (RssAnon), sampled every 10 ms; the lists' files, which are mapped, are not in it. Words are
made up from syllables, and all are different.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console
from rich.table import Table

from bench import record
from bench.harness import MemoryWatch, call_in_process, resident
from tli.config import TrainConfig
from tli.reports.figures.style import save_figure
from tli.runtime.cli import as_dict, option, parse
from tli.runtime.errors import TliError, run_command
from tli.runtime.files import atomic_write

STAGES = {"read": "reading", "split": "splitting", "hash": "hashing", "tokenise": "tokenising", "pack": "packing", "step": "a step"}
FIGURE = record.ROOT / "docs" / "long-lists.png"
_SYLLABLES = [
    c + v
    for c in ["b", "ch", "d", "f", "g", "h", "j", "k", "l", "m", "n", "ng", "ny", "p", "r", "s", "sh", "t", "v", "w", "y", "z"]
    for v in "aeiou"
]
# the largest prime below the number of words of four syllables: multiplying, modulo it, is a permutation, and mixes all syllables
_WORDS = 146_409_997
_STRIDES = 83_492_791, 73_856_093
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongListsConfig:
    """Measure time per pair and own memory in lists of several lengths."""

    pairs: str = option("1000,10000,100000,1000000", "lists", "how many pairs, with commas between")
    batch: int = option(512, "lists", "pairs a step")
    steps: int = option(40, "lists", "steps to take")
    seed: int = option(0, "lists", "fixes the words, the split and the batches")
    results: str = option(str(record.RESULTS), "output", "folder for the record")
    figure: str = option(str(FIGURE), "output", "the figure's file")


def write_list(path: pathlib.Path, pairs: int, seed: int = 0) -> None:
    """Write a TSV of so many pairs of made-up words, line by line; every word occurs once, in one language."""
    if not 1 <= pairs <= _WORDS:
        raise TliError("--pairs", f"a list must have from 1 to {_WORDS:,} pairs", pairs, "choose a number among these")
    starts = np.random.default_rng(seed).integers(_WORDS, size=2).tolist()
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("swahili\tenglish\n")
        for number in range(pairs):
            source, target = ((start + number * stride) % _WORDS for start, stride in zip(starts, _STRIDES))
            # a target ends in a consonant, as no source does
            file.write(f"{_word(source)}\t{_word(target)}n\n")


def _word(number: int) -> str:
    syllables = []
    for _ in range(4):
        number, digit = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[digit])
    return "".join(syllables)


def measure(config: LongListsConfig) -> list[dict]:
    """Of each list: seconds of processor time by stage, own bytes after the imports, after each stage and at most."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _write_model(folder / "model")
        for pairs in map(int, config.pairs.split(",")):
            write_list(folder / "list.tsv", pairs, config.seed)
            options = {"pairs": str(folder / "list.tsv"), "model": str(folder / "model"), "layer": 1, "rank": 4}
            options |= {"batch": min(config.batch, pairs // 2), "seed": config.seed}
            size = (folder / "list.tsv").stat().st_size
            rows.append({"pairs": pairs, "list_bytes": size, **measure_in_a_process(options, config.steps)})
    return rows


def measure_in_a_process(options: dict, steps: int) -> dict:
    """What ``measure_here`` finds with these options of ``tli.train``, in a process of its own."""
    return call_in_process("long lists", measure_here, json.dumps(options), str(steps))


def _write_model(folder: pathlib.Path) -> None:
    """One small block with random weights behind the starter's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tli.model.starter import starter_folder

    tokenizer = AutoTokenizer.from_pretrained(starter_folder())
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure_here(options: str, steps: str) -> None:
    """What the process of one list does."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    from tli.data import word_pairs
    from tli.data.loader import BatchLoader
    from tli.data.packing import tokenise
    from tli.model import lora
    from tli.model.checkpoint import context_length, open_checkpoint
    from tli.model.decoder import load_truncated_decoder, run
    from tli.model.pooling import Pooling
    from tli.runtime.device import resolve_device
    from tli.training.loss import Objective
    from tli.training.state import TrainingState
    from tli.training.step import OptimiserSettings, TrainStep

    config, seconds, own = TrainConfig(**json.loads(options)), {}, {}
    checkpoint, device_config = open_checkpoint(config.model), resolve_device("cpu", "float32")
    # what the first list of any length makes the libraries load
    tokenizer = checkpoint.tokenizer()
    tokenizer(["word"], return_offsets_mapping=True)
    word_pairs.split_pairs([word_pairs.Pair(f"a{i}", f"b{i}") for i in range(4)], 0.5, 0)
    own["imports"] = resident("RssAnon")

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        seconds[name], own[name] = time.process_time() - began, resident("RssAnon")

    watch = MemoryWatch("RssAnon").__enter__()
    with stage("read"):
        pairs = word_pairs.read_pairs(config.pairs, config.source, config.target)
    with stage("split"):
        trained, held_out = word_pairs.split_pairs(pairs, config.held_out, config.seed)
    with stage("hash"):
        TrainingState(pathlib.Path(), as_dict(config), trained)
    with stage("tokenise"):
        texts = itertools.chain(*((getattr(pair, side) for pair in part) for side in ("source", "target") for part in (trained, held_out)))
        words = tokenise(tokenizer, texts, context_length(checkpoint), config.prefix)
    batches = BatchLoader(words, trained, device_config, batch=config.batch, epochs=1 + int(steps), seed=config.seed)
    with stage("pack"):
        for _ in batches.epoch(0):
            pass
    decoder = load_truncated_decoder(checkpoint, config.layer, words.vocab_ids, device_config).train()
    lora.inject(decoder, lora.LoRAConfig(rank=config.rank, alpha=config.alpha), seed=config.seed)
    pool = Pooling.from_checkpoint("final", checkpoint, device_config.device)
    objective = Objective(config.loss, config.temperature, config.margin)
    step = TrainStep(decoder, lambda part: pool(run(decoder, part), part), objective, OptimiserSettings(config.lr), config.seed)
    # the first step allocates
    taken = 0
    for number, (parts, false_negatives) in enumerate(itertools.islice(batches.steps(), 1 + int(steps))):
        step(number, parts, false_negatives)
        list(step.pop_results())
        if number == 0:
            began = time.process_time()
        else:
            taken += sum(len(part.sinks) for part in parts) // 2
    seconds["step"], own["step"] = time.process_time() - began, resident("RssAnon")
    watch.__exit__()
    counts = {"step": taken, "pack": len(trained), "hash": len(trained)}
    per_pair = {name: value / counts.get(name, len(pairs)) for name, value in seconds.items()}
    print(
        json.dumps(
            {"seconds": seconds, "seconds_per_pair": per_pair, "own_bytes": own, "own_bytes_at_most": max(watch.most, *own.values())}
        )
    )


def table(rows: list[dict]) -> Table:
    """The rows of ``measure``: microseconds of processor time a pair by stage, and own memory beyond that of the imports."""
    shown = Table("pairs", *STAGES.values(), "own memory at most", "a pair beyond the first list", title="us a pair; MiB; bytes")
    for row in rows:
        times = [f"{1e6 * row['seconds_per_pair'][stage]:.2f}" for stage in STAGES]
        more = (row["own_bytes_at_most"] - rows[0]["own_bytes_at_most"]) / max(1, row["pairs"] - rows[0]["pairs"])
        shown.add_row(f"{row['pairs']:,}", *times, f"{_own(row) / _MIB:.1f}", f"{more:.0f}" if row is not rows[0] else "")
    return shown


def _own(row: dict) -> int:
    return row["own_bytes_at_most"] - row["own_bytes"]["imports"]


def draw(rows: list[dict]) -> Figure:
    """Time per pair by stage, and own memory, against the number of pairs."""
    figure = Figure(figsize=(10.8, 4.6), layout="constrained")
    times, memory = figure.subplots(1, 2)
    pairs = [row["pairs"] for row in rows]
    dark, light, grey = "#08519c", "#e6861a", "0.35"
    styles = {"step": (dark, "o", "-"), "tokenise": (light, "s", "-"), "read": (dark, "^", "--"), "pack": (light, "v", "--")}
    styles |= {"split": (grey, "D", ":"), "hash": ("black", "x", ":")}
    for stage, (colour, marker, line) in styles.items():
        values = [1e6 * row["seconds_per_pair"][stage] for row in rows]
        times.plot(pairs, values, label=STAGES[stage], color=colour, marker=marker, linestyle=line, markersize=5, linewidth=1.4)
    times.set_yscale("log")
    times.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.15g}"))
    times.set_ylabel("processor time a pair, microseconds (log scale)")
    memory.plot(pairs, [_own(row) / _MIB for row in rows], label="measured", color=dark, marker="o", markersize=5, linewidth=1.6)
    smooth = np.geomspace(pairs[0], pairs[-1])
    memory.plot(
        smooth,
        (_own(rows[0]) + 100 * (smooth - pairs[0])) / _MIB,
        label="100 bytes a pair",
        color="black",
        linestyle=(0, (1, 1)),
        linewidth=1.8,
    )
    memory.set_ylabel("own memory beyond the imports' at most, MiB")
    memory.set_ylim(bottom=0)
    for panel in (times, memory):
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("pairs in the list")
        panel.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False, fontsize=9)
    # above the highest curve
    times.set_ylim(top=12 * times.get_ylim()[1])
    times.legend(frameon=False, fontsize=9, ncols=3, loc="upper center")
    figure.supxlabel("each list in a process of its own; tokens are the starter's, steps a tiny model's; one run each", fontsize=8)
    return figure


def bench(config: LongListsConfig) -> None:
    """Measure, print, draw, and keep a record."""
    rows = measure(config)
    console = Console(width=140)
    console.print(table(rows))
    save_figure(config.figure, draw(rows))
    path = record.write("long-lists", {"setting": as_dict(config), "lists": rows}, pathlib.Path(config.results))
    console.print("written:", str(path), config.figure)


def main() -> None:
    """The command."""
    bench(parse(LongListsConfig, "bench.long_lists"))


if __name__ == "__main__":
    run_command(main)
