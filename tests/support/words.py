"""Words as tests look at them."""

import numpy as np


def tokens_of(words) -> np.ndarray:
    """All words of a ``TokenisedWords`` as positions in its rows, int64 [words, longest]."""
    return words.padded(np.arange(len(words)))[0]
