"""``python -m tli.memory``: the memory that training takes at most, by category, and what fits on a device of some size.

Options first, and nothing heavy for them; what follows needs no torch either.
"""

import json

from tli.config import MemoryConfig
from tli.runtime.cli import parse
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config = parse(MemoryConfig, "tli.memory", argv)
    from tli.commands.memory import memory, print_tables

    facts = memory(config)
    print_tables(facts, stderr=config.json)
    if config.json:
        print(json.dumps(facts))


if __name__ == "__main__":
    run_command(main)
