"""``python -m tli.lexicon check``: how far a list of word pairs agrees with a dictd dictionary."""

from tli.runtime.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """The command."""
    from tli.commands.lexicon import lexicon

    lexicon(argv)


if __name__ == "__main__":
    run_command(main)
