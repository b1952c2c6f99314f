"""tli: align the words of two languages at an early layer of a language model, and measure what is real.

>>> from tli import TrainConfig, train
>>> run = train(TrainConfig(rank=16, layer=2))

Everything is loaded when it is first asked for: ``--help`` must not wait for torch. ``tli.train`` is the function; the module of that
name is there for ``python -m tli.train`` alone, and nothing imports it.
"""

import importlib
import importlib.machinery
import importlib.util
import pathlib
import sys
import typing

if typing.TYPE_CHECKING:
    from tli.commands.embed import embed
    from tli.commands.evaluate import evaluate
    from tli.commands.export import export
    from tli.commands.scan import scan
    from tli.commands.train import train
    from tli.config import EvaluateConfig, ExportConfig, ScanConfig, TrainConfig
    from tli.data.word_pairs import read_pairs
    from tli.model.trained_adapter import load_adapter
    from tli.runtime.errors import TliError

__all__ = [
    "EvaluateConfig",
    "ExportConfig",
    "ScanConfig",
    "TliError",
    "TrainConfig",
    "embed",
    "evaluate",
    "export",
    "load_adapter",
    "read_pairs",
    "scan",
    "train",
]
__version__ = "0.1.0"

_HOMES = {
    "EvaluateConfig": "tli.config",
    "ExportConfig": "tli.config",
    "ScanConfig": "tli.config",
    "TliError": "tli.runtime.errors",
    "TrainConfig": "tli.config",
    "embed": "tli.commands.embed",
    "evaluate": "tli.commands.evaluate",
    "export": "tli.commands.export",
    "load_adapter": "tli.model.trained_adapter",
    "read_pairs": "tli.data.word_pairs",
    "scan": "tli.commands.scan",
    "train": "tli.commands.train",
}


def __getattr__(name: str):
    """PEP 562: what ``__all__`` names, out of the module that it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tli' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _find_kernels() -> None:
    """Make ``tli_kernels`` the folder ``kernels/`` beside ``tli/``, if this is a source tree; a wheel brings it as a package.

    A tree uses its own kernels even where another tli is installed, whose kernels may be older. Hugging Face's ``kernels``
    beside an installed ``tli`` is a package with an ``__init__.py``; ours has none.
    """
    folder = pathlib.Path(__file__).parent.parent / "kernels"
    if (folder / "reference.py").is_file() and not (folder / "__init__.py").exists():
        spec = importlib.machinery.ModuleSpec("tli_kernels", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules.setdefault("tli_kernels", importlib.util.module_from_spec(spec))


_find_kernels()
