"""``python -m tli.evaluate``: compare adapters with their base, or test a table of values."""

from tli.config import EvaluateConfig
from tli.runtime.cli import parse, print_json
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command; nothing heavy is loaded before its options are known."""
    config = parse(EvaluateConfig, "tli.evaluate", argv)
    from tli.commands.evaluate import evaluate

    print_json(config, evaluate(config))


if __name__ == "__main__":
    run_command(main)
