"""``python -m tli.lexicon check``: how far a list of word pairs agrees with a dictd dictionary."""

import argparse
import sys

from tli.data.dictionary import AGREEMENT, FREEDICT, check


def lexicon(arguments: list[str] | None = None) -> None:
    """Run ``python -m tli.lexicon check``; exit code 1 if the list agrees with the dictionary too little."""
    parser = argparse.ArgumentParser(prog="python -m tli.lexicon", description="Look after lists of word pairs.")
    verbs = parser.add_subparsers(required=True, metavar="check")
    options = verbs.add_parser("check", help="compare a list with a dictd dictionary", description=(check.__doc__ or "").partition("\n")[0])
    options.add_argument("--pairs", metavar="PATH", help="the list (default: the shipped one)")
    options.add_argument("--source", default="swahili", help="name of the source language's column (default: %(default)s)")
    options.add_argument("--target", default="english", help="name of the target language's column (default: %(default)s)")
    options.add_argument("--dictionary", metavar="PATH.index", default=FREEDICT, help="a dictd dictionary (default: %(default)s)")
    sys.exit(0 if check(**vars(parser.parse_args(arguments))) >= AGREEMENT else 1)
