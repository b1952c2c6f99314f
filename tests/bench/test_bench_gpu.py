"""``bench.gpu`` as far as a machine without a GPU can tell: it runs, it finds what is wrong, and a rehearsal measures nothing."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from bench import record
from bench.gpu import __main__ as gpu
from bench.gpu import cases as gpu_cases
from bench.gpu import goals as gpu_goals
from bench.gpu import operands as gpu_operands
from bench.gpu import parity as gpu_parity
from bench.gpu import timing as gpu_timing
from bench.gpu.cases import Dequantise, KernelVariant, Loss, Product
from bench.gpu.operands import BenchDevice
from bench.gpu.timing import AGAIN, Clock, Row, Skipped, Stopwatch
from tests.support.fidelity import DEVICE
from tli.commands import tune
from tli.runtime import ops
from tli.runtime.errors import TliError

pytestmark = pytest.mark.slow

BENCH_DEVICE = BenchDevice(DEVICE, torch.float32, cold_bytes=20_000, rehearsal=True)
SIZES = gpu_parity.Sizes(elements=1 << 10, eager=4, block=3)
CEILING = {"copy_bytes_per_s": 1000.0, "product_flops_per_s": 100.0}
QUIET = Console(quiet=True)


def command(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *flags], cwd=record.ROOT, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    """What ``python -m bench.gpu --rehearse`` prints, and its record."""
    folder = tmp_path_factory.mktemp("rehearsal")
    # the command sees to the interpreter itself
    done = command("--rehearse", f"--output={folder}", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = folder.iterdir()
    assert "gpu-rehearsal" in path.name
    return done, json.loads(path.read_text())


def test_a_rehearsal_makes_every_kind_of_check(rehearsal):
    parity = rehearsal[1]["parity"]
    assert parity["finished"]
    assert parity["failures"] == []
    results = {row["result"] for row in parity["closest"]}
    assert results >= {f"nf4_lora: {name}" for name in ("y", "dx", "dA", "dB")} | {"linear: dx", "pool_norm: dstates"}
    assert results >= {f"{op}: {name}" for op in ("infonce", "hinge") for name in ("loss", "dsource", "dtarget")}
    assert "infonce: dtemperature" in results
    assert all(0 <= row["of_allowed"] <= 1 for row in parity["closest"])


def test_a_rehearsal_runs_every_subject_of_every_kind_of_case(rehearsal):
    content = rehearsal[1]
    assert content["left_out"] == []
    assert [case["op"] for case in content["cases"]] == [case.op for case in gpu_cases.rehearsed()]
    for case in content["cases"]:
        ran = {each["subject"] for each in case["subjects"] if each.get("ran")}
        failed = {each["subject"]: each["failed"] for each in case["subjects"] if "failed" in each}
        assert ran | failed.keys() <= content["legend"].keys()
        assert {case["ours"], AGAIN} <= ran
        assert failed.keys() == ({"compiled"} if case.get("compiled") else set())
    products = [case for case in content["cases"] if case["op"] == "nf4_lora"]
    for case in products:
        assert {each["subject"] for each in case["subjects"]} >= {*gpu_cases.WAYS, *gpu_cases.PEFT, "eager, dequantised", "eager, resident"}


def numbers(content, path: str = "") -> dict[str, float]:
    """Every number below, by its path."""
    if isinstance(content, dict):
        return {key: value for name, below in content.items() for key, value in numbers(below, f"{path}/{name}").items()}
    if isinstance(content, list):
        return {key: value for i, below in enumerate(content) for key, value in numbers(below, f"{path}/{i}").items()}
    return {path: content} if isinstance(content, int | float) and not isinstance(content, bool) else {}


def test_no_number_of_a_rehearsal_can_pass_for_a_measurement(rehearsal):
    done, content = rehearsal
    assert "nothing here is a measurement" in content["rehearsal"]
    assert content["kind"] == "gpu-rehearsal"
    assert content["ceilings"] is content["ceilings_after"] is None
    assert content["dispatch"] == {"limits": {}, "rows": []}
    assert all(case["rehearsal"] is True and case["name"] in ("toy", case["op"]) for case in content["cases"])
    # what was asked for alone
    assert {path.split("/")[-1] for path in numbers(content["cases"])} <= {"n", "k", "rows", "rank", "pairs", "width", "dropout"}
    assert all(row["got"] is row["met"] is row["noise"] is None for row in content["goals"])
    assert "nothing is measured" in done.stdout
    assert " ms" not in done.stdout
    assert "%" not in done.stdout


def test_a_rehearsal_is_never_kept_among_the_results(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for folder in (record.RESULTS, record.RESULTS / "below", record.ROOT / "tests" / ".." / "bench" / "results"):
        with pytest.raises(TliError, match="a rehearsal must not lie among the results"):
            gpu.where(gpu.GpuConfig(rehearse=True, output=str(folder)))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_command_ends_with_one_line():
    done = command()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: bench.gpu: there must be a GPU to measure, got none that torch sees; run it where one is, or --rehearse it here\n"
    )


def test_the_interpreter_must_be_off_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TliError, match="^TRITON_INTERPRET: the interpreter must be off on a GPU, got '1'; unset it$"):
        gpu.where(gpu.GpuConfig(output=str(tmp_path)))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert gpu.where(gpu.GpuConfig(output=str(tmp_path / "new"))) == (torch.device("cuda"), tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(TliError, match="^--output: the output must be writable"):
        gpu.where(gpu.GpuConfig(output=str(tmp_path / "file")))


def test_the_fidelity_rule():
    truth = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    eager = truth.float() + torch.tensor([0.0, 0.01, 0.0])
    nothing = torch.finfo(torch.float32).eps * 4.0
    cases = {
        "as far": (truth.float() + 0.0199, True),
        "too far": (truth.float() + 0.0201 + nothing, False),
        "nan": (torch.tensor([1.0, -2.0, torch.nan]), False),
        "another dtype": (truth, False),
        "another shape": (truth[:2].float(), False),
    }
    checks = gpu_parity.Checks()
    for name, (fused, _) in cases.items():
        checks.faithful(name, fused, eager, truth, 1)
    checks.faithful("eager is nan", truth.float(), eager * torch.nan, truth, 1)
    assert [row["passed"] for row in checks.rows] == [*(passed for _, passed in cases.values()), False]


def test_bits_are_compared_as_bits_and_what_raises_is_a_failure():
    checks = gpu_parity.Checks()
    checks.equal("same", (torch.ones(3),), (torch.ones(3),))
    checks.equal("not same", (torch.ones(3),), (torch.tensor([1.0, 1.0, 1.0 + 1e-7]),))
    with checks.about("broken"):
        raise ValueError("no such kernel\nin detail")
    assert [row["passed"] for row in checks.rows] == [True, False, False]
    assert [row["detail"] for row in checks.failures] == ["1 elements differ", "ValueError: no such kernel"]
    with pytest.raises(TimeoutError), checks.about("too late"):
        raise TimeoutError


def off(name: str, factor: float):
    """An op that is a little wrong."""
    right = getattr(ops.fused(), name)
    return lambda *operands, **options: factor * right(*operands, **options)


CHECKS = {
    "lora_linear": lambda checks: gpu_parity.check_product(checks, BENCH_DEVICE, Product("t", 65, 64, rows=3, rank=2), torch.float32),
    "linear": lambda checks: gpu_parity.check_linear(checks, BENCH_DEVICE, Product("t", 65, 64, rows=3, rank=2), torch.float32),
    "pool_norm": lambda checks: gpu_parity.check_pool_norm(checks, BENCH_DEVICE, 2, 16),
    "infonce": lambda checks: gpu_parity.check_infonce(checks, BENCH_DEVICE, 3, 16, SIZES),
    "hinge": lambda checks: gpu_parity.check_hinge(checks, BENCH_DEVICE),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_kernel_that_is_a_little_wrong_fails_its_check(name, monkeypatch):
    wrong = dataclasses.replace(ops.fused(), **{name: off(name, 1.001)})
    monkeypatch.setattr(ops, "fused", lambda: wrong)
    checks = gpu_parity.Checks()
    CHECKS[name](checks)
    assert checks.failures


def test_a_dequantise_that_is_off_by_a_bit_fails_its_check(monkeypatch):
    right = gpu_parity.nf4.dequantise

    def wrong(weight, dtype, out=None):
        w = right(weight, dtype, out=out)
        w[-1, -1] = torch.nextafter(w[-1, -1], w.new_tensor(float("inf")))
        return w

    monkeypatch.setattr(gpu_parity.nf4, "dequantise", wrong)
    checks = gpu_parity.Checks()
    gpu_parity.check_dequantise(checks, BENCH_DEVICE, (8, 64), nested=False)
    assert len(checks.failures) == len(checks.rows)


@pytest.mark.parametrize("keep_going", [False, True])
def test_where_a_kernel_is_wrong_nothing_is_timed_unless_asked_for(keep_going, monkeypatch, capsys):
    monkeypatch.setattr(gpu_parity, "check", lambda checks, *_: checks.holds("the kernel", False, "off"))
    found = gpu.run([Dequantise("toy", 64, 64, False)], BENCH_DEVICE, SIZES, Stopwatch(60), QUIET, keep_going)
    assert len(found["cases"]) == (1 if keep_going else 0)
    assert [one.get("skipped") for one in found["left_out"]] == ([] if keep_going else ["a kernel is wrong, so nothing is timed"])
    with pytest.raises(SystemExit) as end:
        gpu._leave(found["parity"])
    assert end.value.code == 1
    assert capsys.readouterr().err == "wrong: check the kernel, detail off\nerror: 1 of 1 checks failed\n"


def test_every_timed_case_is_a_checked_case(monkeypatch):
    seen = set()
    monkeypatch.setattr(gpu_parity, "check_dequantise", lambda _, bench_device, size, nested: seen.add((*size, nested)))
    monkeypatch.setattr(gpu_parity, "check_product", lambda _, bench_device, case, dtype, bias=False: seen.add((case, dtype)))
    monkeypatch.setattr(gpu_parity, "check_pool_norm", lambda _, bench_device, *size: seen.add(("pool_norm", *size)))
    monkeypatch.setattr(gpu_parity, "check_infonce", lambda _, bench_device, *size, sizes: seen.add(("infonce", *size)))
    monkeypatch.setattr(gpu_parity, "free", lambda: None)
    for name in ("linear", "hinge", "nan", "same_bits", "large_products", "large_dequantise"):
        monkeypatch.setattr(gpu_parity, f"check_{name}", lambda *_, name=name: seen.add(name))
    cases = gpu_cases.chosen(every_shape=True)
    gpu_parity.check(gpu_parity.Checks(), dataclasses.replace(BENCH_DEVICE, rehearsal=False), cases, SIZES)
    for case in cases:
        match case:
            case Dequantise():
                assert (case.n, case.k, case.nested) in seen
            case Product():
                assert (dataclasses.replace(case, backward=True), torch.float32) in seen
            case Loss():
                assert {(name, case.pairs, case.width) for name in case.op.split(" + ")} <= seen
    assert {"linear", "hinge", "nan", "same_bits", "large_products", "large_dequantise"} <= seen


@pytest.mark.parametrize("block", [2, 3, 100])
def test_infonce_in_blocks_is_infonce(block):
    bench_device = BenchDevice(torch.device("cpu"), torch.float32, 0)
    leaves = [side.detach().double().requires_grad_() for side in gpu_operands.units(bench_device, 11, 5)]
    leaves.append(torch.tensor(0.1, dtype=torch.float64, requires_grad=True))
    false_negatives = gpu_operands.edges(11, "cpu")
    assert len(false_negatives) == 4

    u, v, temperature = leaves
    allowed = torch.tensor([[[i, j] not in false_negatives.tolist() for j in range(11)] for i in range(11)])
    s = [[u[i] @ v[j] / temperature for j in range(11)] for i in range(11)]
    terms = [torch.stack([s[i][j] for j in range(11) if allowed[i, j]]).logsumexp(0) - s[i][i] for i in range(11)]
    terms += [torch.stack([s[i][j] for i in range(11) if allowed[i, j]]).logsumexp(0) - s[j][j] for j in range(11)]
    loss = torch.stack(terms).mean()

    got = gpu_parity.streamed(*(leaf.detach() for leaf in leaves), false_negatives, block)
    for one, other in zip(got, (loss, *torch.autograd.grad(loss, leaves)), strict=True):
        torch.testing.assert_close(one, other)


def test_random_words_share_nodes_and_are_well_formed():
    indptr, indices, nodes = gpu_operands.paths(400, "cpu")
    words = [indices[begin:end].tolist() for begin, end in zip(indptr[:-1], indptr[1:])]
    assert {len(word) for word in words} == {1, 2, 3, 4, 5}
    later = [node for word in words for node in word[1:]]
    assert len(later) == len(set(later))
    assert {node for word in words for node in word} <= set(range(nodes))
    assert len({word[0] for word in words}) <= 100
    assert max(later) == nodes - 1
    assert 2 * 400 < nodes < 2.5 * 400


def sleeper(seconds: float) -> KernelVariant:
    return KernelVariant(lambda i: (time.sleep(seconds), torch.ones(2))[1:], bytes=10, flops=2)


class Cpu(Clock):
    def __init__(self):
        super().__init__(torch.device("cpu"))


def test_rounds_are_interleaved_and_ours_runs_twice_in_each():
    turns = []
    variants = {name: KernelVariant(lambda i, name=name: turns.append(name), 1) for name in ("ours", "peer")}
    rows, dropped = gpu_timing.interleave(variants, "ours", Cpu(), dict.fromkeys(variants, 0.0), 1.0, 10.0)
    assert {name: len(own) for name, own in rows.items()} == {"ours": 2, "peer": 2, AGAIN: 2}
    assert dropped == {}
    # after one of each, to see how long they take
    assert [sorted(turns[begin : begin + 3]) for begin in (2, 5)] == [["ours", "ours", "peer"]] * 2


def test_what_takes_too_long_is_left_out_with_its_reason():
    variants = {"ours": sleeper(0.001), "peer": sleeper(0.002), "slow": sleeper(0.1)}
    rows, dropped = gpu_timing.interleave(variants, "ours", Cpu(), dict.fromkeys(variants, 0.0), 0.1, 0.15)
    assert rows.keys() == {"ours", "peer", AGAIN}
    assert dropped.keys() == {"slow"}
    assert dropped["slow"].startswith("skipped: 2 rounds of it would take 0.2 s")
    with pytest.raises(Skipped, match="2 rounds of it would take"):
        gpu_timing.interleave({"ours": sleeper(0.1)}, "ours", Cpu(), {"ours": 0.0}, 0.1, 0.05)


def test_a_summary_has_ratios_by_round_and_the_share_of_the_nearer_ceiling():
    def rows(*seconds: float, host: float = 0.5) -> list[Row]:
        return [Row(each, host, True) for each in seconds]

    rounds = {"ours": rows(1.0, 2.0, 4.0), "peer": rows(3.0, 2.0, 16.0, host=9.0), AGAIN: rows(1.0, 1.0, 4.0)}
    variants = {"ours": KernelVariant(None, bytes=500, flops=20), "peer": KernelVariant(None, bytes=500, flops=100)}
    ours, peer, again = gpu_timing.summary(rounds, variants, "ours", CEILING)
    assert (ours["seconds"], ours["ratio"], ours["bound"], ours["share_of_ceiling"]) == (2.0, 1.0, "copy", 0.25)
    assert (peer["seconds"], peer["ratio"], peer["bound"], peer["share_of_ceiling"]) == (
        3.0,
        3.0,
        "product",
        pytest.approx(1 / 3, abs=1e-4),
    )
    assert (peer["bytes_per_s"], peer["flops_per_s"]) == (166.7, 33.33)
    assert (ours["python_bound"], peer["python_bound"]) == (False, True)
    assert (again["ratio"], again["ratio_quartiles"]) == (1.0, [0.75, 1.0])


class Card:
    """Stands for a GPU's queue: a clock that calls and holds push forward, and events that read it."""

    def __init__(self, monkeypatch, cycles_per_s: float = 1e9):
        self.now, self.held = 0.0, []

        class Event:
            def __init__(event, enable_timing):
                assert enable_timing

            def record(event):
                event.at = self.now

            def synchronize(event):
                pass

            def elapsed_time(event, other):
                return 1e3 * (other.at - event.at)

        def hold(cycles):
            self.held.append(cycles / cycles_per_s)
            self.now += cycles / cycles_per_s

        for name, fake in (("Event", Event), ("_sleep", hold), ("synchronize", lambda: None)):
            monkeypatch.setattr(torch.cuda, name, fake)

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_on_a_gpu_calls_are_timed_behind_a_hold_that_lasts_until_they_are_queued(monkeypatch):
    card, around = Card(monkeypatch), []

    class Around:
        def __enter__(self):
            around.append("in")

        def __exit__(self, *_):
            around.append("out")

    clock = Clock(torch.device("cuda"))
    assert clock.cycles_per_s == pytest.approx(1e9)
    copies = []
    row = clock.row(KernelVariant(lambda i: (copies.append(i), card.work(0.003)), 1, around=Around), first=7, calls=4, host_s=0.01)
    assert row.seconds == pytest.approx(0.003)
    assert card.held[-1] == pytest.approx(0.06005)
    assert row.queue_full
    assert 0 < row.host_seconds < 0.01
    assert copies == [7, 8, 9, 10]
    assert around == ["in", "out"]
    # Python was slower than expected
    assert not clock.row(KernelVariant(lambda i: time.sleep(0.002), 1), first=0, calls=2, host_s=0.0).queue_full
    assert clock.median(lambda: card.work(0.5), 3) == pytest.approx(0.5)


def test_a_row_that_outran_its_hold_makes_the_next_one_longer(monkeypatch):
    card = Card(monkeypatch)
    variant = KernelVariant(lambda i: (time.sleep(0.003), card.work(0.001)), 1)
    rows, _ = gpu_timing.interleave({"ours": variant}, "ours", Clock(torch.device("cuda")), {"ours": 1e-5}, 0.01, 10.0)
    assert not rows["ours"][0].queue_full
    assert rows["ours"][-1].queue_full
    assert all(row.seconds == pytest.approx(0.001) for row in rows["ours"])


@dataclasses.dataclass(frozen=True)
class Toy(gpu_cases.Case):
    """A case whose variants are given."""

    variants: tuple = ()
    op = "toy"
    ours = "ours"

    def facts(self) -> dict:
        return {"op": self.op, "name": self.name}

    def makers(self, bench_device: BenchDevice) -> gpu_cases.Makers:
        return dict(self.variants)


def gives(*results: float):
    return lambda: KernelVariant(lambda i: tuple(torch.tensor(result) for result in results), 1)


def breaks():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")


def test_a_subject_that_fails_or_computes_something_else_is_recorded_and_the_others_are_timed():
    absent = lambda: __import__("a_peer_that_is_not_there")  # noqa: E731
    others = {"ours": gives(1.0, 2.0), "near": gives(1.01, 2.0), "far": gives(1.0, 2.2), "nan": gives(1.0, float("nan"))}
    case = Toy("t", (*others.items(), ("absent", absent), ("large", breaks)))
    row = gpu_timing.measure(case, BENCH_DEVICE, Cpu(), CEILING, 1.0, 10.0)
    failed = {each["subject"]: each["failed"] for each in row["subjects"] if "failed" in each}
    assert failed == {
        "far": "computes something else: a relative difference of 0.1 to ours",
        "nan": "computes something else: a relative difference of nan to ours",
        "absent": "ModuleNotFoundError: No module named 'a_peer_that_is_not_there'",
        "large": "out of memory: CUDA out of memory. Tried to allocate",
    }
    assert [each["subject"] for each in row["subjects"] if "seconds" in each] == ["ours", "near", AGAIN]


def test_a_case_that_fails_is_recorded_and_the_next_one_is_measured():
    found, left_out = [], []
    cases = [Toy("broken", (("ours", breaks),)), Toy("nan", (("ours", gives(float("nan"))),)), Toy("fine", (("ours", gives(1.0)),))]
    gpu.run_cases(cases, BENCH_DEVICE, Cpu(), CEILING, Stopwatch(60), QUIET, found, left_out)
    assert [row["name"] for row in found] == ["fine"]
    assert [one["failed"] for one in left_out] == [
        "RuntimeError: ours: out of memory: CUDA out of memory. Tried to allocate",
        "RuntimeError: ours: the results are not finite",
    ]


def test_what_the_time_does_not_reach_is_listed(monkeypatch, capsys):
    found, left_out = [], []
    cases = gpu_cases.rehearsed()
    gpu.run_cases(cases, BENCH_DEVICE, Cpu(), CEILING, Stopwatch(0), QUIET, found, left_out)
    assert (found, left_out) == ([], [{"case": str(case), "skipped": "no time was left"} for case in cases])

    def too_long(checks, *_):
        checks.holds("one", True)
        gpu._out_of_time()

    monkeypatch.setattr(gpu_parity, "check", too_long)
    run = gpu.run(cases, BENCH_DEVICE, SIZES, Stopwatch(60), QUIET, keep_going=False)
    assert run["left_out"] == [{"case": "all that followed", "skipped": "the time was up"}]
    with pytest.raises(SystemExit):
        gpu._leave(run["parity"])
    assert capsys.readouterr().err == "error: 0 of 1 checks failed, and the time was up before all were made\n"


def test_cases_keep_their_names_apart_and_begin_with_those_of_the_goals():
    cases = gpu_cases.chosen(every_shape=True)
    assert len({str(case) for case in cases}) == len(cases)
    usual = gpu_cases.chosen(every_shape=False)
    assert usual == cases[: len(usual)]
    rows = {(case.rows, case.backward) for case in usual if isinstance(case, Product) and case.name == "llama-3-8b/down_proj"}
    assert rows == set(itertools.product(gpu_cases.ROWS, (False, True)))
    assert {(case.pairs, case.width) for case in usual if case.op == "pool_norm + infonce"} >= {(64, 4096), (1024, 4096), (65536, 768)}


def timed(op: str, rounds: dict[str, list[float]], **facts) -> dict:
    variants = [
        {"subject": name, "seconds": sorted(own)[1], "rounds": own, "ratio_quartiles": [0.98, 1.01]} for name, own in rounds.items()
    ]
    return {
        "op": op,
        "name": "a",
        "dropout": 0.0,
        "nested": False,
        "rank": gpu_cases.RANK,
        "ours": "dispatch",
        "subjects": variants,
        **facts,
    }


def goal(rows: list[dict], beginning: str) -> dict:
    (row,) = [row for row in rows if row["goal"].startswith(beginning)]
    return row


def test_a_goal_is_as_good_as_its_worst_case():
    decode = {"decode": [1.0, 1.0, 1.0], AGAIN: [1.0, 1.0, 1.0]}
    found = [
        # the faster of the two counts, by rounds
        timed("nf4_lora", {**decode, "peft": [3.0, 3.0, 3.0], "peft, autocast": [1.8, 1.9, 2.0]}, rows=16, backward=False),
        timed("nf4_lora", {**decode, "peft": [1.4, 1.4, 1.4]}, rows=64, backward=False, name="b"),
        timed("nf4_lora", {**decode, "peft": [0.1, 0.1, 0.1]}, rows=128, backward=False),
        timed("nf4_lora", {"dispatch": [1.0, 1.0, 2.0], "peft": [1.5, 1.5, 2.0]}, rows=4096, backward=True),
    ]
    rows = gpu_goals.goals(found, [])
    few = goal(rows, "decode-in-loop nf4_lora at M <= 64, forward:")
    assert (few["got"], few["met"], few["of"], few["noise"]) == (1.4, False, 2, [0.98, 1.01])
    assert few["where"].startswith("b, rows 64")
    assert goal(rows, "nf4_lora by dispatch at M = 4,096")["got"] == 1.5
    assert goal(rows, "nf4_lora by dispatch at M = 4,096")["met"]
    assert all(row["met"] is None for row in rows if row["of"] == 0)


def test_the_goals_of_large_batches_say_that_eager_has_not_the_memory():
    fused = {"subject": "fused", "seconds": 1.0, "rounds": [1.0, 1.0], "peak_bytes": 1.5e9}
    eager = {"subject": "eager", "seconds": 3.0, "rounds": [3.0, 3.0]}
    sizes = {"op": "infonce", "name": "infonce", "width": 768}
    found = [
        {**sizes, "pairs": 65536, "subjects": [fused, {"subject": "eager", "failed": "out of memory: 16 GiB"}]},
        {**sizes, "pairs": 16384, "subjects": [fused, {**eager, "rounds": [9.0, 9.0]}]},
        {**sizes, "pairs": 32768, "subjects": [fused, eager]},
    ]
    rows = gpu_goals.goals(found, [])
    assert (goal(rows, "infonce at 65,536 pairs, D = 768: peak")["got"], goal(rows, "infonce at 65,536 pairs, D = 768: peak")["met"]) == (
        1.5,
        False,
    )
    faster = goal(rows, "infonce at 65,536 pairs, D = 768: times faster")
    assert (faster["got"], faster["met"], faster["note"]) == (None, None, "eager: out of memory: 16 GiB")
    fits = goal(rows, "infonce, the same")
    assert (fits["got"], fits["where"]) == (3.0, "infonce, pairs 32768, width 768")


def test_the_dispatch_is_judged_by_the_table_and_by_what_tune_would_choose():
    decode, fused, cublas = tune.WAYS

    def seconds(m: int, backward: bool, *by_way: float, **facts) -> dict:
        return timed("nf4_lora", {way: [each] * 3 for way, each in zip(tune.WAYS, by_way)}, rows=m, backward=backward, **facts)

    found = [
        seconds(16, True, 1.0, 2.0, 3.0),
        seconds(64, True, 3.0, 2.0, 3.0),
        seconds(1024, True, 9.0, 5.0, 4.0),
        seconds(16, False, 2.0, 1.0, 1.0),
        # of another kind, which tune does not look at
        seconds(16, True, 9.0, 1.0, 1.0, dropout=0.05),
    ]
    limits, rows = gpu_goals.dispatches(found, (64, ops.ALWAYS))
    assert limits == {"table": {"decode_rows": 64, "fused_rows": ops.ALWAYS}, "tuned": {"decode_rows": 16, "fused_rows": 64}}
    table = {(row["rows"], row["backward"]): (row["way"], row["ratio"]) for row in rows if row["dispatch"] == "table"}
    assert table == {(16, True): (decode, 1.0), (64, True): (decode, 1.5), (1024, True): (fused, 1.25), (16, False): (decode, 2.0)}
    tuned = {(row["rows"], row["backward"]): (row["way"], row["ratio"]) for row in rows if row["dispatch"] == "tuned"}
    assert tuned == {(16, True): (decode, 1.0), (64, True): (fused, 1.0), (1024, True): (cublas, 1.0), (16, False): (decode, 2.0)}
    worst = goal(gpu_goals.goals([], rows), "the table's dispatch")
    assert (worst["got"], worst["met"]) == (2.0, False)
    assert "decode, not" in worst["where"]


def test_kernels_are_compiled_ahead_for_the_gpu_that_there_is(tmp_path):
    # without the interpreter, in a process of its own
    code = """
import torch
from bench.gpu import __main__ as gpu
from bench.gpu import cases as gpu_cases
from bench.gpu.operands import BenchDevice
from tli_kernels import launch
launch._of_gpu = lambda device: 90
bench_device = BenchDevice(torch.device("cuda"), torch.bfloat16, 0)
cases = [gpu_cases.Dequantise("toy", 64, 64, nested) for nested in (False, True)]
first, second = (gpu.compile_ahead(cases, bench_device, 100) for _ in range(2))
assert first["builds"] == 2 and first["errors"] == second["errors"] == [], (first, second)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=record.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # each once: the second time they were there
    assert len(list(tmp_path.glob("*/*.cubin"))) == 2
