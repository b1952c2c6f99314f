"""What a number was made with: versions, the machine and its memory, as plain JSON values for a report."""

from tli.checkpoint import Checkpoint


def model_facts(name: str, checkpoint: Checkpoint, sha256: str) -> dict:
    """What the model is called and is; ``sha256``: ``checkpoint.sha256`` of the blocks that were read."""
    return {
        "name": name,
        "family": checkpoint.config.model_type,
        "blocks": checkpoint.blocks,
        "width": checkpoint.config.hidden_size,
        "sha256": sha256,
    }
