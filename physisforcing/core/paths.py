"""Where things live on this machine. Environment variables are read when a function is called, never at import."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_home() -> Path:
    """Folder for everything that can be rebuilt (asset pack, converted teachers, drivers).

    ``$PHYSIS_HOME`` where it is set, else ``$XDG_CACHE_HOME/physisforcing``, else ``~/.cache/physisforcing``. The folder is
    not created.
    """
    chosen = os.environ.get("PHYSIS_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "physisforcing"


def vulkan_path_file() -> Path:
    """The JSON file in which set-up notes the Vulkan driver it installed; it belongs to this Python environment."""
    return Path(sys.prefix) / "physis-vulkan.json"


def package_root() -> Path:
    """Folder of the installed ``physisforcing`` package."""
    return Path(__file__).resolve().parents[1]


def weights_root() -> Path:
    """Folder of the weights that ship with the package."""
    return package_root() / "weights"
