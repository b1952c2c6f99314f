"""``python -m tli.lexicon check``: how far a list of word pairs agrees with a dictd dictionary."""

from tli.runtime.errors import run_command


def main() -> None:
    """The command."""
    from tli.dictionary_check import main

    main()


if __name__ == "__main__":
    run_command(main)
