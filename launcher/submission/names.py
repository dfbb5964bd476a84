"""Names for runs that follow another one."""

from __future__ import annotations

from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths


def free_name(paths: RunPaths) -> str:
    """Return the next name after this run's that no run has, or only one whose submission was interrupted."""
    stem, dash, number = paths.name.rpartition("-")
    base, first = (stem, int(number) + 1) if dash and number.isdigit() else (paths.name, 2)
    while _is_taken(RunPaths(paths.root.parent / f"{base}-{first}")):
        first += 1
    return f"{base}-{first}"


def _is_taken(paths: RunPaths) -> bool:
    if not paths.root.exists():
        return False
    has_manifest = paths.manifest.is_file()
    if has_manifest and read_manifest(paths).jobs:
        return True
    return not has_manifest and not paths.submission.exists()
