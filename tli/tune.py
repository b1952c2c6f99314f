"""``python -m tli.tune``: measure this GPU's fastest ways, and keep them for later runs."""

from tli.config import TuneConfig
from tli.runtime.cli import parse, print_json
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command; nothing heavy is loaded before its options are known."""
    config = parse(TuneConfig, "tli.tune", argv)
    from tli.commands.tune import tune

    print_json(config, tune(config))


if __name__ == "__main__":
    run_command(main)
