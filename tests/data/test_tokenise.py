"""Words as tokens: what a tokenizer does of itself, and what it cannot tell apart."""

import numpy as np
import pytest

from tli.data.packing import first_token, tokenise
from tli.runtime.errors import TliError

WORDS = [f"{letter}{other}" for letter in "bdgkmnpst" for other in ("aba", "ibi", "ubu")]


def saved(backend, folder, **roles):
    """A tokenizer of ``tokenizers``, saved and opened as a checkpoint's is."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, split_special_tokens=True, trust_remote_code=False)


def sentencepiece_like(folder, words=WORDS):
    """Puts a space before a text, and knows no other letters than those of these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    backend.train_from_iterator([*words, "a"], trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    return saved(backend, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def ids(words) -> list[list[int]]:
    return [words.ids[begin:end].tolist() for begin, end in zip(words.indptr, words.indptr[1:])]


def test_a_script_that_the_tokenizer_does_not_know_is_refused(tmp_path):
    tokenizer = sentencepiece_like(tmp_path)
    unknown = list("ሰላምውሃቤትመጽሐፍልጅፀይጨረቃ")
    with pytest.raises(TliError, match=rf"tell words apart.* got {len(unknown)} of {len(unknown) + len(WORDS)}; choose a model whose"):
        tokenise(tokenizer, [*unknown, *WORDS], 64, " ")


def test_few_words_that_are_alike_are_counted(tmp_path):
    tokenizer = sentencepiece_like(tmp_path)
    assert tokenise(tokenizer, [*WORDS, "ሰላ", "ውሃ", "ቤት"], 64, " ").alike == 3
    # the same word in two cases, or twice, is no other word
    assert tokenise(tokenizer, [*WORDS, "ሰላ", "ሰላ"], 64, " ").alike == 0
    assert tokenise(tokenizer, ["ሰላ", "ውሃ"], 64, " ").alike == 2


def test_a_space_is_put_before_a_word_once(tmp_path, tokenizer):
    spaces = sentencepiece_like(tmp_path / "spaces")
    alone = spaces(["baba"], add_special_tokens=False)["input_ids"][0]
    assert spaces.convert_ids_to_tokens(alone)[0].startswith("▁")
    words = tokenise(spaces, ["baba"], 64, " ")
    assert ids(words) == [[spaces.bos_token_id, *alone]]
    assert words.starts.tolist() == [1]
    # of a byte-level one the space is the first token's
    words = tokenise(tokenizer, ["baba"], 64, " ")
    assert tokenizer.decode(ids(words)[0][1:]) == " baba"


@pytest.mark.parametrize("word", ["<s>", "</s>", "a <s> b"])
def test_what_looks_like_a_control_token_is_text(word, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True, trust_remote_code=False)
    (found,) = ids(tokenise(opened, [word], 64, " "))
    assert found[0] == opened.bos_token_id
    assert not {opened.bos_token_id, opened.eos_token_id} & set(found[1:])
    assert opened.decode(found[1:]) == f" {word}"


def test_which_token_comes_first_is_known(tokenizer, tmp_path):
    assert first_token(tokenizer) == {"text": "<s>", "is": "BOS"}
    without = saved(tokenizer.backend_tokenizer, tmp_path, eos_token="</s>")
    assert first_token(without) == {"text": "</s>", "is": "EOS"}
    assert int(np.unique([found[0] for found in ids(tokenise(without, WORDS, 64, " "))]).item()) == without.eos_token_id
