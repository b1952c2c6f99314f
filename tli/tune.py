"""``python -m tli.tune``: measure on this GPU which way of a product is the fastest, and keep it.

Options first, and nothing heavy for them: ``--help`` and a wrong flag must not wait for torch.
"""

import json

from tli.config import TuneConfig
from tli.runtime.cli import parse
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config = parse(TuneConfig, "tli.tune", argv)
    from tli.commands.tune import tune

    result = tune(config)
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
