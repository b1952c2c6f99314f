"""The one door to the kernels: what is chosen and said, tuning, and training through every fused op."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tli_kernels import checks, launch, reference

from tests.support.fidelity import DEVICE
from tli import train
from tli.commands import tune
from tli.config import MODELS, TrainConfig
from tli.runtime import ops
from tli.runtime.errors import TliError

CPU, ONEDNN = torch.device("cpu"), ops.Matmul("onednn")


def resolved(impl: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU, matmul: ops.Matmul = ONEDNN) -> ops.Ops:
    return ops.resolve(impl, dtype, device, lambda: matmul)


def test_what_was_asked_for_is_taken_and_said():
    reference, fused, on_cpu = resolved("reference"), resolved("fused", device=DEVICE), resolved("auto")
    assert reference.description == "reference ops (asked for)"
    assert fused.description.startswith("fused ops (asked for): NF4 decoded in the product up to 64 rows")
    assert on_cpu.description == "reference ops, linear layers by oneDNN (float32 on a CPU)"
    assert resolved("auto", matmul=ops.Matmul()).description == "reference ops, linear layers by torch's own product (float32 on a CPU)"
    assert [one.exact for one in (reference, fused, on_cpu)] == [True, False, False]


@pytest.mark.parametrize("kind", ["reference", "cpu", "fused"])
def test_every_implementation_computes_from_every_kind_of_weight(kind):
    """Truth: the 4-bit numbers decoded one by one, in fp64."""
    if kind == "cpu" and DEVICE.type != "cpu":
        pytest.skip("its tensors are on a CPU")
    chosen = {"reference": lambda: ops.REFERENCE, "cpu": lambda: ops.on_cpu(ops.Matmul()), "fused": ops.fused}[kind]()
    generator = torch.Generator().manual_seed(0)
    codes, scales = torch.randint(256, (40 * 32,), generator=generator).to(torch.uint8), torch.rand(40, generator=generator)
    packed = ops.NF4Weight(codes, scales, torch.linspace(-1, 1, 16), (40, 64), torch.float32)
    nibbles = [nibble for byte in codes.tolist() for nibble in (byte >> 4, byte & 15)]
    truth = packed.code.double()[nibbles].view(40, 64) * scales.double()[:, None]
    x, a, b, bias, dy = (torch.randn(size, generator=generator) for size in ((3, 5, 64), (4, 64), (40, 4), (40,), (3, 5, 40)))
    low_rank = 0.5 * b.double() @ a.double()
    for name, added, factors in (("linear", 0.0, ()), ("lora_linear", low_rank, (a.to(DEVICE), b.to(DEVICE), 0.5))):
        wanted = x.double() @ (truth + added).T + bias.double()
        op = getattr(chosen, name)
        for weight in (packed.to(DEVICE), truth.float().to(DEVICE)):
            leaf = x.to(DEVICE, copy=True).requires_grad_()
            y = op(leaf, weight, *factors, bias=bias.to(DEVICE))
            (dx,) = torch.autograd.grad(y, leaf, dy.to(DEVICE))
            torch.testing.assert_close(y.cpu().double(), wanted, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(dx.cpu().double(), dy.double() @ (truth + added), rtol=1e-5, atol=1e-4)
        tokens = torch.arange(14, -1, -1, device=DEVICE).view(3, 5)
        products = (x.double() @ truth.T + bias.double()).flatten(0, 1).flip(0)
        table = ops.TokenTable(products.float().to(DEVICE), packed.shape, tokens)
        y = op(x.to(DEVICE), table, *factors)
        torch.testing.assert_close(y.cpu().double(), wanted, rtol=1e-5, atol=1e-4)


def test_asking_for_fused_ops_never_falls_back(monkeypatch):
    with pytest.raises(TliError, match="^--impl: the fused ops must be able to run, got bfloat16, which Triton's interpreter"):
        resolved("fused", torch.bfloat16)
    monkeypatch.setattr(checks, "interpreted", lambda: False)
    with pytest.raises(TliError, match="got device cpu without TRITON_INTERPRET=1; use --impl auto or reference$"):
        resolved("fused")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["lora_linear", "pool_norm", "infonce", "hinge"])
def test_fused_ops_that_give_other_numbers_are_not_taken(monkeypatch, op):
    """As on a GPU, at the start of a run: here the try itself, in the interpreter."""
    ops._fused_agree.cache_clear()
    assert ops._fused_agree(torch.float32, DEVICE)
    right = ops.fused()
    wrong = dataclasses.replace(right, **{op: lambda *operands, **options: 1.1 * getattr(right, op)(*operands, **options)})
    monkeypatch.setattr(ops, "fused", lambda: wrong)
    ops._fused_agree.cache_clear()
    assert not ops._fused_agree(torch.float32, DEVICE)
    ops._fused_agree.cache_clear()


@pytest.mark.slow
def test_the_try_passes_in_a_dtype_that_its_operands_are_not_in():
    """As every GPU does, which computes in 16 bits, and where the operands, drawn on the CPU, are not."""
    ops._fused_agree.cache_clear()
    assert ops._fused_agree(torch.float16, DEVICE)
    ops._fused_agree.cache_clear()


@pytest.mark.parametrize("problem", ["other numbers", "an exception"])
def test_on_a_gpu_where_the_try_fails_auto_takes_the_reference_and_says_so(monkeypatch, problem):
    def tried(dtype, device):
        if problem == "an exception":
            raise RuntimeError("no kernel image is available\nfor this device")
        return False

    monkeypatch.setattr(ops, "_fused_agree", tried)
    gpu = torch.device("cuda")
    reason = {"other numbers": "gave other numbers", "an exception": "failed: no kernel image is available for this device"}[problem]
    taken = resolved("auto", torch.bfloat16, gpu)
    assert taken.kind == "reference"
    assert taken.description == f"reference ops (the fused ops, tried on this GPU, {reason})"
    with pytest.raises(TliError, match=f"--impl: the fused ops must be able to run, got the fused ops, tried on this GPU, {reason}"):
        resolved("fused", torch.bfloat16, gpu)


@pytest.mark.slow
def test_a_machine_without_triton_imports_and_trains_on_the_reference(tmp_path, make_model):
    model = make_model("llama", hidden_size=64, intermediate_size=128)
    (tmp_path / "words.tsv").write_text("swahili\tenglish\nkitabu\tbook\nmtoto\tchild\nmtu\tperson\nnyumba\thouse\n")
    code = """
import sys
sys.modules["triton"] = None  # an import of it fails
from tli import TliError, TrainConfig, train
"""
    code += f"""
options = dict(model={str(model)!r}, pairs={str(tmp_path / "words.tsv")!r}, held_out=0.25, batch=2, epochs=1, no_report=True, weights="nf4")
train(TrainConfig(output={str(tmp_path / "run")!r}, **options))
try:
    train(TrainConfig(output={str(tmp_path / "fused")!r}, impl="fused", **options))
except TliError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--impl: the fused ops must be able to run, got no triton on this machine; use --impl auto or reference" in done.stdout


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.tsv"
    pairs = [
        "kitabu\tbook",
        "kitanda\tbed",
        "kiti\tchair",
        "mtoto\tchild",
        "mtu\tperson",
        "binadamu\tperson",
        "nyumba\thouse",
        "maji\twater",
    ]
    path.write_text("\n".join(["swahili\tenglish", *pairs]) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "infonce", "weights": "nf4", "token_norm": "final"},
        {"loss": "hinge", "weights": "full", "token_norm": "none", "pool_bos": True},
    ],
    ids=["infonce-nf4", "hinge-full"],
)
def test_a_model_trains_through_every_fused_op_with_the_references_losses(make_model, words, tmp_path, options):
    model = make_model("llama", hidden_size=64, intermediate_size=128)
    losses, adapters = [], []
    for impl in ("reference", "fused"):
        output = tmp_path / impl
        common = {"model": str(model), "pairs": str(words), "layer": 1, "rank": 4, "batch": 4, "epochs": 2, "warmup": 0, "held_out": 0.2}
        config = TrainConfig(**common, **options, impl=impl, device=DEVICE.type, dtype="float32", output=str(output), no_report=True)
        facts = train(config)
        losses.append([facts["training"]["loss_first"], facts["training"]["loss_last"]])
        adapters.append(load_file(output / "adapter_model.safetensors"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, factor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], factor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_fused_ops_are_what_ran(make_model, words, tmp_path, monkeypatch):
    launched, run = set(), launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *rest, **options: (launched.add(kernel.fn.__module__), run(kernel, *rest, **options)))
    model = make_model("llama", hidden_size=64, intermediate_size=128)
    common = {"model": str(model), "pairs": str(words), "layer": 1, "rank": 4, "batch": 6, "epochs": 1, "held_out": 0.2, "weights": "nf4"}
    train(TrainConfig(**common, impl="fused", device=DEVICE.type, dtype="float32", output=str(tmp_path / "run"), no_report=True))
    assert {name.rpartition(".")[2] for name in launched} >= {"nf4_lora", "pool_norm", "infonce"}


@pytest.mark.slow
def test_a_nan_in_the_weights_is_caught_by_the_training_loop(make_model, words, tmp_path):
    from safetensors.torch import save_file

    model = make_model("llama", hidden_size=64, intermediate_size=128)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    common = {"model": str(broken), "pairs": str(words), "layer": 1, "rank": 4, "batch": 6, "epochs": 1, "held_out": 0.2, "no_report": True}
    with pytest.raises(TliError, match="^step 1: the loss must be finite, got nan; "):
        train(TrainConfig(**common, impl="fused", device=DEVICE.type, dtype="float32", output=str(tmp_path / "run")))


def test_the_models_of_the_command_line_are_those_of_the_kernels():
    from tli_kernels import shapes

    assert tuple(shapes.MODELS) == MODELS


def times(**by_way: float) -> dict[str, float]:
    return dict(zip(tune.WAYS, by_way.values()))


def test_crossovers_leave_the_least_to_be_desired():
    decode_then_fused = {16: times(a=1, b=2, c=3), 64: times(a=2, b=2.5, c=3), 256: times(a=9, b=3, c=4), 1024: times(a=30, b=5, c=5.1)}
    assert tune.crossovers(decode_then_fused) == (64, ops.ALWAYS)
    then_cublas = {**decode_then_fused, 1024: times(a=30, b=6, c=5)}
    assert tune.crossovers(then_cublas) == (64, 256)
    never_fused = {16: times(a=3, b=2, c=1), 64: times(a=3, b=2, c=1)}
    assert tune.crossovers(never_fused) == (0, 0)
    # a rung that is a little slower amid faster ones is no reason to leave the way
    noisy = {16: times(a=1, b=2, c=3), 32: times(a=1.01, b=1, c=3), 64: times(a=1, b=2, c=3)}
    assert tune.crossovers(noisy) == (64, ops.ALWAYS)


@pytest.mark.slow
def test_every_way_is_measured_and_the_dispatch_left_as_it_was():
    seconds = tune.measure([(64, 64)], (1, 17), torch.float32, 2, DEVICE, repeats=1)
    assert list(seconds) == [1, 17]
    assert all(set(row) == set(tune.WAYS) and min(row.values()) > 0 for row in seconds.values())
    assert launch.dispatch(launch.capability(DEVICE)).decode_rows == 64


def test_what_was_tuned_is_used_by_later_runs_on_the_same_card(monkeypatch, tmp_path):
    monkeypatch.setenv("TLI_CACHE", str(tmp_path))
    try:
        ops.save_tuned(DEVICE, 128, 2048)
        assert json.loads((tmp_path / "tune.json").read_text()).popitem()[1] == {"decode_rows": 128, "fused_rows": 2048}
        launch.use(launch.capability(DEVICE), None)
        line = resolved("fused", device=DEVICE).description
        assert line.endswith("NF4 decoded in the product up to 128 rows; cuBLAS above 2048 rows (measured by tli.tune)")
        assert launch.dispatch(launch.capability(DEVICE)) == launch.Dispatch(128, 2048)
        # a file that someone broke is as good as none
        (tmp_path / "tune.json").write_text("{")
        assert "from the table" in resolved("fused", device=DEVICE).description
    finally:
        launch.use(launch.capability(DEVICE), None)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU to tune for")
def test_tuning_without_a_gpu_says_so():
    done = subprocess.run([sys.executable, "-m", "tli.tune"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: --device: the device must be a GPU of this machine, got cuda; run this where the GPU is\n"


def test_reference_and_fused_ops_have_one_signature():
    import inspect

    from tli_kernels import hinge, infonce, nf4_lora, pool_norm

    for module, names in ((nf4_lora, ("lora_linear", "linear")), (pool_norm, ("pool_norm",)), (infonce, ("infonce",)), (hinge, ("hinge",))):
        for name in names:
            mine, theirs = (inspect.signature(getattr(owner, name)) for owner in (module, reference))
            assert list(mine.parameters) == list(theirs.parameters), name
            assert [p.default for p in mine.parameters.values()] == [p.default for p in theirs.parameters.values()], name
