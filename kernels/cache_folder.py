"""The cache folder of tli and its kernels. Imports neither torch nor triton."""

import os
import pathlib
import sys


def cache_folder() -> pathlib.Path:
    """``$TLI_CACHE``, else ``tli`` in the platform's cache folder: ``$XDG_CACHE_HOME`` or ``~/.cache`` on Linux."""
    if os.environ.get("TLI_CACHE"):
        return pathlib.Path(os.environ["TLI_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches" / "tli"
    if os.name == "nt":
        return pathlib.Path(os.environ.get("LOCALAPPDATA", pathlib.Path.home())) / "tli"
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "tli"
