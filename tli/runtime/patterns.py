"""Regular expressions out of options and other people's files: some, such as (a+)+$, would go on for ever, so each match has a second."""

import functools

from tli.runtime.errors import TliError

_MOST_S = 1.0


class Pattern:
    """A regular expression.

    Args:
        text:   as it was given
        where:  the option or file that gave it, for errors
        must:   what the text must be, for errors

    Raises:
        TliError: no regular expression.
    """

    def __init__(self, text: str, where: object, must: str = "the text must be a regular expression"):
        import regex

        self.text, self.where = text, where
        try:
            self._compiled = regex.compile(text)
        except (regex.error, RecursionError, OverflowError) as error:
            raise TliError(where, must, f"{text} ({error})", "correct it") from error

    def fullmatch(self, text: str) -> bool:
        """Whether it matches all of ``text``; raises ``TliError`` where that takes longer than a second."""
        try:
            return self._compiled.fullmatch(text, timeout=_MOST_S) is not None
        except TimeoutError as error:
            must, remedy = "a regular expression must be matched within a second", "write it without a repetition of repetitions"
            raise TliError(self.where, must, self.text, remedy) from error


@functools.lru_cache(maxsize=256)
def pattern(text: str, where: object, must: str = "the text must be a regular expression") -> Pattern:
    """The same, compiled once."""
    return Pattern(text, where, must)
