"""Every command on models whose blocks are not built like Llama's: trained, measured, embedded, exported, and read by peft."""

import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tli import train
from tli.commands.embed import embed
from tli.commands.evaluate import evaluate
from tli.commands.export import export
from tli.commands.scan import scan
from tli.config import EvaluateConfig, ExportConfig, ScanConfig, TrainConfig
from tli.model.families import FAMILIES
from tli.model.trained_adapter import load_adapter

# those whose memory is not counted one by one: all others are Llama's blocks, which the other tests train
BUILT_DIFFERENTLY = [name for name, family in FAMILIES.items() if family.kept_inside is not None]


@pytest.fixture
def settings(make_model, word_list, tmp_path):
    """A run of twelve steps on a family's model."""

    def of(family: str, **more) -> dict:
        options = {
            "layer": 2,
            "rank": 4,
            "batch": 27,
            "epochs": 6,
            "lr": 3e-3,
            "warmup": 1,
            "output": str(tmp_path / "adapter"),
            "dtype": "float32",
        }
        return {"model": str(make_model(family)), "pairs": str(word_list), **options, **more}

    return of


@pytest.mark.parametrize(
    "family", [name if name in ("gpt2", "bloom") else pytest.param(name, marks=pytest.mark.slow) for name in BUILT_DIFFERENTLY]
)
def test_a_run_is_measured_embedded_and_exported(settings, tmp_path, family, capsys):
    # text to keep is read in the other runs
    options = settings(family, epochs=10, keep_weight=0.0)
    report = train(TrainConfig(**options))
    folder, layer_norm = tmp_path / "adapter", FAMILIES[family].layer_norm
    assert report["config"]["token_norm"] == ("rms" if layer_norm else "final")
    assert (
        "token states are normalised by plain RMS: the model's final norm is a LayerNorm" in " ".join(capsys.readouterr().err.split())
    ) == layer_norm
    assert report["training"]["loss_last"] < report["training"]["loss_first"]
    assert {one["layer"] for one in report["measurements"]} == {0, 1, 2, 3, 4, "output"}
    assert all(one["after"][0]["kl"]["value"] > 0 for one in report["harm"])

    # an evaluation of the adapter's own split finds what training found
    evaluated = evaluate(EvaluateConfig(adapters=(str(folder),), pairs=options["pairs"], output=str(tmp_path / "evaluated")))
    trained, again = (
        {(r["split"], r["when"], r["layer"]): r["value"] for r in facts["measurements"] if r["metric"] == "gap"}
        for facts in (report, evaluated)
    )
    assert len(trained.keys() & again.keys()) > 3
    assert all(again[place] == pytest.approx(trained[place], abs=1e-5) for place in trained.keys() & again.keys())

    # the merged model is the base with the adapter, by transformers and by peft
    export(ExportConfig(adapter=str(folder), output=str(tmp_path / "merged"), dtype="float32"))
    words = ["kitabu", "book", "mtu"]
    apart = embed(words, adapter=str(folder), language="swahili")
    torch.testing.assert_close(embed(words, map=str(tmp_path / "merged"), language="swahili"), apart, rtol=0, atol=1e-4)
    tokens = torch.arange(2, 20)[None]
    base = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32, trust_remote_code=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, folder)(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-3, atol=1e-3)

    scanned = scan(ScanConfig(model=options["model"], pairs=options["pairs"], output=str(tmp_path / "scanned"), dtype="float32"))
    assert scanned["config"]["token_norm"] == report["config"]["token_norm"]


OTHERS: tuple[dict, ...] = ({"dtype": "auto"}, {"dtype": "bfloat16", "weights": "nf4"}, {"arm": "full", "checkpointing": True})
# all of them where positions or weights lie elsewhere, and of the others one each by turns
BY_TURNS = [
    (name, more) for at, name in enumerate(BUILT_DIFFERENTLY) for more in (OTHERS if name in ("gpt2", "bloom") else [OTHERS[at % 3]])
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "more"), BY_TURNS, ids=str)
def test_other_dtypes_weights_and_arms_train_to_the_same_bytes_twice(settings, make_model, tmp_path, family, more):
    # NF4 has blocks of 64
    model = str(make_model(family, hidden_size=64, intermediate_size=128))
    for name in ("a", "b"):
        facts = train(TrainConfig(**settings(family, model=model, no_report=True, output=str(tmp_path / name), **more)))
        assert math.isfinite(facts["training"]["loss_last"])
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (tmp_path / "b" / "adapter_model.safetensors").read_bytes()
    own = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert own["fan_in_fan_out"] == FAMILIES[family].transposed
    assert len(load_adapter(tmp_path / "a").adapter.factors) == len(FAMILIES[family].linear) * (4 if "arm" in more else 2)
