"""``python -m tli.lexicon check``: how far a list of word pairs agrees with a dictd dictionary."""

from tli.config import LexiconConfig
from tli.data.dictionary import AGREEMENT, FREEDICT, check


def lexicon(config: LexiconConfig) -> bool:
    """Print how far ``config.pairs`` agrees with the dictionary, and whether that is enough."""
    return check(config.pairs, config.source, config.target, config.dictionary or FREEDICT) >= AGREEMENT
