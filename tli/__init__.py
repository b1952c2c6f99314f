"""tli: align the words of two languages at an early layer of a language model with LoRA, and measure what is real.

    train, scan, fit_map, evaluate, export
                                       one function per command: frozen options in, files and the report, a dict, out
    TrainConfig, ScanConfig, ...       the options: the command's flags, with the same names, defaults and checks
    embed, read_pairs, load_adapter    word vectors, word lists and trained adapters
    TliError                           every error that a user can cause

Options are checked when they are made, and fill in what depends on others. They cannot be changed afterwards:

>>> import tli
>>> config = tli.TrainConfig(rank=8)
>>> config.alpha, config.output
(16.0, 'runs/default-layerauto-rank8-seed0')
>>> tli.TrainConfig(recipe="paper").margin
0.4
>>> tli.ScanConfig(model="path/to/model").output
'runs/scan-model'
>>> tli.MapConfig(seed=3).output
'runs/map-starter-seed3'
>>> tli.EvaluateConfig(adapters=("runs/default-layer2-rank8-seed0",)).layers is None
True
>>> tli.ExportConfig(adapter="runs/default-layer2-rank8-seed0", output="merged", dtype="float8").dtype
Traceback (most recent call last):
    ...
tli.runtime.errors.TliError: --dtype: the value must be one of bfloat16, float16, float32, got 'float8'; choose one of these

Names are imported when first used (PEP 562), so that ``--help`` does not wait for torch. ``tli.train`` is the function: the module of that
name serves ``python -m tli.train`` alone, and nothing imports it.
"""

import importlib
import importlib.machinery
import importlib.util
import pathlib
import sys
import typing

__all__ = [
    "EvaluateConfig",
    "ExportConfig",
    "MapConfig",
    "ScanConfig",
    "TliError",
    "TrainConfig",
    "__version__",
    "embed",
    "evaluate",
    "export",
    "fit_map",
    "load_adapter",
    "read_pairs",
    "scan",
    "train",
]
__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from tli.commands.embed import embed
    from tli.commands.evaluate import evaluate
    from tli.commands.export import export
    from tli.commands.map import fit_map
    from tli.commands.scan import scan
    from tli.commands.train import train
    from tli.config import EvaluateConfig, ExportConfig, MapConfig, ScanConfig, TrainConfig
    from tli.data.word_pairs import read_pairs
    from tli.model.trained_adapter import load_adapter
    from tli.runtime.errors import TliError
else:
    # a type checker must not see this: it would take any name for one of ours
    def __getattr__(name: str):
        """Import a name of the public API from the module that defines it."""
        if name not in _MODULES:
            raise AttributeError(f"module 'tli' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_MODULES = {
    "EvaluateConfig": "tli.config",
    "ExportConfig": "tli.config",
    "MapConfig": "tli.config",
    "ScanConfig": "tli.config",
    "TliError": "tli.runtime.errors",
    "TrainConfig": "tli.config",
    "embed": "tli.commands.embed",
    "evaluate": "tli.commands.evaluate",
    "export": "tli.commands.export",
    "fit_map": "tli.commands.map",
    "load_adapter": "tli.model.trained_adapter",
    "read_pairs": "tli.data.word_pairs",
    "scan": "tli.commands.scan",
    "train": "tli.commands.train",
}


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
