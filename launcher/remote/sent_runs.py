"""Remember which runs were submitted to which cluster, so that `launcher status RUN` finds the run's host by itself."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import ConfigError
from launcher.contract.rundir import RunPaths, append_line, default_run_root, read_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteRun:
    """A run on another machine."""

    cluster: str
    secrets: tuple[str, ...]
    """Names of the variables that it takes from the submitting shell."""


def _file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "slurm-sft-launcher" / "remote_runs.jsonl"


def remember(run: str, cluster: str, secrets: Sequence[str]) -> None:
    """Record that a run, or a sweep's runs, are about to be submitted to a cluster."""
    _file().parent.mkdir(parents=True, exist_ok=True)
    append_line(_file(), {"run": run, "cluster": cluster, "secrets": list(secrets), "time": time.time()})


def recall(options: argparse.Namespace) -> RemoteRun | None:
    """Return where the runs are that a command names.

    Return None where it names none, one that is on this machine, or only ones that were not sent from here.
    Raise ConfigError where they are on several clusters.
    """
    words = [getattr(options, name) for name in ("run", "group") if getattr(options, name, None)]
    words += getattr(options, "runs", [])
    root = options.run_root or default_run_root()
    if not words or not _file().exists() or any(_is_here(word, root) for word in words):
        return None
    lines = [line for line in read_lines(_file()) if {"run", "cluster", "secrets"} <= line.keys()]
    known = {line["run"]: line for line in lines}  # lines are in order of time: the newest of each name stays
    sent = [known[name] for name in words if name in known]
    clusters = sorted({line["cluster"] for line in sent})
    if len(clusters) > 1:
        raise ConfigError(f"these runs are on {' and '.join(clusters)}; name the runs of one cluster at a time")
    secrets = {name for line in sent for name in line["secrets"]}
    return RemoteRun(cluster=clusters[0], secrets=tuple(sorted(secrets))) if clusters else None


def _is_here(word: str, root: Path) -> bool:
    return any(RunPaths(path).manifest.is_file() for path in (root / word, Path(word)))
