"""The model that an arm trains, made ready for its steps: what ``tli.train`` and whatever measures it build alike."""

import numpy as np
from torch import nn

from tli.checkpoint import Checkpoint
from tli.config import TrainConfig
from tli.first_block import tabulate
from tli.hooked import recompute_blocks, whole
from tli.runtime.device import Placement
from tli.truncated import attend_in_steps, require_layer, truncate


def arm_model(config: TrainConfig, checkpoint: Checkpoint, rows: np.ndarray | None, placement: Placement) -> nn.Module:
    """The arm's model, still without adapters: it ends at ``config.layer``, or is whole.

    Args:
        config:      arm, layer, impl and checkpointing count
        checkpoint:  an open checkpoint
        rows:        int64 [V] token ids whose embedding rows are kept; None keeps all
        placement:   dtype, device and rounding of the weights

    Raises:
        TliError: as ``truncate`` and ``whole``.
    """
    if config.arm == "early":
        decoder = truncate(checkpoint, config.layer, rows, placement)
    else:
        require_layer(checkpoint, config.layer)
        decoder = whole(checkpoint, rows, placement)
    tabulate(decoder)
    if placement.attention == "eager":
        attend_in_steps(decoder)
    if config.checkpointing:
        recompute_blocks(decoder)
    return decoder
