"""Running text as a model reads it: in windows of equal width, each behind one sink."""

import codecs
import dataclasses
import os
import pathlib

import numpy as np
import torch

from tli.data.batch import Batch
from tli.data.packing import sink_token
from tli.data.word_pairs import SHIPPED
from tli.model.checkpoint import Checkpoint, context_length
from tli.model.shape import SHORT_WIDTH
from tli.runtime.device import DeviceConfig
from tli.runtime.errors import TliError
from tli.runtime.files import sha256

DEFAULT_WIDTH = 256
_MOST_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class TextWindows:
    """A text in windows of equal width, each behind one sink; only the last may be shorter.

    tokens     int64 [windows, width]  positions in ``vocab_ids``; 0 behind a window's end
    lengths    int64 [windows]         tokens of each window, sink included; at least 2
    vocab_ids  int64 [V]               the token ids that occur, ascending
    facts      what the text was, for a report
    """

    tokens: np.ndarray
    lengths: np.ndarray
    vocab_ids: np.ndarray
    facts: dict

    @property
    def width(self) -> int:
        """Tokens of a window, sink included."""
        return self.tokens.shape[1]


# pages of each language, read where no text is named: those that show harm are never those that training keeps
_LANGUAGES = ("swahili", "english")
_SHIPPED = {kind: tuple(SHIPPED.parent / f"{kind}-text-{language}.txt" for language in _LANGUAGES) for kind in ("running", "kept")}


# what is read of a text at first: most languages' tokens are shorter
_BYTES_A_TOKEN, _TOKENS_BEHIND = 8, 64


def read_texts(path: str | os.PathLike | None, checkpoint: Checkpoint) -> list[TextWindows]:
    """A named text in windows, as by ``read_windows``, no more than 8,192 tokens of it; None: the shipped texts, in short windows."""
    if path is not None:
        return [read_windows(path, checkpoint, most_tokens=_MOST_TOKENS)]
    return [read_windows(text, checkpoint, min(SHORT_WIDTH, context_length(checkpoint))) for text in _SHIPPED["running"]]


def read_kept_texts(path: str | os.PathLike | None, checkpoint: Checkpoint) -> list[TextWindows]:
    """Text for training to keep, in short windows: no more than 8,192 tokens of a named one; None: the shipped texts that are for this."""
    width = min(SHORT_WIDTH, context_length(checkpoint))
    paths = _SHIPPED["kept"] if path is None else [path]
    return [read_windows(text, checkpoint, width, _MOST_TOKENS, "--keep") for text in paths]


def read_windows(
    path: str | os.PathLike, checkpoint: Checkpoint, width: int | None = None, most_tokens: int | None = None, flag: str = "--text"
) -> TextWindows:
    """Read a UTF-8 text, tokenise it whole, and cut it into windows of ``width`` tokens, the sink included.

    width         None: 256, or what the model can see where that is less
    most_tokens   read no more of the text than this; None: all of it
    flag          what named it

    Raises:
        TliError: a file that cannot be read or holds less than two tokens, a width that the model cannot see whole.
    """
    path = pathlib.Path(path)
    widest = context_length(checkpoint)
    width = min(DEFAULT_WIDTH, widest) if width is None else width
    if not 2 <= width <= widest:
        raise TliError("--window", f"a window must be 2 to {widest} tokens wide, the model's own", width, "choose one in this range")
    tokenizer = checkpoint.tokenizer()
    sink = sink_token(tokenizer)
    found, is_whole = _tokens(path, tokenizer, most_tokens, flag)
    ids = np.array(found if most_tokens is None else found[: max(0, most_tokens)], np.int64)
    if len(ids) < 2:
        raise TliError(path, "the text must hold at least 2 tokens", len(ids), f"name a longer text with {flag}")
    windows = -(-len(ids) // (width - 1))
    lengths = np.full(windows, width)
    lengths[-1] = 1 + len(ids) - (windows - 1) * (width - 1)
    width = int(lengths.max())
    vocab_ids, numbers = np.unique(np.append(ids, sink), return_inverse=True)
    tokens = np.zeros((windows, width), np.int64)
    tokens[:, 0] = numbers[-1]
    tokens[:, 1:][np.arange(1, width) < lengths[:, None]] = numbers[:-1]
    facts = {
        "name": path.name,
        "sha256": sha256(path),
        "tokens": len(ids),
        # of a text that is longer nobody has read the rest
        "tokens_in_file": len(found) if is_whole else None,
        "windows": windows,
        "width": width,
    }
    return TextWindows(tokens, lengths, vocab_ids, facts)


def _tokens(path: pathlib.Path, tokenizer, most: int | None, flag: str) -> tuple[list[int], bool]:
    """The text's tokens, and whether these are all: of a long text no more is read than it takes to have ``most`` of them."""
    some_bytes = -1 if most is None else _BYTES_A_TOKEN * (most + 4 * _TOKENS_BEHIND)
    while True:
        try:
            with path.open("rb") as file:
                head = file.read(some_bytes)
                is_whole = not file.read(1)
            # a letter of several bytes may be cut through, and what is read of the last word may have other tokens than all of it
            text = codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=is_whole)
        except (OSError, UnicodeDecodeError) as error:
            got = f"byte {error.start}: no UTF-8" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error)).lower()
            raise TliError(path, "the text must be a readable UTF-8 file", got, f"name another with {flag}") from error
        # it would warn that the text is longer than the model's window
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if is_whole or most is None or len(found) > most + _TOKENS_BEHIND:
            return found, is_whole
        some_bytes *= 4


def windows_batch(windows: TextWindows, device_config: DeviceConfig) -> Batch:
    """The windows as the blocks take them. What is behind a window's end lies behind all that could see it."""
    bins, width = windows.tokens.shape
    mask = torch.full((width, width), torch.finfo(device_config.dtype).min, dtype=device_config.dtype, device=device_config.device).triu_(1)
    nothing = torch.zeros(0, dtype=torch.int64, device=device_config.device)
    return Batch(
        input_ids=torch.from_numpy(windows.tokens).to(device_config.device),
        position_ids=torch.arange(width, device=device_config.device).repeat(bins, 1),
        mask=mask.repeat(bins, 1, 1, 1),
        indptr=nothing,
        indices=nothing,
        sinks=nothing,
    )
