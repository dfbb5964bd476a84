"""Modules that a config names by import path."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

_OURS = ("launcher", "sft")


def import_named(module: str) -> ModuleType:
    """Import a module that the config names.

    One that the run's archive of code has is unpacked first, to a folder that goes when this process ends: it may read
    files beside it, or be compiled code, and neither works from within an archive.
    """
    top = module.partition(".")[0]
    archive = _archive_of(top) if top and top not in (*_OURS, *sys.modules) else None
    if archive is not None:
        sys.path.insert(0, _unpacked(archive))
        importlib.invalidate_caches()
    return importlib.import_module(module)


def _archive_of(top: str) -> str | None:
    """Return the archive that a top-level module or package would be imported from, or None where there is none."""
    found = importlib.util.find_spec(top)
    if found is None:
        return None
    places = [*(found.submodule_search_locations or []), found.origin or ""]
    return next((entry for entry in sys.path if places[0].startswith(f"{entry}/") and Path(entry).is_file()), None)


def _unpacked(archive: str) -> str:
    folder = tempfile.mkdtemp(prefix="sft-code-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder
