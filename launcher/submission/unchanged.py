"""What a run's jobs start from, its code and its batch script, must be what was submitted.

The manifest has digests of both. They are compared before each job is submitted, and by the job itself: of the code
before the first process that imports it, of the script before it submits or starts itself again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from launcher.contract.errors import RunStateError
from launcher.contract.rundir import RunPaths
from launcher.submission.code_snapshot import digest
from launcher.submission.lockfile import read_lockfile


def digests(paths: RunPaths) -> dict[str, str]:
    """Return file -> SHA-256 of those files that are there."""
    of_race = sorted(paths.candidates.glob(f"*/{paths.script.name}"))
    files = (file for file in (paths.script, *of_race, paths.code) if file.is_file())
    return {str(file.relative_to(paths.root)): _sha256(file) for file in files}


def check_unchanged(paths: RunPaths, then: Mapping[str, str]) -> None:
    """Raise RunStateError where a file is not the one that the manifest has the digest of, `then`."""
    now = digests(paths)
    changed = [name for name, sha256 in then.items() if now.get(name) != sha256]
    if changed:
        raise _changed(paths, paths.root / changed[0])
    if not then:
        _check_loose_code(paths)


def _check_loose_code(paths: RunPaths) -> None:
    """Do the same for a run that an earlier version made: its lock file has the digest of its folder of code."""
    code = read_lockfile(paths.lock).get("code") if paths.lock.is_file() else None
    if code is not None and digest(paths.loose_code) != code["sha256"]:
        raise _changed(paths, paths.loose_code)


def _changed(paths: RunPaths, what: Path) -> RunStateError:
    return RunStateError(
        f"{what} is not what was submitted: damaged, or changed since; restore it, or start a new run with the code "
        f"that is here: `launcher submit {paths.lock}`"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
