"""``python -m tli.scan``: measure word pairs at every layer of a model, in one pass.

Options first, and nothing heavy for them: ``--help`` and a wrong flag must not wait for torch.
"""

import json

from tli.config import ScanConfig
from tli.runtime.cli import parse
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config = parse(ScanConfig, "tli.scan", argv)
    from tli.commands.scan import scan

    report = scan(config)
    if config.json:
        print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
