"""What one step of training holds at each moment, by category; measured, beside what ``memory_model`` says.

Weights, embedding rows, adapters and AdamW's moments are known from their tensors. Of what a step allocates torch's profiler reports each
block of memory with its address, when it comes and when it goes:

    activations  allocated in a forward pass (or the loss) and alive at its end
    gradients    where the adapters' gradients lie when the step is over
    workspace    the rest

The step that is recorded is the run's last: a profiler takes memory, too, and what the steps before it took at most must not count that.
"""

from tli.tables import Table
from tli.training.memory.estimate import CATEGORIES
from tli.training.memory.profile import Profile


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
