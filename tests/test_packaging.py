"""The borders between the rooms of the house, and what a wheel of it holds."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import tli

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("tli", "kernels", "bench", "tests")


def modules(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path: pathlib.Path) -> set[str]:
    """Every dotted name that a file imports, at any depth: ``from a import b`` counts as ``a`` and ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            origin = ".".join(part for part in (package, node.module) if part)
            names.update({origin}, {f"{origin}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__", "pytest.importorskip"):
            names.update(argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))
    return names


def importers(package: str, *folders: str) -> list[str]:
    """The files that import ``package`` or something below it."""
    return [
        path.relative_to(ROOT).as_posix()
        for path in modules(*folders)
        if any(name == package or name.startswith(f"{package}.") for name in imported(path))
    ]


def commands() -> list[str]:
    """The modules that ``python -m tli.<name>`` runs: those with a main guard."""
    return [path.stem for path in modules("tli") if "\nif __name__ == " in path.read_text(encoding="utf-8")]


def python(code: str, cwd: pathlib.Path = ROOT) -> str:
    """What a fresh interpreter prints; its start-up folder is ``cwd``, as for a user who stands there."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_imports_kernels_by_its_folder_name():
    assert importers("kernels", *ROOMS) == []


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_know_nothing_of_tli():
    assert importers("tli", "kernels") == []


def test_only_ops_imports_the_kernels_and_files_their_cache_folder():
    assert importers("tli_kernels", "tli") == ["tli/runtime/files.py", "tli/runtime/ops.py"]
    theirs = {name for name in imported(ROOT / "tli" / "runtime" / "files.py") if name.startswith("tli_kernels")}
    assert theirs == {"tli_kernels.cache_folder", "tli_kernels.cache_folder.cache_folder"}


def test_the_library_imports_no_bench_and_no_peft():
    assert importers("bench", "tli", "kernels") == []
    assert importers("peft", "tli", "kernels") == []


def test_one_function_opens_the_console():
    # any other would take [v2] in a path for markup
    opened = [path.relative_to(ROOT).as_posix() for path in modules("tli") if re.search(r"Console\(", path.read_text(encoding="utf-8"))]
    assert opened == ["tli/runtime/console.py"]


def test_commands_do_not_import_one_another():
    # rooms of the library that can also be run
    names = [name for name in commands() if name not in ("lexicon", "starter")]
    assert names
    imports = {name: imported(ROOT / "tli" / f"{name}.py") for name in names}
    assert [(name, other) for name in names for other in names if other != name and f"tli.{other}" in imports[name]] == []


@pytest.mark.slow
def test_tli_train_is_the_function_whatever_was_imported():
    code = "import tli, tli.commands.train; from tli import train; print(train is tli.train is tli.commands.train.train, callable(train))"
    assert python(code) == "True True"


@pytest.mark.slow
def test_the_specification_needs_no_triton():
    assert importers("triton", "kernels").count("kernels/reference.py") == 0
    absent = "import sys; sys.modules['triton'] = None; import tli_kernels.reference as r; print(r.__file__)"
    assert pathlib.Path(python(f"import tli; {absent}")) == ROOT / "kernels" / "reference.py"


@pytest.mark.parametrize("name", commands())
def test_help_does_not_wait_for_torch(name):
    heavy = ("torch", "transformers", "scipy", "matplotlib", "bitsandbytes", "triton")
    code = f"""
import runpy, sys
sys.argv = ["{name}", "--help"]
try:
    runpy.run_module("tli.{name}", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *[m for m in {heavy} if m in sys.modules])
"""
    shown, loaded = python(code).rsplit("loaded:", 1)
    assert "--help" in shown
    assert loaded.split() == []


@pytest.mark.slow
def test_transformers_sees_the_same_kernels_package_inside_and_outside_the_repository(tmp_path):
    probe = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    outside = python(probe, cwd=tmp_path)
    assert python(probe) == outside
    assert python(f"import tli; {probe}") == outside


@pytest.mark.slow
def test_an_uninstalled_clone_uses_its_own_kernels(tmp_path):
    # the tli that is installed here must not lend its kernels to another clone
    for room in ("tli", "kernels"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    where = python("import tli, tli_kernels.reference as r; print(tli.__file__, r.__file__, sep='|')", cwd=tmp_path)
    assert where == f"{tmp_path}/tli/__init__.py|{tmp_path}/kernels/reference.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the tree without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, folder / "tree", ignore=junk)
    # README.md is what the wheel's metadata reads; a tree without one builds, too
    (folder / "tree" / "README.md").touch()
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    done = subprocess.run(
        [sys.executable, *command, folder, folder / "tree"], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as built:
        yield built


def test_the_wheel_holds_two_packages_and_nothing_else(wheel):
    assert {name.split("/")[0] for name in wheel.namelist()} == {"tli", "tli_kernels", f"tli-{tli.__version__}.dist-info"}


def test_the_wheel_holds_every_module_and_the_data(wheel):
    expected = {path.relative_to(ROOT).as_posix() for path in modules("tli")}
    expected |= {f"tli_kernels/{path.relative_to(ROOT / 'kernels').as_posix()}" for path in modules("kernels")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tli" / "data").iterdir() if path.is_file()}
    # without it a type checker takes the annotations of an installed tli for none
    expected.add("tli/py.typed")
    assert any(name.endswith(".tsv") for name in expected)
    assert expected == {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_imports_away_from_the_tree(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    # -I and the explicit path: neither the working directory nor an editable install may help out
    code = "import sys; sys.path.insert(0, sys.argv[1]); import tli, tli_kernels.reference as r; print(tli.__file__, r.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code, tmp_path / "site"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{tmp_path}/site/tli/__init__.py", f"{tmp_path}/site/tli_kernels/reference.py"]


def fenced(file: str, heading: str) -> str:
    block = re.search(rf"^## {heading}\n+```[^\n]*\n(.*?)^```", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block, f"{file} has no fenced block right after '## {heading}'"
    return block[1]


def test_the_readme_tree_has_a_line_for_each_room():
    named = {line.split()[0] for line in fenced("README.md", "The tree").splitlines() if line.split()[0].endswith("/")}
    assert named - {"tests/", "docs/"} == {"tli/", "kernels/", "bench/"} | {
        f"{path.parent.name}/" for path in (ROOT / "tli").glob("*/__init__.py")
    }
    top = {word for word in fenced("README.md", "The tree").split() if word.endswith(".py")}
    assert top == {path.name for path in (ROOT / "tli").glob("*.py")}


def test_every_file_is_in_contributing():
    named, folder = set(), ""
    for line in fenced("CONTRIBUTING.md", "Every file").splitlines():
        indented, words = line.startswith(" "), line.split()
        if not indented and words:
            folder = words[0] if words[0].endswith("/") else ""
        # a line may name several files before its description: `train.py  scan.py  ...`
        named.update(f"{folder if indented else ''}{word}" for word in words if re.fullmatch(r"[\w/]+\.py", word))
    on_disk = {path.relative_to(ROOT).as_posix() for path in modules("tli", "kernels", "bench")} | {path.name for path in ROOT.glob("*.py")}
    # a room says what it is on the line that names its folder
    on_disk -= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tli").glob("*/**/__init__.py")}
    # naming a test file is allowed, not asked for; one that is named exists
    tests = {path.relative_to(ROOT).as_posix() for path in modules("tests")}
    assert on_disk - named == set(), "on disk, not in CONTRIBUTING.md"
    assert named - on_disk - tests == set(), "in CONTRIBUTING.md, not on disk"


def test_no_call_of_transformers_may_run_code_beside_the_weights():
    """Left open, ``trust_remote_code`` makes transformers ask on standard input, where any yes runs it."""
    loaders, found = {"from_pretrained", "from_config"}, []
    for file in modules("tli"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in loaders:
                of = ast.unparse(call.func.value)
                if "Auto" in of or "transformers" in of:
                    found.append(of)
                    told = {word.arg: ast.unparse(word.value) for word in call.keywords}
                    assert told.get("trust_remote_code") == "False", f"{file.name}:{call.lineno}: {ast.unparse(call)}"
    assert {"transformers.AutoConfig", "AutoTokenizer", "AutoModel"} <= set(found)
