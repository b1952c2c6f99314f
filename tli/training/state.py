"""Checkpoint of an interrupted run, to resume from: adapters, AdamW's moments, the losses so far."""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import tli
from tli.data.pair_store import DiskBackedPairs
from tli.model.lora import LoRALinear
from tli.runtime.errors import TliError, one_line
from tli.runtime.files import atomic_write

STATE_FILE = "training_state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MACHINE_FACTS = ("dtype", "matmul", "attention")


@dataclasses.dataclass
class Progress:
    """The loss and the spread (``collapse.spread``) of each step done, the seconds that the steps took, and the Unix time at which the
    first was done; what is alarming about it."""

    losses: list[float] = dataclasses.field(default_factory=list)
    spreads: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    first_step_at: float | None = None
    alarm: str | None = None

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def add(self, loss: float, spread: tuple[float, float], seconds: float) -> None:
        """Count one more step."""
        self.losses.append(loss)
        self.spreads.append(spread)
        self.seconds = seconds
        self.first_step_at = self.first_step_at or time.time()


class TrainingState:
    """The file from which an interrupted run goes on: adapters, AdamW's moments and the losses so far.

    It carries fingerprints of all that a run's numbers come from, so that no other run goes on from it.

    Args:
        folder:   the run's output
        options:  those that decide the run's numbers, plain JSON values by name
        trained:  the trained pairs

    Attributes:
        fingerprints:  hashes by the names of what they are of: options and pairs, and whatever is added before ``restore``
    """

    def __init__(self, folder: pathlib.Path, options: Mapping[str, object], trained: DiskBackedPairs):
        self.path = folder / STATE_FILE
        pairs = hashlib.sha256()
        for record in trained.records():
            pairs.update(record)
        self.fingerprints = {
            "options": hashlib.sha256(json.dumps(dict(options)).encode()).hexdigest(),
            "pairs": pairs.hexdigest(),
            "version of tli": tli.__version__,
        }
        # ``DeviceConfig.facts`` of the run: its dtype, matmul and attention, where the options leave them open
        self.begun_on: dict[str, str] = {}

    def begun_with(self) -> dict[str, str]:
        """``DeviceConfig.facts`` of the interrupted run, which a resumed one keeps; empty without a file."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                return {name: metadata[name] for name in _MACHINE_FACTS if name in metadata}
        except (SafetensorError, OSError):
            # ``restore`` says what is wrong with it
            return {}

    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return self.path.is_file()

    def discard(self) -> None:
        """The run is complete: nothing is left to go on from."""
        self.path.unlink(missing_ok=True)

    def save(self, adapters: dict[str, LoRALinear], optimiser: torch.optim.AdamW, progress: Progress) -> None:
        """Write the state between two steps, completely or not at all."""
        tensors = {"losses": torch.tensor(progress.losses, dtype=torch.float64)}
        tensors["spreads"] = torch.tensor(progress.spreads, dtype=torch.float64)
        for name, parameter in _named(adapters):
            tensors[name] = parameter.detach()
            for moment in _MOMENTS:
                tensors[f"{name}.{moment}"] = optimiser.state[parameter][moment]
        metadata = {**self.fingerprints, **self.begun_on}
        metadata |= {"seconds": str(progress.seconds), "first_step_at": str(progress.first_step_at), "alarm": progress.alarm or ""}
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata))

    def restore(self, adapters: dict[str, LoRALinear], optimiser: torch.optim.AdamW) -> Progress:
        """Restore adapters and optimiser; without a file, the run was killed before its first save and starts anew.

        Raises:
            TliError: the file is of a run with other fingerprints, or is damaged.
        """
        if not self.exists():
            return Progress()
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise TliError(self.path, "the file must be whole safetensors", error, "start anew with --overwrite") from error
        others = [name for name, own in self.fingerprints.items() if metadata.get(name) != own]
        if others:
            must = f"a run must be resumed with its own {', '.join(self.fingerprints)}"
            raise TliError(self.path, must, f"other {', '.join(others)}", "repeat it as it was begun, or start anew with --overwrite")
        try:
            losses = [float(loss) for loss in tensors["losses"].tolist()]
            spreads = [(mismatched, rank) for mismatched, rank in tensors["spreads"].reshape(len(losses), 2).tolist()]
            progress = Progress(losses, spreads, float(metadata["seconds"]), float(metadata["first_step_at"]), metadata["alarm"] or None)
            for name, parameter in _named(adapters):
                for kept in (name, *(f"{name}.{moment}" for moment in _MOMENTS)):
                    if (tensors[kept].shape, tensors[kept].dtype) != (parameter.shape, parameter.dtype):
                        raise ValueError(f"{kept} {tuple(tensors[kept].shape)} of {tensors[kept].dtype}")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TliError(self.path, "the file must hold a run's whole state", one_line(error), "start anew with --overwrite") from error
        for name, parameter in _named(adapters):
            parameter.data.copy_(tensors[name])
            moments = {moment: tensors[f"{name}.{moment}"].to(parameter.device) for moment in _MOMENTS}
            # where fused AdamW counts its steps, and plain AdamW
            counted_on = parameter.device if optimiser.defaults["fused"] else "cpu"
            optimiser.state[parameter] = {"step": torch.tensor(float(len(losses)), device=counted_on), **moments}
        return progress


def _named(adapters: dict[str, LoRALinear]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for path, adapter in adapters.items():
        yield f"{path}.lora_A", adapter.lora_A
        yield f"{path}.lora_B", adapter.lora_B
