"""What one step of training holds at each moment, by category; measured, beside what ``estimate`` says.

Weights, embedding rows, adapters and AdamW's moments are known from their tensors. Of what a step allocates torch's profiler reports each
block of memory with its address, when it comes and when it goes:

    activations  allocated in a forward pass (or the loss) and alive at its end
    gradients    where the adapters' gradients lie when the step is over
    workspace    the rest

The step that is recorded is the run's last: a profiler takes memory, too, and what the steps before it took at most must not count that.
"""

import contextlib
import json
import pathlib
import threading
import typing
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity

from tli.model.families import embedding_of, traits_of
from tli.runtime import ops
from tli.runtime.environment import process_memory
from tli.runtime.files import atomic_write

if typing.TYPE_CHECKING:
    from tli.model.decoder import Decoder

TRACE_FILE, FIGURE_FILE = "step_trace.json", "memory_step.png"
# names of the spans of a step, as the trace shows them
FORWARD, LOSS, OPTIMISER = "forward", "loss", "optimiser"
_LOOK_S = 0.01
_STEP = ("activations", "gradients", "workspace")


class Profile:
    """Watches a run from before its model is loaded to its last step, and records that one."""

    def __init__(self, device: torch.device):
        self.device, self.resident, self.allocated = device, 0, 0
        self.before, self.peak = process_memory("RssAnon"), 0
        self.events: list[dict] = []
        self.gradients: set[int] = set()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.peak = max(self.peak, process_memory("RssAnon"))

    @contextlib.contextmanager
    def recorded(self, parameters: Sequence[nn.Parameter], folder: pathlib.Path) -> Iterator[None]:
        """Record the step within; its trace goes to ``folder``. What came before is what the peak is of."""
        self._ended.set()
        self.resident = process_memory("VmHWM")
        self.allocated = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            yield
        self.gradients = {parameter.grad.data_ptr() for parameter in parameters if parameter.grad is not None}
        with atomic_write(folder / TRACE_FILE) as temporary:
            profiler.export_chrome_trace(str(temporary))
            self.events = json.loads(temporary.read_text(encoding="utf-8"))["traceEvents"]

    def measured(self, decoder: "Decoder", parameters: Sequence[nn.Parameter], words: int) -> tuple[dict[str, int], dict[str, np.ndarray]]:
        """Bytes by category at the step's largest moment, under the prediction's names; and the step's curves by category, with ``ms``."""
        curves = step_curves(self.events, self.gradients, self.device.type)
        curves_sum = np.sum([curves[name] for name in _STEP], axis=0)
        top = int(curves_sum.argmax())
        adapters = 12 * sum(parameter.numel() for parameter in parameters)
        embedding = _bytes(embedding_of(decoder).weight)
        rows = embedding + sum(_bytes(weight.products) for weight in _weights(decoder) if isinstance(weight, ops.TokenTable))
        bytes_of = {
            "weights": sum(_bytes(tensor) for tensor in _frozen(decoder)) - embedding,
            "embedding rows": rows,
            "activations": int(curves["activations"][top]),
            "gradients and optimiser": adapters + int(curves["gradients"][top]),
            "workspace": int(curves["workspace"][top]),
            "words": words,
        }
        if self.device.type == "cpu":
            bytes_of["imports and tokenizer"] = self.before
            bytes_of["allocator"] = max(0, self.peak - sum(bytes_of.values()))
        fixed = {name: bytes_of[name] for name in ("weights", "embedding rows")} | {"adapters and optimiser": adapters}
        return bytes_of, {"ms": curves["ms"]} | {name: np.full(len(curves["ms"]), size) for name, size in fixed.items()} | {
            name: curves[name] for name in _STEP
        }

    def spans(self) -> list[tuple[str, float, float]]:
        """The step's named parts in order, (name, begin, end) in ms as in the curves."""
        start = min((event["ts"] for event in self.events if event.get("name") == "[memory]"), default=0.0)
        named = [event for event in self.events if event.get("cat") == "user_annotation" and event["name"] in (FORWARD, LOSS, OPTIMISER)]
        return sorted((event["name"], (event["ts"] - start) / 1e3, (event["ts"] + event["dur"] - start) / 1e3) for event in named)


def _frozen(decoder: nn.Module) -> list[torch.Tensor]:
    """The decoder's frozen tensors, each once; of a packed weight its parts."""
    found: dict[int, torch.Tensor] = {id(parameter): parameter for parameter in decoder.parameters() if not parameter.requires_grad}
    # sinusoidal positions
    for path in traits_of(decoder).beside:
        found |= {id(buffer): buffer for buffer in decoder.get_submodule(path).buffers()}
    for weight in _weights(decoder):
        if isinstance(weight, ops.NF4Weight):
            found |= {id(part): part for part in (weight.codes, weight.absmax, weight.nested_absmax) if part is not None}
    return list(found.values())


def _weights(decoder: nn.Module) -> list:
    return [weight for module in decoder.modules() if (weight := getattr(module, "weight", None)) is not None]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def step_curves(events: list[dict], gradients: set[int], device: str = "cpu") -> dict[str, np.ndarray]:
    """What a recorded step held over time, out of a trace's events: bytes of ``_STEP``'s categories after each event, and ``ms``.

    gradients  addresses at which the adapters' gradients lie at the end
    """
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation" and e["name"] in (FORWARD, LOSS)]
    kind = {"cpu": 0, "cuda": 1}[device]
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type", 0) == kind]
    changes.sort(key=lambda e: e["ts"])
    open_at: dict[int, int] = {}
    gone = [float("inf")] * len(changes)
    for number, change in enumerate(changes):
        address = change["args"]["Addr"]
        if change["args"]["Bytes"] > 0:
            open_at[address] = number
        elif address in open_at:
            gone[open_at.pop(address)] = change["ts"]
    times, deltas = [], []
    for change, end in zip(changes, gone):
        begin, size = change["ts"], change["args"]["Bytes"]
        if size <= 0:
            continue
        if end == float("inf") and change["args"]["Addr"] in gradients:
            category = "gradients"
        else:
            category = "activations" if any(first <= begin <= last < end for first, last in spans) else "workspace"
        times.append(begin)
        deltas.append((_STEP.index(category), size))
        if end < float("inf"):
            times.append(end)
            deltas.append((_STEP.index(category), -size))
    order = np.argsort(times, kind="stable")
    steps = np.zeros((len(times) + 1, len(_STEP)))
    for place, number in enumerate(order):
        category, size = deltas[number]
        steps[place + 1, category] = size
    held = steps.cumsum(axis=0)
    start = min((e["ts"] for e in events if "ts" in e and e.get("name") == "[memory]"), default=0.0)
    moments = np.concatenate([[0.0], (np.array(times)[order] - start) / 1e3]) if times else np.zeros(1)
    return {"ms": moments} | {name: held[:, place] for place, name in enumerate(_STEP)}
