"""``python -m tli.starter``: fetch the starter model ahead of time, and print its folder."""

from tli.config import StarterConfig
from tli.model.starter import starter_folder
from tli.runtime.cli import parse
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parse(StarterConfig, "tli.starter", argv)
    print(starter_folder())


if __name__ == "__main__":
    run_command(main)
