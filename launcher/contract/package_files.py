"""Files of installed packages, which configs name as `package:NAME/FILE`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path


def package_file(path: str) -> Path | None:
    """Return the file that `package:NAME/FILE` names, or None where it is absent, without importing NAME."""
    package, file = _parts(path)
    folder = _package_folder(package)
    return folder / file if folder is not None and file and (folder / file).is_file() else None


def missing_package_file(path: str) -> str | None:
    """Return why there is no such file, or None where there is one."""
    package, file = _parts(path)
    if package_file(path) is not None:
        return None
    if _package_folder(package) is None:
        return f"package {package!r} is not installed here"
    return f"it has no file {file!r}"


def _parts(path: str) -> tuple[str, str]:
    package, _, file = path.removeprefix("package:").partition("/")
    return package, file


def _package_folder(package: str) -> Path | None:
    if not re.fullmatch(r"\w+", package):  # to look for a dotted name, Python would import its parent
        return None
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None
