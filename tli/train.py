"""``python -m tli.train``: align word pairs at layer L with LoRA adapters, and measure what came of it.

Options first, and nothing heavy for them: ``--help`` and a wrong flag must not wait for torch.
"""

import json

from tli.config import TrainConfig
from tli.runtime.cli import parse
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config = parse(TrainConfig, "tli.train", argv)
    from tli.commands.train import train

    facts = train(config)
    if config.json:
        print(json.dumps(facts))


if __name__ == "__main__":
    run_command(main)
