"""``python -m tli.lexicon check``: how far a list of word pairs agrees with a dictd dictionary."""

from tli.runtime.errors import run_command


def main() -> None:
    """The command."""
    from tli.commands.lexicon import lexicon

    lexicon()


if __name__ == "__main__":
    run_command(main)
