"""Finds run directories by their names."""

from __future__ import annotations

from pathlib import Path

from launcher.contract.errors import RunStateError, did_you_mean
from launcher.contract.rundir import RunPaths, runs_of_group


def all_runs(root: Path) -> list[RunPaths]:
    """Return every run in `root`, oldest first."""
    if not root.is_dir():
        return []
    runs = [RunPaths(path.absolute()) for path in root.iterdir() if RunPaths(path).manifest.is_file()]
    return sorted(runs, key=lambda paths: (paths.manifest.stat().st_ctime, paths.name))


def find_run(word: str, root: Path) -> RunPaths:
    """Return the run named `word` in `root`, or the run directory `word`. Raise RunStateError where there is none."""
    for path in (root / word, Path(word)):
        if RunPaths(path).manifest.is_file():
            return RunPaths(path.absolute())
    of_sweep = runs_of_group(root, word)
    if of_sweep:
        raise RunStateError(f"{word} is a sweep, and one run is needed: {', '.join(of_sweep)}")
    near = did_you_mean(word, [paths.name for paths in all_runs(root)])
    raise RunStateError(f"no run {word!r} in {root.absolute()}{near} (--run-root or SFT_RUN_ROOT says where runs are)")
