"""``python -m tli.evaluate``: adapters against the base model, or the statistics of a table alone.

Options first, and nothing heavy for them: ``--help`` and a wrong flag must not wait for torch.
"""

import json

from tli.config import EvaluateConfig
from tli.runtime.cli import parse
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config = parse(EvaluateConfig, "tli.evaluate", argv)
    from tli.commands.evaluate import evaluate

    facts = evaluate(config)
    if config.json:
        print(json.dumps(facts, allow_nan=False))


if __name__ == "__main__":
    run_command(main)
