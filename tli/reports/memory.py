"""A step's memory by category, predicted and measured: as a table, a record and a figure."""

import pathlib
import typing

from tli.model.lora import trainable
from tli.reports.figures.memory import draw_memory
from tli.reports.figures.style import save_figure
from tli.reports.tables import Table, show
from tli.training.memory import estimate
from tli.training.memory import profile as profiling
from tli.training.memory.estimate import CATEGORIES
from tli.training.memory.profile import Profile

if typing.TYPE_CHECKING:
    from tli.model.decoder import Decoder


def measured(run: estimate.Run, profile: profiling.Profile, decoder: "Decoder", words: int, output: pathlib.Path, console) -> dict:
    """Memory by category, predicted and measured, as shown and drawn."""
    found, curves = profile.measured(decoder, trainable(decoder), words)
    memory = record(estimate.predict(run), found, profile)
    save_figure(output / profiling.FIGURE_FILE, draw_memory(curves, profile.spans()))
    show([table(memory)], console)
    return memory


def record(predicted: dict[str, int], measured: dict[str, int], profile: Profile) -> dict:
    """What report.json says of memory: both by category, and the peaks that they are held against."""
    ours = {"predicted": predicted, "measured": measured}
    sums = {f"{name}_allocations": sum(found.get(category, 0) for category in CATEGORIES) for name, found in ours.items()}
    peaks = {"own_peak_bytes": profile.peak or None, "resident_peak_bytes": profile.resident or None}
    return ours | sums | peaks | {"allocated_peak_bytes": profile.allocated or None}


def table(memory: dict) -> Table:
    """The prediction beside the measurement, in MB."""
    predicted, measured = memory["predicted"], memory["measured"]
    rows = [[name, *(f"{found[name] / 1e6:,.1f}" if name in found else "" for found in (predicted, measured))] for name in predicted]
    rows.append(["allocated by the run", *(f"{memory[f'{name}_allocations'] / 1e6:,.1f}" for name in ("predicted", "measured"))])
    if memory["own_peak_bytes"]:
        rows.append(["the process at most", f"{sum(predicted.values()) / 1e6:,.1f}", f"{memory['own_peak_bytes'] / 1e6:,.1f}"])
    return Table("memory, MB, at the largest moment", ["", "predicted", "measured"], rows)
