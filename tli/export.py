"""``python -m tli.export``: merge an adapter into a copy of its model."""

from tli.config import ExportConfig
from tli.runtime.cli import parse, print_json
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command; nothing heavy is loaded before its options are known."""
    config = parse(ExportConfig, "tli.export", argv)
    from tli.commands.export import export

    print_json(config, export(config))


if __name__ == "__main__":
    run_command(main)
