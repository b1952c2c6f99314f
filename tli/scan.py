"""``python -m tli.scan``: measure word pairs at every layer of a model."""

from tli.config import ScanConfig
from tli.runtime.cli import parse, print_json
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command; nothing heavy is loaded before its options are known."""
    config = parse(ScanConfig, "tli.scan", argv)
    from tli.commands.scan import scan

    print_json(config, scan(config))


if __name__ == "__main__":
    run_command(main)
