"""Shared fixtures: the starter, small random-weight models of each family, a tokenizer; and Triton's interpreter without a GPU."""

import os
import pathlib
import signal
from collections.abc import Callable

import pytest

# the tests of several files run side by side, a thread each: threads of one process that wait for a core of another's spin
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}

import hypothesis
import torch

# before any kernel is defined: Triton asks when it meets @triton.jit
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.support import interpreter, small_models
from tli.data import word_pairs

# under nohup the tests' own processes would not hear it
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# a busy machine is no failure
hypothesis.settings.register_profile("tli", deadline=None)
hypothesis.settings.load_profile("tli")

interpreter.mend_bfloat16()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use the starter as ``network``; skip ``gpu`` tests without a GPU."""
    for item in items:
        if "starter" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.network)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def starter() -> pathlib.Path:
    """The starter model's folder, in the user's cache: fetched once per machine, not once per run."""
    from tli.model.starter import starter_folder

    return starter_folder()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer trained on the shipped list, with a BOS; 400 tokens."""
    return small_models.tokenizer()


@pytest.fixture(scope="session")
def word_list(tmp_path_factory) -> pathlib.Path:
    """The first 60 shipped pairs."""
    path = tmp_path_factory.mktemp("words") / "sixty.tsv"
    path.write_text("\n".join(word_pairs.SHIPPED.read_text(encoding="utf-8").splitlines()[:61]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, tokenizer) -> Callable[..., pathlib.Path]:
    """Save a small random-weight causal LM of a family, as ``make_model("llama", shards=True, tied=False)``."""
    made: dict[tuple, pathlib.Path] = {}

    def make(family: str, *, blocks: int = 4, tied: bool = True, shards: bool = False, seed: int = 0, **overrides) -> pathlib.Path:
        key = (family, blocks, tied, shards, seed, *sorted(overrides.items()))
        if key not in made:
            settings = {"blocks": blocks, "tied": tied, "shards": shards, "seed": seed}
            made[key] = small_models.save(tmp_path_factory.mktemp(family), family, tokenizer, **settings, **overrides)
        return made[key]

    return make
