"""Find templates and cluster files: in the user's own folders, else in the checkout or the installed package.

Rejected: importlib.resources, which finds the folders only in a wheel. In a checkout they lie beside the package, where
people look for them. Files within the package `launcher.contract` are another matter: ranks read them, too, and import
the package from an archive.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from launcher.contract.errors import TemplateError, did_you_mean

Kind = Literal["templates", "cluster_configs"]

_PACKAGE = Path(__file__).resolve().parents[1]


def checkout_root() -> Path | None:
    """Return the top of the source tree that this package runs from, or None if it is installed."""
    root = _PACKAGE.parent
    return root if (root / "setup.cfg").is_file() and (root / "templates").is_dir() else None


def packaged(name: str) -> bytes:
    """Return the content of a file of the package `launcher.contract`, which may be imported from an archive."""
    import pkgutil  # late: most commands read no such file

    content = pkgutil.get_data("launcher.contract", name)
    if content is None:
        raise TypeError(f"the loader of launcher.contract has no get_data for {name}")
    return content


def own_folders(kind: Kind) -> list[Path]:
    """Return the user's folders for `kind`. The first that has a file counts."""
    home = os.environ.get("SFT_LAUNCHER_HOME")
    folders = [Path(home).expanduser().absolute() / kind] if home else []
    return [*folders, Path("~/.config/slurm-sft-launcher").expanduser() / kind]


def search_path(kind: Kind) -> list[Path]:
    """Return all folders for `kind`. The first that has a file counts."""
    folders = own_folders(kind)
    checkout = checkout_root()
    if checkout is not None:
        folders.append(checkout / kind)
    return [*folders, _PACKAGE / kind]


def find(kind: Kind, name: str, suffix: str = "") -> Path:
    """Return the path of the file `name` + `suffix`, or raise TemplateError that lists the folders."""
    folders = search_path(kind)
    for folder in folders:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    what = "template" if kind == "templates" else "cluster"
    files = [path for folder in folders for path in folder.glob(f"*{suffix}") if path.is_file()]
    known = {path.name.removesuffix(suffix) for path in files}
    looked = "".join(f"\n    {folder}" for folder in folders)
    raise TemplateError(f"{what} {name!r} not found{did_you_mean(name, known)}; looked for {name}{suffix} in:{looked}")
