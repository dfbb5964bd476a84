"""manifest.json: who submitted a run, when, from which code, and every job it has had.

Every command reads manifests, so what only the writer needs is imported in its functions.
"""

from __future__ import annotations

import dataclasses
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.contract.arrival import arrival
from launcher.contract.errors import RunStateError
from launcher.contract.job import Job
from launcher.contract.resources import checkout_root
from launcher.contract.rundir import RunPaths, read_json, write_json
from launcher.contract.topology import Topology

_JOBS_KEY = "attempts"  # the file's name for the jobs, from before a job and its attempts had names of their own

_PACKAGES = (
    "jinja2",
    "omegaconf",
    "submitit",
    "torch",
    "megatron-core",
    "pytorch-lightning",
    "transformers",
    "safetensors",
    "numpy",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What is known of a run besides its config."""

    name: str
    created_at: float
    submitter: str
    host: str
    command: tuple[str, ...]
    versions: dict[str, str]
    source: dict[str, Any]
    """Git state of the launcher's checkout and of the working directory."""
    topology: dict[str, Any]
    parent_run: str | None = None
    group: str | None = None
    """The sweep it belongs to."""
    digests: dict[str, str] = field(default_factory=dict)
    """File that a job starts from -> its SHA-256. Earlier versions wrote none."""
    given_resources: tuple[str, ...] | None = None
    """Keys of `resources` that the user wrote, whichever cluster the run goes to. Earlier versions wrote none."""
    jobs: tuple[Job, ...] = field(default_factory=tuple)
    """Every job of the run, oldest first. The file calls them `attempts`."""

    def with_job(self, job: Job) -> Manifest:
        """Return the same manifest with one more job."""
        return dataclasses.replace(self, jobs=(*self.jobs, job))


def describe_run(name: str, topology: Topology, command: Sequence[str], parent_run: str | None) -> tuple[Manifest, str]:
    """Return the manifest of a new run and the uncommitted changes of its code as a diff."""
    import getpass

    source, diff = describe_source()
    manifest = Manifest(
        name=name,
        created_at=time.time(),
        submitter=getpass.getuser(),
        host=socket.gethostname(),
        command=tuple(command),
        versions=_versions(),
        source=source,
        topology={**dataclasses.asdict(topology), "summary": topology.describe()},
        parent_run=parent_run,
    )
    return manifest, diff


def describe_source() -> tuple[dict[str, Any], str]:
    """Return the Git state of the launcher's checkout and of the working directory, and their uncommitted changes.

    For a command that came from another machine, these are of that machine.
    """
    came = arrival()
    if came is not None:
        return dict(came.source), came.diff
    folders = {folder for folder in (checkout_root(), Path.cwd()) if folder is not None}
    tops = {top for folder in folders if (top := _git(folder, "rev-parse", "--show-toplevel")) is not None}
    source = {top: _git_state(Path(top)) for top in sorted(tops)}
    return source, "".join(_git(Path(top), "diff", "HEAD", strip=False) or "" for top in source)


def _versions() -> dict[str, str]:
    import importlib.metadata
    import platform

    versions = {"launcher": __version__, "python": platform.python_version(), "executable": sys.executable}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_state(top: Path) -> dict[str, Any]:
    changed = (_git(top, "status", "--porcelain", strip=False) or "").splitlines()
    return {"commit": _git(top, "rev-parse", "HEAD"), "dirty": bool(changed), "changed": changed}


def _git(folder: Path, *arguments: str, strip: bool = True) -> str | None:
    """Return git's answer, or None outside a repository or without git."""
    import subprocess

    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if strip else done.stdout


def write_manifest(paths: RunPaths, manifest: Manifest) -> None:
    """Replace the run's manifest."""
    values = {item.name: getattr(manifest, item.name) for item in dataclasses.fields(Manifest)}
    values[_JOBS_KEY] = [job.as_json() for job in values.pop("jobs")]
    write_json(paths.manifest, values)


def read_manifest(paths: RunPaths) -> Manifest:
    """Read the run's manifest. RunStateError where the directory has none, or one that cannot be read."""
    try:
        values = read_json(paths.manifest)
        if values is None:
            raise RunStateError(f"{paths.root} is not a run directory: it has no {paths.manifest.name}")
        known = {item.name for item in dataclasses.fields(Manifest)}
        kept = {name: value for name, value in values.items() if name in known}
        kept["jobs"] = tuple(Job.from_json(job) for job in values[_JOBS_KEY])
        kept["command"] = tuple(values["command"])
        given = values.get("given_resources")
        kept["given_resources"] = None if given is None else tuple(map(str, given))
        return Manifest(**kept)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunStateError(f"{paths.manifest} cannot be read: {error}") from None
