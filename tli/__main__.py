"""``tli train --rank 16`` or ``python -m tli train --rank 16``: every command under one name, as ``python -m tli.train`` runs it."""

import importlib
import sys

import tli
from tli.runtime.errors import run_command

COMMANDS = {
    "train": "align word pairs at one layer with LoRA adapters, and measure what came of it",
    "scan": "measure word pairs at every layer of a model",
    "evaluate": "compare adapters with their base, or test a table of values",
    "study": "how alignment depends on the rank; study protocol: the paper's protocol, switch by switch",
    "export": "merge an adapter into a copy of its model",
    "memory": "predict what training takes, and what fits",
    "tune": "measure this GPU's fastest ways",
    "lexicon": "compare a word list with a dictionary",
    "starter": "fetch the starter model",
}


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first argument names, with the others."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        importlib.import_module(f"tli.{name}").main(rest)
    elif name == "--version":
        print(f"tli {tli.__version__}")
    elif name in ("-h", "--help"):
        print("usage: tli COMMAND [options]\n")
        print("\n".join(f"  {command:<10} {what}" for command, what in COMMANDS.items()))
        print("\ntli COMMAND --help lists a command's options; tli --version")
    else:
        print(f"error: tli: the command must be one of {', '.join(COMMANDS)}, got {name!r}; see tli --help", file=sys.stderr)
        sys.exit(2)


def command() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    command()
