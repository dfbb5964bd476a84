"""The directory of a run that is being submitted: whose it is, and what remains of it after a failure."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.contract import race
from launcher.contract.errors import ConfigError, RunStateError
from launcher.contract.manifest import read_manifest
from launcher.contract.records import read_events
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import is_config_of
from launcher.submission import intent
from launcher.submission.claim import LOCK_FILE, claim
from launcher.submission.submission import Submission


@contextlib.contextmanager
def claimed_directory(paths: RunPaths) -> Iterator[None]:
    """Hold the run's directory, made if need be. If the body fails and certainly made no job, remove what is new.

    RunStateError where the directory belongs to something else, ConfigError where it cannot be made.
    """
    made = [folder for folder in (paths.root.parent, *paths.root.parent.parents) if not folder.exists()]
    if _is_foreign(paths.root):
        raise _exists(paths)
    with contextlib.ExitStack() as held:
        try:
            paths.root.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(claim(paths.root, create=True))
            if _is_foreign(paths.root):  # somebody put it there since the first look
                raise _exists(paths)
        except OSError as error:
            raise ConfigError(f"run_root: {paths.root} cannot be created: {error.strerror}") from None
        try:
            yield
        except BaseException:
            if not paths.submission.exists() and not _has_jobs(paths):
                shutil.rmtree(paths.root, ignore_errors=True)
                for folder in made:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
            raise


def is_unfinished(submission: Submission) -> bool:
    """Return whether the directory holds this run, prepared, with a submission that was interrupted.

    Otherwise empty it of what a killed launcher left there. RunStateError where it holds another run.
    """
    paths = submission.paths
    begun = paths.manifest.is_file() and (intent.pending(paths) is not None or _race_has_begun(submission))
    if not begun and _has_jobs(paths):
        raise _exists(paths)
    if not begun:
        for entry in paths.root.iterdir():  # of a launcher that was killed before it asked for a job
            if entry.name != LOCK_FILE:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return False
    if not is_config_of(paths.config, submission.spec):
        raise RunStateError(
            f"the submission of run {paths.name} was interrupted, and this config is not the one it had; "
            f"finish it with `launcher resubmit {paths.name}`, or choose another name (name=...)"
        )
    return True


def _race_has_begun(submission: Submission) -> bool:
    """Return whether some, but not all, of a race's jobs were submitted, and none of them has started."""
    paths = submission.paths
    if not submission.candidate or not paths.candidates.is_dir() or race.winner(paths) is not None:
        return False
    return len(race.entries(read_events(paths))) < sum(1 for _ in paths.candidates.iterdir())


def _exists(paths: RunPaths) -> RunStateError:
    return RunStateError(
        f"run {paths.name} exists in {paths.root.parent}; "
        f"go on with `launcher resubmit {paths.name}`, or choose another name (name=...)"
    )


def _is_foreign(root: Path) -> bool:
    """Return whether `root` is something that no launcher made: a link, another user's, or a folder with files."""
    if not os.path.lexists(root):
        return False
    if root.is_symlink() or not root.is_dir() or root.stat().st_uid != os.getuid():
        return True
    return any(root.iterdir()) and not (root / LOCK_FILE).exists()


def _has_jobs(paths: RunPaths) -> bool:
    return paths.manifest.is_file() and bool(read_manifest(paths).jobs)
