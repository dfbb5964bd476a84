"""Finds templates and cluster files: the user's own folders first, then a checkout's, then the installed package's.

The search path is data, so that a miss can print it. Rejected: importlib.resources, which finds the folders in a wheel
only: in a checkout they lie beside the package, where people look for them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from launcher.contract.errors import TemplateError, did_you_mean

Kind = Literal["templates", "cluster_configs"]

_PACKAGE = Path(__file__).resolve().parents[1]


def checkout_root() -> Path | None:
    """Top of the source tree this package runs from, or None where it is installed."""
    root = _PACKAGE.parent
    return root if (root / "setup.cfg").is_file() and (root / "templates").is_dir() else None


def own_folders(kind: Kind) -> list[Path]:
    """The user's folders for `kind`, first match wins."""
    home = os.environ.get("SFT_LAUNCHER_HOME")
    folders = [Path(home).expanduser().absolute() / kind] if home else []
    return [*folders, Path("~/.config/slurm-sft-launcher").expanduser() / kind]


def search_path(kind: Kind) -> list[Path]:
    """Folders looked through for `kind`, first match wins."""
    folders = own_folders(kind)
    checkout = checkout_root()
    if checkout is not None:
        folders.append(checkout / kind)
    return [*folders, _PACKAGE / kind]


def find(kind: Kind, name: str, suffix: str = "") -> Path:
    """Path of the file `name` + `suffix`; TemplateError prints where it was looked for."""
    folders = search_path(kind)
    for folder in folders:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    what = "template" if kind == "templates" else "cluster"
    known = {path.name.removesuffix(suffix) for folder in folders for path in folder.glob(f"*{suffix}")}
    looked = "".join(f"\n    {folder}" for folder in folders)
    raise TemplateError(f"{what} {name!r} not found{did_you_mean(name, known)}; looked for {name}{suffix} in:{looked}")
