"""tli: align the words of two languages at an early layer of a language model, and measure what is real.

>>> from tli import TrainConfig, train
>>> run = train(TrainConfig(rank=16, layer=2))

Nothing heavy is imported here: ``--help`` must not wait for torch. ``train`` is the module ``tli.train``, which can be
called, so that ``from tli import train`` and ``python -m tli.train`` name one thing.
"""

import importlib.machinery
import importlib.util
import pathlib
import sys

from tli.config import TrainConfig
from tli.runtime.errors import TliError

__all__ = ["TliError", "TrainConfig", "train"]
__version__ = "0.1.0"


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
