"""The term for kept text: its value and gradients written out, what it looks at, and that it keeps text where it was."""

import numpy as np
import pytest
import torch

from tli.model import lora
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import load_truncated_decoder, run
from tli.model.text_windows import read_kept_texts
from tli.runtime.device import resolve_device
from tli.runtime.errors import TliError
from tli.training.kept_text import KeptText
from tli.training.loss import Objective
from tli.training.step import OptimiserSettings, TrainStep

CPU = resolve_device("cpu", "float32", impl="reference")
TEXT = "Habari za asubuhi. Watoto wanasoma vitabu shuleni; mwalimu anafundisha. The children read books.\n" * 6


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def made(make_model, text, weight=3.0, seed=0):
    """The term over a model of two blocks, its windows, and the model, whose adapters have moved since."""
    checkpoint = open_checkpoint(str(make_model("llama")))
    texts = read_kept_texts(text, checkpoint)
    # rows that no text needs lie between those that are needed
    vocab_ids = np.union1d(texts[0].vocab_ids, np.arange(0, checkpoint.config.vocab_size, 3))
    decoder = load_truncated_decoder(checkpoint, 2, vocab_ids, CPU)
    lora.inject(decoder, lora.LoRAConfig(rank=4, alpha=8.0))
    keep = KeptText(lambda batch: run(decoder, batch), texts, vocab_ids, CPU, weight, seed)
    return keep, texts[0], decoder


def move(decoder, size=0.3):
    generator = torch.Generator().manual_seed(0)
    for adapter in lora.adapters(decoder).values():
        adapter.lora_B.data.normal_(std=size, generator=generator)


def test_the_term_is_the_mean_relative_change_of_the_chosen_windows_without_the_sink(make_model, text):
    keep, windows, decoder = made(make_model, text)
    keep.choose(0)
    assert keep().item() == 0.0
    move(decoder)
    chosen = keep.chosen.tolist()
    assert len(set(chosen)) == len(chosen) == 4
    ratios = []
    for window in chosen:
        tokens = torch.from_numpy(windows.vocab_ids[windows.tokens[window, : windows.lengths[window]]])[None]
        states = []
        for scale in (0.0, 1.0):
            for adapter in lora.adapters(decoder).values():
                adapter.scale = 2.0 * scale
            rows = torch.searchsorted(torch.from_numpy(keep_vocab(decoder, windows)), tokens)
            states.append(decoder(input_ids=rows, use_cache=False).last_hidden_state[0, 1:].double())
        ratios += ((states[1] - states[0]).square().sum(1) / states[0].square().sum(1)).tolist()
    assert keep().item() == pytest.approx(3.0 * np.mean(ratios), rel=1e-4)
    assert keep().item() > 0.01


def keep_vocab(decoder, windows):
    """The rows that ``made`` gave the model: the text's own, and every third one."""
    return np.union1d(windows.vocab_ids, np.arange(0, 3 * decoder.embed_tokens.weight.shape[0], 3))[: decoder.embed_tokens.weight.shape[0]]


def test_windows_are_drawn_by_the_position_alone(make_model, text):
    keep, windows, _ = made(make_model, text)
    drawn = []
    for position in (0, 1, 2, 0):
        keep.choose(position)
        drawn.append(tuple(keep.chosen.tolist()))
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) > 1
    assert set(np.concatenate(drawn)) <= set(range(len(windows.lengths)))


def test_what_stands_behind_a_windows_end_counts_for_nothing(make_model, text):
    keep, windows, decoder = made(make_model, text)
    assert windows.lengths[-1] < windows.width
    move(decoder)
    keep.chosen.fill_(len(windows.lengths) - 1)
    before = keep().item()
    keep.kept[-1, windows.lengths[-1] :] = 1e3
    assert keep().item() == before


def test_a_step_with_it_keeps_text_nearer_than_one_without(make_model, text):
    moved = {}
    for weight in (0.0, 100.0):
        keep, _, decoder = made(make_model, text, weight=1.0)

        def embed(batch, decoder=decoder):
            return torch.nn.functional.normalize(run(decoder, batch)[:8], dim=1)

        keep.weight = weight
        step = TrainStep(decoder.train(), embed, Objective("infonce", 0.1, 0.4), OptimiserSettings(lr=5e-3), keep=keep)
        for position in range(12):
            step(position, [keep._batch(keep.input_ids[:1])], torch.zeros(0, 2, dtype=torch.int64))
        assert all(np.isfinite(result.keep) for result in step.pop_results(wait=True))
        keep.weight = 1.0
        keep.choose(0)
        moved[weight] = keep().item()
    assert moved[100.0] < 0.5 * moved[0.0]


def test_a_text_that_cannot_be_read_is_named_by_its_flag(make_model, tmp_path):
    with pytest.raises(TliError, match="the text must be a readable UTF-8 file, got no such file or directory; name another with --keep"):
        read_kept_texts(tmp_path / "none.txt", open_checkpoint(str(make_model("llama"))))


def test_the_shipped_pages_are_others_than_those_that_show_harm(make_model):
    from tli.model.text_windows import read_texts

    checkpoint = open_checkpoint(str(make_model("llama")))
    kept, shown = read_kept_texts(None, checkpoint), read_texts(None, checkpoint)
    assert {one.facts["sha256"] for one in kept}.isdisjoint(one.facts["sha256"] for one in shown)
