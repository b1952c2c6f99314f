"""``python -m tli.map``: fit the best closed-form map between two languages' word states."""

from tli.config import MapConfig
from tli.runtime.cli import parse, print_json
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command; nothing heavy is loaded before its options are known."""
    config = parse(MapConfig, "tli.map", argv)
    from tli.commands.map import fit_map

    print_json(config, fit_map(config))


if __name__ == "__main__":
    run_command(main)
