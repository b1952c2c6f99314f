"""``python -m tli.memory``: the memory that training takes at most, by category, and what fits; without torch."""

from tli.config import MemoryConfig
from tli.runtime.cli import parse, print_json
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command; nothing heavy is loaded before its options are known."""
    config = parse(MemoryConfig, "tli.memory", argv)
    from tli.commands.memory import memory, print_tables

    facts = memory(config)
    print_tables(facts, stderr=config.json)
    print_json(config, facts)


if __name__ == "__main__":
    run_command(main)
