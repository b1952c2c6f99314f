"""``python -m tli.lexicon``: show a list of word pairs as it is understood, convert it to TSV, or compare it with a dictionary."""

import sys

from tli.config import LexiconConfig
from tli.runtime.cli import parse
from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command; nothing heavy is loaded before its options are known."""
    config = parse(LexiconConfig, "tli.lexicon", argv)
    from tli.commands.lexicon import lexicon

    sys.exit(0 if lexicon(config) else 1)


if __name__ == "__main__":
    run_command(main)
