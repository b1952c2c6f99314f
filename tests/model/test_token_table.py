"""Looked up or multiplied: block 0's q, k and v are the same, and so are the loss and every gradient."""

import numpy as np
import pytest
import torch
from tli_kernels.token_table import TokenTable

from tli.data.loader import BatchLoader
from tli.data.packing import tokenise
from tli.data.word_pairs import read_pairs
from tli.model import lora, shape, token_table
from tli.model.checkpoint import open_checkpoint
from tli.model.decoder import enable_gradient_checkpointing, load_truncated_decoder, run
from tli.model.families import FAMILIES, blocks_of, traits_of
from tli.model.pooling import Pooling, resolve_token_norm
from tli.runtime import ops
from tli.runtime.device import DeviceConfig, resolve_device
from tli.runtime.ops import Ops
from tli.training.loss import Objective

TABLED = {"cpu": lambda: ops.on_cpu(ops.Matmul()), "fused": ops.fused}


def gradients(
    model: str, word_list: str, tabled: bool, chosen: Ops, loss: str = "infonce", targets: str = "all-linear", weights: str = "full", **more
):
    """The first batch's loss and the adapters' gradients, by the ops ``chosen``."""
    checkpoint, pairs = open_checkpoint(model), read_pairs(word_list, "swahili", "english")
    device_config = DeviceConfig(torch.float32, torch.device("cpu"), weights, chosen)
    words = tokenise(checkpoint.tokenizer(), [p.source for p in pairs] + [p.target for p in pairs], 64, " ")
    decoder = load_truncated_decoder(checkpoint, 2, words.vocab_ids, device_config)
    if tabled:
        assert token_table.precompute_qkv(decoder) == len(words.vocab_ids) * sum(table.shape[0] for table in tables(decoder)) * 4
        assert len(tables(decoder)) == len(traits_of(decoder).tables)
    if more.get("checkpointing"):
        enable_gradient_checkpointing(decoder)
    lora.inject(decoder, lora.LoRAConfig(rank=4, alpha=8.0, targets=targets, dropout=0.3), seed=1)
    generator = torch.Generator().manual_seed(0)
    for seed, adapter in enumerate(lora.adapters(decoder).values()):
        adapter.lora_B.data.normal_(std=0.1, generator=generator)
        adapter.seed = seed
    pool, objective = (
        Pooling.from_checkpoint(resolve_token_norm("auto", checkpoint), checkpoint, device_config.device, chosen),
        Objective(loss, 0.1, 0.4, chosen),
    )
    (part,), false_negatives = next(iter(BatchLoader(words, pairs, device_config, batch=16).epoch(0)))
    value = objective(pool(run(decoder.train(), part), part), false_negatives)
    value.backward()
    return value, {path: (adapter.lora_A.grad, adapter.lora_B.grad) for path, adapter in lora.adapters(decoder).items()}


def tables(decoder) -> list[TokenTable]:
    weights = (module.weight for module in blocks_of(decoder)[0].modules() if isinstance(module, torch.nn.Linear))
    return [weight for weight in weights if isinstance(weight, TokenTable)]


def equal(one, other, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=0)
    assert one[1].keys() == other[1].keys()
    for path, factors in other[1].items():
        for got, right in zip(one[1][path], factors, strict=True):
            assert (got - right).norm() <= tolerance * right.norm(), path


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.tables])
@pytest.mark.parametrize(
    "options",
    # q_proj,v_proj and o_proj, and so on
    [{}, {"targets": (0, 2), "loss": "hinge"}, {"targets": (3,), "checkpointing": True}],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_weights(make_model, word_list, family, options):
    model, names = str(make_model(family)), [path.rpartition(".")[2] for path in FAMILIES[family].linear]
    if "targets" in options:
        options = {**options, "targets": ",".join(names[place] for place in options["targets"])}
    equal(*(gradients(model, str(word_list), tabled, ops.on_cpu(ops.Matmul()), **options) for tabled in (True, False)))


@pytest.mark.slow
@pytest.mark.parametrize("chosen", TABLED.values(), ids=TABLED)
def test_so_they_are_in_nf4_and_by_the_fused_ops(make_model, word_list, chosen):
    model = str(make_model("qwen2", hidden_size=64, intermediate_size=128))
    equal(*(gradients(model, str(word_list), tabled, chosen(), weights="nf4") for tabled in (True, False)), 2e-5)


def test_the_weights_stay_where_they_are_smaller_and_where_every_bit_counts(make_model, monkeypatch):
    checkpoint = open_checkpoint(str(make_model("llama")))

    def loaded(impl: str = "auto"):
        return load_truncated_decoder(checkpoint, 1, np.arange(200), resolve_device("cpu", "float32", impl=impl))

    # 200 rows of 128 products against 48 x 128 weights
    monkeypatch.setattr(shape, "MOST_TABLE_BYTES", 200 * 128 * 4)
    assert token_table.precompute_qkv(loaded()) == 200 * 128 * 4
    monkeypatch.setattr(shape, "MOST_TABLE_BYTES", 200 * 128 * 4 - 1)
    decoder = loaded()
    assert token_table.precompute_qkv(decoder) is None
    assert not tables(decoder)
    assert shape.table_bytes(200, 128, 4, weight_bytes=200 * 128 * 4) == 200 * 128 * 4
    monkeypatch.setattr(shape, "MOST_TABLE_BYTES", 1 << 30)
    assert token_table.precompute_qkv(loaded("reference")) is None


def test_a_table_is_of_the_tokens_that_were_set_and_has_no_way_back():
    linear = ops.on_cpu(ops.Matmul()).linear
    table = TokenTable(torch.arange(12.0).view(4, 3), torch.Size((3, 5)))
    with pytest.raises(ValueError, match="the tokens of 2 rows must have been set, got None"):
        linear(torch.zeros(2, 5), table)
    table.tokens = torch.tensor([[3], [0]])
    assert torch.equal(linear(torch.zeros(2, 5), table), torch.tensor([[9.0, 10, 11], [0, 1, 2]]))
    with pytest.raises(ValueError, match="the tokens of 3 rows must have been set, got 2"):
        linear(torch.zeros(3, 5), table)
    with pytest.raises(ValueError, match="the input must want no gradient"):
        table.lookup(torch.zeros(2, 5, requires_grad=True))
