"""The public API as its users meet it: every name has a documented, runnable example, and a type checker sees real signatures."""

import doctest
import os
import pathlib
import re
import subprocess
import sys

import pytest

import tli

ROOT = pathlib.Path(__file__).resolve().parent.parent
# these run the starter model
ON_THE_STARTER = ("train", "scan", "evaluate", "export", "embed", "fit_map", "load_adapter")
# a command's options are documented field by field in its --help, and have their examples in the module's docstring
OPTIONS = ("TrainConfig", "ScanConfig", "EvaluateConfig", "ExportConfig", "MapConfig")
DOCUMENTED = [name for name in tli.__all__ if name not in (*OPTIONS, "__version__")]


def run_examples(name: str, found: object) -> None:
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(found, name, globs={}) if test.examples]
    assert tests, f"{name} has no example"
    failures, output = 0, []
    for test in tests:
        result = doctest.DocTestRunner().run(test, out=output.append)
        failures += result.failed
    assert not failures, "".join(output)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.network] * (name in ON_THE_STARTER)) for name in DOCUMENTED]
)
def test_the_example_in_a_docstring_runs_as_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(name, getattr(tli, name))


def test_the_examples_of_the_options_run_as_written():
    run_examples("tli", tli)
    assert all(name in tli.__doc__ for name in OPTIONS)


@pytest.mark.parametrize("name", [name for name in tli.__all__ if name != "__version__"])
def test_a_name_is_listed_and_documented(name):
    assert name in dir(tli)
    assert getattr(tli, name).__doc__.strip()


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tli' has no attribute 'nothing'"):
        tli.nothing  # noqa: B018


def type_errors(folder: pathlib.Path, sources: dict[str, str]) -> list[str]:
    """mypy's errors in programs of these names, as a user's own files: the repository is on the path only, as an installed tli is."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    files = [str(folder / f"{name}.py") for name in sources]
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary", *files]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, timeout=850)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line.replace(f"{folder}/", "") for line in done.stdout.splitlines()]


# without its cache mypy reads all of torch and transformers
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_python_of_readme_and_docs_has_no_type_error(tmp_path):
    programs = {
        f"{path.stem.lower().replace('-', '_')}_{number}": source
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        for number, source in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    }
    assert any(name.startswith("readme") for name in programs)
    assert type_errors(tmp_path, programs) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_type_checker_sees_real_signatures(tmp_path):
    wrong = """import tli

tli.train(tli.ScanConfig())
tli.TrainConfig(rank="sixteen")
tli.nothing
tli.embed(3)
found: int = tli.scan(tli.ScanConfig())
"""
    errors = type_errors(tmp_path, {"wrong": wrong})
    kinds = [re.fullmatch(r"wrong\.py:(\d+): error: .*\[([\w-]+)\]", line) for line in errors]
    expected = [("3", "arg-type"), ("4", "arg-type"), ("5", "attr-defined"), ("6", "arg-type"), ("7", "assignment")]
    assert [kind and kind.groups() for kind in kinds] == expected, "\n".join(errors)
