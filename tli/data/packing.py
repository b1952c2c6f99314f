"""Words -> prefix-trie bins: each prefix that words share is computed once, and exactly.

Under causal attention a token's state is a function of its prefix alone, so the words of a batch form one trie: the
sink (BOS) is its root, a word is a path from the root. The trie is cut into bins of bounded width, each a row of the model's
input. ``position_ids`` are depths, and the mask lets a node see its ancestors and itself, nothing else: what every
node computes is what it would compute in its word alone.

    words   [BOS ki ta bu] [BOS ki ti] [BOS m eza]          padded 3 x 4 = 12 tokens
    trie    BOS ─┬─ ki ─┬─ ta ── bu                          7 nodes
                 │      └─ ti
                 └─ m ── eza

Sorted by token, a word shares with the word before it a prefix of some length (lcp) and adds the rest as new nodes, so
everything below is arithmetic on the lcp array. A bin that begins at a word repeats that word's whole prefix.
"""

import dataclasses
import hashlib
import itertools
import tempfile
from array import array
from collections.abc import Iterable

import numpy as np

from tli.runtime.errors import TliError, disk_errors

DEFAULT_WIDTH = 128
_CHUNK_WORDS = 2048
# of so few words any may be alike, and so many are compared: what a list takes does not grow with them
_FEW_WORDS, _COMPARED_WORDS = 16, 1 << 15


@dataclasses.dataclass(frozen=True)
class TokenisedWords:
    """Words as token ids, sink first, one behind the other.

    ids        int32 [tokens]     token ids; of many words in a file, mapped
    indptr     int64 [words + 1]  where each word begins in ``ids``
    starts     int32 [words]      the first of its tokens that is the word's own
    vocab_ids  int64 [V]          the token ids that the model keeps embedding rows of, ascending; all that occur are there
    alike      int                how many different words, among the first, have all their tokens in common with another one
    """

    ids: np.ndarray
    indptr: np.ndarray
    starts: np.ndarray
    vocab_ids: np.ndarray
    alike: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [words]: tokens of each word, sink included."""
        return np.diff(self.indptr)

    def sha256(self) -> str:
        """The hash of the words' tokens: of other words, or of another tokenizer's, it is another."""
        digest = hashlib.sha256()
        for numbers in (self.ids, self.indptr):
            # where it lies, often in a mapped file: of a million words none is held
            digest.update(np.ascontiguousarray(numbers).data)
        return digest.hexdigest()

    def with_all_rows(self, vocabulary: int) -> "TokenisedWords":
        """The same words over the whole embedding table: tokens are token ids."""
        return dataclasses.replace(self, vocab_ids=np.arange(vocabulary))

    def padded(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the words with these numbers as positions in ``vocab_ids``, int64 [words, longest], and lengths; 0 behind an end."""
        lengths = self.indptr[words + 1] - self.indptr[words]
        depth = np.arange(lengths.max(initial=0))
        inside = depth < lengths[:, None]
        tokens = np.zeros(inside.shape, np.int64)
        tokens[inside] = np.searchsorted(self.vocab_ids, self.ids[(self.indptr[words, None] + depth)[inside]])
        return tokens, lengths

    def pack(self, words: np.ndarray, pool_bos: bool = False, width: int = DEFAULT_WIDTH, width_step: int = 1) -> "PackedWords":
        """Pack the words with these numbers, in this order; ``pool_bos`` takes the sink, and all else, into the pool."""
        return pack(*self.padded(words), self.starts[words] * (not pool_bos), width, width_step)


def sink_token(tokenizer) -> int:
    """The token that comes first: the tokenizer's BOS, or its EOS where it has no BOS."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def first_token(tokenizer) -> dict[str, str]:
    """The token that comes first, for a report: as it is written, and what it is to its tokenizer, BOS or EOS."""
    return {"text": tokenizer.convert_ids_to_tokens(sink_token(tokenizer)), "is": "EOS" if tokenizer.bos_token_id is None else "BOS"}


def tokenise(tokenizer, words: Iterable[str], window: int, prefix: str = "") -> TokenisedWords:
    """Tokenise each word, behind ``prefix``, behind one sink: the tokenizer's BOS, or its EOS where it has no BOS.

    A token that lies in the prefix alone is context; the word's own tokens begin with the first that reaches into it. A space is no
    prefix where the tokenizer itself puts one before a text. Words are taken some at a time, and their tokens go to a temporary file: of
    a million words none is held.

    Raises:
        TliError: a word without tokens, or with more than ``window``; a tokenizer that cannot tell more than a quarter of them apart.
    """
    sink, prefix = sink_token(tokenizer), "" if prefix == " " and _puts_a_space(tokenizer) else prefix
    # of the first words: what each is, and what its tokens are
    texts_seen, tokens_seen = array("q"), array("q")
    words, indptr, starts, occurs = iter(words), array("q", [0]), array("i"), np.zeros(0, bool)
    with disk_errors(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
        while texts := list(itertools.islice(words, _CHUNK_WORDS)):
            # special tokens are left to us: some tokenizers add a BOS, some an EOS, some neither; lists of ones and zeros cost time
            wanted = {"return_offsets_mapping": True, "return_attention_mask": False, "return_token_type_ids": False}
            encoded = tokenizer([prefix + text for text in texts], add_special_tokens=False, **wanted)
            for text, word_ids, spans in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                own = sum(end > len(prefix) for _, end in spans)
                if not own or len(word_ids) >= window:
                    shown = text if len(text) <= 40 else text[:40] + "..."
                    must = f"a word must have 1 to {window - 1} tokens (the model's window)"
                    raise TliError(f"word {shown!r}", must, len(word_ids) if own else 0, "shorten or remove it")
                if len(texts_seen) < _COMPARED_WORDS:
                    texts_seen.append(hash(text.casefold()))
                    tokens_seen.append(hash(tuple(word_ids)))
                indptr.append(indptr[-1] + 1 + len(word_ids))
                starts.append(1 + len(word_ids) - own)
            ids = np.array([token for word_ids in encoded["input_ids"] for token in (sink, *word_ids)], np.int32)
            occurs = np.pad(occurs, (0, max(0, int(ids.max()) + 1 - len(occurs))))
            occurs[ids] = True
            file.write(ids.tobytes())
        file.flush()
        lists = np.frombuffer(indptr, np.int64), np.frombuffer(starts, np.int32)
        alike = _alike(np.frombuffer(texts_seen, np.int64), np.frombuffer(tokens_seen, np.int64))
        return TokenisedWords(np.memmap(file, np.int32, "r"), *lists, np.flatnonzero(occurs), alike)


def _puts_a_space(tokenizer) -> bool:
    """Whether the first word of a text has the tokens that it has behind a space, as SentencePiece's tokenizers do it."""
    first, both = tokenizer(["a", "a a"], add_special_tokens=False)["input_ids"]
    return list(both) == 2 * list(first)


def _alike(texts: np.ndarray, tokens: np.ndarray) -> int:
    """How many different words have all their tokens in common with another; raises ``TliError`` for more than a quarter of them."""
    different = np.unique(np.stack([tokens, texts]), axis=1)
    _, count = np.unique(different[0], return_counts=True)
    alike = int(count[count > 1].sum())
    if 4 * alike > max(different.shape[1], _FEW_WORDS):
        must = "the tokenizer must tell words apart, and few may have all their tokens in common with another"
        raise TliError("--model", must, f"{alike:,} of {different.shape[1]:,}", "choose a model whose tokenizer knows this script")
    return alike


@dataclasses.dataclass(frozen=True)
class PackedWords:
    """The bins of one trie. T = bins·width is the number of nodes, padding included.

    input_ids       int64 [bins, width]           0 in padding
    position_ids    int64 [bins, width]           depth below the root; 0 in padding
    attention_mask  bool  [bins, width, width]    [b, q, k]: k is an ancestor of q, or q itself (also in padding)
    indptr          int64 [words + 1]             where each word's nodes begin in indices
    indices         int64 [entries]               pooled nodes of each word, as flat positions in 0..T-1
    sinks           int64 [words]                 the flat position of each word's sink
    nodes           int                           nodes that carry a token: T less the padding
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    sinks: np.ndarray
    nodes: int


def pack(tokens: np.ndarray, lengths: np.ndarray, starts: np.ndarray, width: int = DEFAULT_WIDTH, width_step: int = 1) -> PackedWords:
    """Pack words into the fewest trie bins that a sweep in sorted order fills, then as narrow as that many bins allow.

    Args:
        tokens:      int64 [words, longest] token ids, each row one word from its sink on; anything behind its length
        lengths:     int64 [words] tokens in each row, at least 1
        starts:      int64 [words] first position to pool: 1 leaves the sink out, 0 takes it in; more skips a template
        width:       upper bound of a bin's width; a longer word widens it
        width_step:  the width is rounded up to a multiple of this, so that batches have few distinct shapes

    Returns:
        The bins, with words in the order given. Equal words share all their nodes.
    """
    words, longest = tokens.shape
    depth = np.arange(longest)
    tokens = np.where(depth < lengths[:, None], tokens, -1)
    order = np.lexsort(tokens.T[::-1])
    tokens, lengths, starts = tokens[order], lengths[order], starts[order]

    lcp = np.zeros(words, np.int64)
    lcp[1:] = np.cumprod((tokens[1:] == tokens[:-1]) & (tokens[1:] >= 0), axis=1).sum(axis=1)
    # new_before[i]: new nodes of the words up to and including i, were there only one bin
    new_before = np.cumsum(lengths - lcp)
    firsts, width = _cut(lengths, new_before, max(width, int(lengths.max())))
    width = -(-width // width_step) * width_step

    bin_of = np.searchsorted(firsts, np.arange(words), side="right") - 1
    first = firsts[bin_of]
    is_first = first == np.arange(words)
    # the depth from which on a word has nodes of its own, and the column of its bin where these begin
    own_from = np.where(is_first, 0, lcp)
    own_column = np.where(is_first, 0, lengths[first] + new_before - (lengths - lcp) - new_before[first])

    # the word that made the node at each depth is the last one, up to this word, with nodes of its own so deep
    maker = np.maximum.accumulate(np.where(own_from[:, None] <= depth, np.arange(words)[:, None], 0), axis=0)
    column = own_column[maker] + depth - own_from[maker]

    word, own_depth = np.nonzero((depth >= own_from[:, None]) & (depth < lengths[:, None]))
    own_bin, own = bin_of[word], column[word, own_depth]
    shape = (len(firsts), width)
    input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    input_ids[own_bin, own] = tokens[word, own_depth]
    position_ids[own_bin, own] = own_depth
    attention_mask = np.zeros((*shape, width), bool)
    attention_mask[:, np.arange(width), np.arange(width)] = True
    node, ancestor_depth = np.nonzero(depth <= own_depth[:, None])
    attention_mask[own_bin[node], own[node], column[word[node], ancestor_depth]] = True

    # back to the order in which the words came
    back = np.argsort(order)
    column, lengths, starts, bin_of = column[back], lengths[back], starts[back], bin_of[back]
    flat = bin_of[:, None] * width + column
    pooled = (depth >= starts[:, None]) & (depth < lengths[:, None])
    indptr = np.concatenate([[0], np.cumsum(pooled.sum(axis=1))])
    return PackedWords(input_ids, position_ids, attention_mask, indptr, flat[pooled], flat[:, 0], len(own))


def _cut(lengths: np.ndarray, new_before: np.ndarray, width: int) -> tuple[np.ndarray, int]:
    """Where bins of at most ``width`` begin, and the narrowest width that needs no more bins."""
    bins = len(_firsts(lengths, new_before, width))
    low, high = max(int(lengths.max()), -(-int(new_before[-1]) // bins)), width
    while low < high:
        middle = (low + high) // 2
        if len(_firsts(lengths, new_before, middle)) <= bins:
            high = middle
        else:
            low = middle + 1
    return _firsts(lengths, new_before, high), high


def _firsts(lengths: np.ndarray, new_before: np.ndarray, width: int) -> np.ndarray:
    """The first word of each bin when sorted words fill bins of ``width`` one after the other."""
    firsts, first = [], 0
    while first < len(lengths):
        firsts.append(first)
        # the bin holds the first word whole and the new nodes of those behind it
        first = int(np.searchsorted(new_before, new_before[first] + width - lengths[first], side="right"))
    return np.array(firsts)
