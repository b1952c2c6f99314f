"""The compile check (kernels/compile_check.py): every kernel passes it on every GPU generation, and it can fail.

All of it runs in processes of their own: under TRITON_INTERPRET, which is set here without a GPU, Triton compiles nothing.
"""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from tli_kernels import launch

ROOT = pathlib.Path(__file__).parent.parent.parent

# nothing cached, and a machine with other work to do
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BROKEN = """
import triton
import triton.language as tl


@triton.jit
def spilling_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # all of x in the registers of a few threads at once
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.debug_barrier()
    tl.store(y_ptr + tl.arange(0, N), x * tl.sum(x, axis=0))


@triton.jit
def square(x_ptr, K, N: tl.constexpr):
    return tl.load(x_ptr + tl.arange(0, N)[:, None] * K + tl.arange(0, N)[None, :])


@triton.jit
def product_kernel(x_ptr, y_ptr, K, N: tl.constexpr):
    y = tl.zeros((N, N), tl.float32)
    for k in range(0, K, N):
        x = square(x_ptr + k, K, N)
        y = tl.dot(x, tl.trans(x), y, input_precision="ieee")
    tl.store(y_ptr + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :], y)


@triton.jit
def integer_kernel(x_ptr, K):
    tl.store(x_ptr, K.to(tl.int64))
"""

JUDGE = """
import json, sys
import tli, tli_kernels, torch
from tli_kernels import compile_check, launch

ours = compile_check.kernels()
# as if that file lay among the kernels
tli_kernels.__path__.append(sys.argv[1])
from tli_kernels import broken

def job(kernel, dtype, capability, *integers, exact=False, **options):
    tensors = [torch.empty(4096, 4096, dtype=dtype, device="meta") for name in kernel.arg_names if name.endswith("_ptr")]
    with launch.recording(capability) as launches:
        launch.run(kernel, (1,), *tensors, *integers, **options)
    return compile_check.specialise(*launches, capability, exact)

def judge(kernel, *arguments, **options):
    one = job(kernel, *arguments, **options)
    (result,) = compile_check.compiled([one])
    (row,) = (row for row in compile_check.table([(one, result)]) if f"broken.{kernel.__name__} " in row)
    return {**vars(result), "faults": compile_check.faults(one, result), "row": row}

half, single = torch.bfloat16, torch.float32
several = [job(broken.product_kernel, dtype, 80, 4096, N=n) for dtype, n in ((half, 64), (single, 32), (half, 32), (half, 128))]
pipelined = dict(N=128, num_warps=8, num_stages=5)
print(json.dumps({
    "spilling": judge(broken.spilling_kernel, single, 90, N=16384, num_warps=1),
    "holding": judge(broken.spilling_kernel, single, 90, N=16384, num_warps=16),
    "five stages on 86": judge(broken.product_kernel, half, 86, 4096, **pipelined),
    "five stages on 90": judge(broken.product_kernel, half, 90, 4096, **pipelined),
    "fp32": judge(broken.product_kernel, single, 80, 4096, N=32),
    "exact fp32": judge(broken.product_kernel, single, 80, 4096, N=32, exact=True),
    "fp16 on 75": judge(broken.product_kernel, torch.float16, 75, 4096, N=32),
    "integer 1": judge(broken.integer_kernel, torch.int64, 80, 1),
    "integer 7": judge(broken.integer_kernel, torch.int64, 80, 7),
    "products": {cc: judge(broken.product_kernel, half, cc, 4096, N=64) for cc in launch.CAPABILITIES if cc >= 80},
    "together": [vars(result) for result in compile_check.compiled(several)],
    "alone": [vars(*compile_check.compiled([one])) for one in several],
    "new kernels": sorted(compile_check.kernels() - ours),
}))
"""


def compile_apart(*command: str) -> subprocess.CompletedProcess:
    """Run Python in the repository without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)


def run_gate(file: pathlib.Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    # as python -m tli_kernels.compile_check, but also where tli is not installed
    ran = compile_apart(
        "-c", "import sys, tli; from tli_kernels import compile_check; sys.exit(compile_check.main())", "--json", str(file), *arguments
    )
    assert file.is_file(), ran.stderr
    return ran, json.loads(file.read_text())


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    return run_gate(tmp_path_factory.mktemp("gate") / "all.json")


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> dict:
    """What the compile check says of the kernels above."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.py").write_text(BROKEN)
    ran = compile_apart("-c", JUDGE, str(folder))
    assert ran.returncode == 0, ran.stderr
    # Triton prints about what does not compile
    return json.loads(ran.stdout.splitlines()[-1])


def kernels_in_source() -> set[str]:
    """Every function under kernels/ whose first comment is that of a kernel."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and "    # Each program computes" in ast.get_source_segment(text, node):
                found.add(f"{path.stem}.{node.name}")
    return found


def test_every_kernel_passes(gate):
    ran, report = gate
    assert not report["faults"], "\n".join(report["faults"])
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_kernel_is_in_the_table_for_every_generation(gate):
    ran, report = gate
    rows = [row.split() for row in ran.stdout.splitlines() if len(row.split()) > 2]
    shown = {(row[0], row[1]) for row in rows}
    assert len(kernels_in_source()) > 5
    assert shown >= {(kernel, str(capability)) for kernel in kernels_in_source() for capability in launch.CAPABILITIES}
    # Turing leaves some products to cuBLAS; everywhere else every kernel is launched
    built = {(build["kernel"], build["capability"]) for build in report["builds"]}
    assert built >= {(kernel, capability) for kernel in kernels_in_source() for capability in launch.CAPABILITIES if capability >= 80}


def test_a_second_run_takes_the_same_from_the_cache(gate, tmp_path):
    _, again = run_gate(tmp_path / "one.json", "--capability", "75")
    assert again["builds"] == [build for build in gate[1]["builds"] if build["capability"] == 75]


def test_a_spill_is_a_fault(judged):
    assert judged["spilling"]["faults"] == [f"spills {judged['spilling']['spilled']} bytes"]
    # 512 numbers a thread, of which 255 have a register at most
    assert judged["spilling"]["spilled"] >= 4 * (512 - 255)
    assert judged["holding"]["faults"] == []


def test_too_much_shared_memory_is_a_fault(judged):
    # the same kernel fits a larger chip
    assert judged["five stages on 86"]["faults"] == [
        f"needs {judged['five stages on 86']['shared']} bytes of shared memory, the chip gives {99 * 1024}"
    ]
    assert judged["five stages on 90"]["shared"] > 99 * 1024
    assert judged["five stages on 90"]["faults"] == []


def test_a_product_without_tensor_cores_is_a_fault(judged):
    assert judged["fp32"]["faults"] == ["multiplies without tensor-core instructions"]
    assert judged["fp32"]["row"].endswith("FMA")


@pytest.mark.parametrize("case", ["exact fp32", "fp16 on 75"])
def test_what_no_tensor_core_does_is_shown(judged, case):
    assert judged[case]["faults"] == []
    assert judged[case]["row"].endswith("FMA")


def test_each_generation_shows_its_form_of_tensor_core_instructions(judged):
    forms = {capability: set(result["tensor"]) for capability, result in judged["products"].items()}
    assert forms == {"80": {"HMMA"}, "86": {"HMMA"}, "89": {"HMMA"}, "90": {"HGMMA"}, "100": {"UTCHMMA"}, "120": {"HMMA"}}
    assert judged["products"]["90"]["row"].endswith("(Hopper form)")
    assert not any(result["faults"] for result in judged["products"].values())


def test_machine_code_that_is_read_together_is_told_apart(judged):
    assert judged["together"] == judged["alone"]
    counts = [result["tensor"].get("HMMA", 0) for result in judged["together"]]
    assert counts[1] == 0 < counts[2] < counts[0] < counts[3]


def test_what_does_not_compile_is_a_fault(judged):
    # Triton makes an integer that is 1 a constant, and a constant has no method to()
    assert judged["integer 1"]["faults"][0].startswith("does not compile")
    assert judged["integer 1"]["row"].endswith("(does not compile)")
    assert judged["integer 7"]["faults"] == []


def test_a_kernel_that_no_op_launches_is_found(judged):
    # square is called by a kernel, and none itself
    assert judged["new kernels"] == ["broken.integer_kernel", "broken.product_kernel", "broken.spilling_kernel"]


def test_the_interpreter_is_refused():
    command = [sys.executable, "-c", "import tli; from tli_kernels import compile_check; compile_check.main()"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT)
    assert (ran.returncode, len(ran.stderr.splitlines()[-1:])) == (2, 1)
    assert "TRITON_INTERPRET must not be set" in ran.stderr
