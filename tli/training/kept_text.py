"""Keeping running text where it was: what an adapter does to text that is no word of the list is paid for in the loss.

    keep = weight · mean over a text's positions of  |h(t) - h0(t)|² / |h0(t)|²      h0: the state at the layer before training

Without it a language model's perplexity grows by factors, because nothing else says which changes of a weight are not wanted. A step
looks at a few windows of the text, drawn by its position in the run, so that a resumed run draws the same. The sink is left out: its
state is hundreds of times as long as a word's.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tli.data.batch import Batch
from tli.model.shape import KEPT_WINDOWS
from tli.model.text_windows import TextWindows, windows_batch
from tli.runtime.device import DeviceConfig


class KeptText:
    """The term for some texts.

    Args:
        states:         packed text -> the states at the layer, [T, D], of the model with its adapters as they are
        texts:          the windows, all of one width
        vocab_ids:      int64 [V], the embedding rows that the model keeps; all that occur in the texts are there
        device_config:  where the text goes
        weight:         of the term in the loss
        seed:           of the windows that a step looks at

    The adapters must still change nothing when it is made: the states of that moment are those to keep, in the model's dtype.
    """

    def __init__(
        self,
        states: Callable[[Batch], Tensor],
        texts: Sequence[TextWindows],
        vocab_ids: np.ndarray,
        device_config: DeviceConfig,
        weight: float,
        seed: int,
    ):
        self.states, self.weight, self.seed = states, weight, seed
        width = max(windows.width for windows in texts)
        tokens = [np.pad(windows.vocab_ids[windows.tokens], ((0, 0), (0, width - windows.width))) for windows in texts]
        # what is behind a window's end is never looked at: any row will do
        ids = np.minimum(np.searchsorted(vocab_ids, np.concatenate(tokens)), len(vocab_ids) - 1)
        lengths = np.concatenate([windows.lengths for windows in texts])
        self.per_step = min(KEPT_WINDOWS, len(lengths))
        whole = windows_batch(TextWindows(ids, lengths, vocab_ids, {}), device_config)
        self.input_ids, self.position_ids, self.mask = whole.input_ids, whole.position_ids[: self.per_step], whole.mask[: self.per_step]
        self.nothing = whole.indptr
        positions = torch.arange(width, device=device_config.device)
        self.inside = (positions > 0) & (positions < torch.from_numpy(lengths).to(device_config.device)[:, None])
        # read by the step, on a GPU by the replayed one, too
        self.chosen = torch.zeros(self.per_step, dtype=torch.int64, device=device_config.device)
        with torch.no_grad():
            parts = [states(self._batch(self.input_ids[at : at + self.per_step])) for at in range(0, len(lengths), self.per_step)]
        self.kept = torch.cat(parts).view(len(lengths), width, -1)

    def choose(self, position: int) -> None:
        """The windows of step ``position``, without waiting for a GPU."""
        drawn = np.random.default_rng([self.seed, 4, position]).permutation(len(self.inside))[: self.per_step]
        on_gpu = self.chosen.device.type == "cuda"
        chosen = torch.from_numpy(drawn)
        self.chosen.copy_(chosen.pin_memory() if on_gpu else chosen, non_blocking=on_gpu)

    def __call__(self) -> Tensor:
        """The term for the chosen windows, a scalar with its graph."""
        found = self.states(self._batch(self.input_ids[self.chosen])).float()
        kept, inside = self.kept[self.chosen].view_as(found).float(), self.inside[self.chosen].view(-1)
        moved = (found - kept).square().sum(1) / kept.square().sum(1).clamp_min(1e-30)
        # no entry is picked out by a mask: how many there are would have to be waited for
        return self.weight * (moved * inside).sum() / inside.sum()

    def bytes(self) -> int:
        """What it holds."""
        return sum(tensor.nbytes for tensor in (self.input_ids, self.position_ids, self.mask, self.inside, self.kept))

    def _batch(self, input_ids: Tensor) -> Batch:
        rows = len(input_ids)
        return Batch(input_ids, self.position_ids[:rows], self.mask[:rows], self.nothing, self.nothing, self.nothing)
