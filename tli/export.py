"""``python -m tli.export``: merge an adapter into a copy of its whole model.

Options first, and nothing heavy for them: ``--help`` and a wrong flag must not wait for torch.
"""

import json

from tli.config import ExportConfig
from tli.runtime.cli import parse
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config = parse(ExportConfig, "tli.export", argv)
    from tli.commands.export import export

    facts = export(config)
    if config.json:
        print(json.dumps(facts))


if __name__ == "__main__":
    run_command(main)
