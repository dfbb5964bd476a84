"""run.lock.yaml: what it takes to submit a run again anywhere, as a new run.

It is a resolved config, which is read and overridden like any other, with one more section, `lock`: the code, the
environment, and fingerprints of the files that the config names. They are compared before it is submitted, as a run
on other data under the same names would not be the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, cast

import yaml

from launcher import __version__
from launcher.contract.config.text import read_text
from launcher.contract.errors import ConfigError
from launcher.contract.hub_cache import portable_name
from launcher.contract.manifest import Manifest
from launcher.contract.rundir import RunPaths, write_atomic, write_json
from launcher.contract.spec import RunSpec, to_yaml
from launcher.contract.spec.fields import path_fields
from launcher.submission.code_snapshot import Snapshot
from launcher.submission.names import free_name
from launcher.submission.submission import Submission, make_submission

SUFFIX = ".lock.yaml"

Fingerprint = dict[str, int | str]
"""Size and hash of a file."""

Fingerprints = dict[str, dict[str, Fingerprint]]
"""Config key -> file -> its fingerprint. All files of data.sources are under that one key."""


class Lock(TypedDict, total=False):
    """What the `lock` section holds, as far as it is read."""

    run: str
    code: dict[str, object] | None
    files: Fingerprints
    given_resources: list[str] | None


_WHOLE = 64 << 20
"""Bytes; of a larger file only both ends are hashed, because reading terabytes is no work for a login node."""
_END = 1 << 20


def is_lockfile(path: Path) -> bool:
    """Return whether a config file is a run's lock file."""
    return path.name.endswith(SUFFIX)


def write_lockfile(paths: RunPaths, spec: RunSpec, manifest: Manifest, code: Snapshot | None) -> None:
    """Write run.lock.yaml and the environment's fingerprint."""
    section = {
        "launcher": __version__,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(manifest.created_at)),
        "run": str(paths.root),
        "parent_run": manifest.parent_run,
        "source": {top: {"commit": at["commit"], "dirty": at["dirty"]} for top, at in manifest.source.items()},
        "code": dataclasses.asdict(code) | {"left_out": list(code.left_out)} if code is not None else None,
        "versions": dict(manifest.versions),
        "given_resources": None if manifest.given_resources is None else list(manifest.given_resources),
        "files": fingerprints(spec),
    }
    head = "# Made by the launcher. `launcher submit run.lock.yaml` submits this run again, as a new one.\n"
    text = yaml.safe_dump({"lock": section}, sort_keys=False, allow_unicode=False, width=120)
    write_atomic(paths.lock, head + to_yaml(spec) + text)
    write_json(paths.environment, environment())


def submission_of_lockfile(path: Path, overrides: Sequence[str], cluster: str | None) -> tuple[Submission, str]:
    """Return the submission of a new run from a lock file, and the run that the file was made by.

    Raise ConfigError where files that the run reads have changed, except under keys that `overrides` set anew.
    """
    lock = read_lockfile(path)
    submitted = functools.partial(
        make_submission, path, cluster=cluster, resolved=True, given=lock.get("given_resources")
    )
    submission = submitted(overrides)
    if not any(word.startswith("name=") for word in overrides) and submission.paths.root.exists():
        submission = submitted([f"name={free_name(submission.paths)}", *overrides])
    # What has yet to be fetched is what it was: the hub's commit says so.
    pending = {f"{wanted.snapshot}/{name}" for wanted in submission.config.fetches for name in wanted.names}
    problems = [
        f"{key}: {name} is not what it was when {path} was made: {difference}; "
        f"restore it, or name other files with {key}=..."
        for key, name, difference in _changes(lock["files"], fingerprints(submission.spec), overrides)
        if name not in pending
    ]
    if problems:
        raise ConfigError(problems)
    return submission, str(lock.get("run"))


def _changes(then: Fingerprints, now: Fingerprints, overrides: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield key, file and what is different about it, for files that `overrides` do not replace."""
    given = [word.partition("=")[0] for word in overrides]
    for key, files in then.items():
        if key in given:
            continue
        entries_given = any(word.startswith(f"{key}.") for word in given)
        for name, fingerprint in files.items():
            latest = now.get(key, {}).get(name)
            if latest is None and entries_given:
                continue  # an override names other files for one entry of a mapping; the other entries keep theirs
            if latest != fingerprint:
                yield key, name, _differences(fingerprint, latest)


def read_lockfile(path: Path) -> Lock:
    """Return the `lock` section, or raise ConfigError where it is missing or damaged."""
    try:
        document = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"{path}: lock: missing or damaged ({said}); restore it from the run's directory") from None
    lock = document.get("lock") if isinstance(document, dict) else None
    given = lock.get("given_resources") if isinstance(lock, dict) else None
    if not isinstance(lock, dict) or not isinstance(lock.get("files"), dict) or not isinstance(given, list | None):
        raise ConfigError(f"{path}: lock: missing or damaged; to submit it as a config, give it another name")
    return cast(Lock, lock)


def code_note(path: Path) -> str:
    """Return how to run the code that a lock file's run had, or nothing where that is gone or runs now."""
    paths = RunPaths(path.absolute().parent)
    unpack, folder = "", paths.loose_code
    if paths.code.is_file():
        folder = Path(f"{paths.name}-code")
        unpack = f"python -m zipfile -e {shlex.quote(str(paths.code))} {folder} && "
    elif not (folder / "launcher").is_dir() or Path(__file__).is_relative_to(folder):
        return ""
    submit = f"cd {shlex.quote(str(folder))} && python -m launcher submit {shlex.quote(str(path.absolute()))}"
    return f"code       of this launcher; for the run's own: {unpack}{submit}"


def _differences(then: Fingerprint, now: Fingerprint | None) -> str:
    if now is None:
        return "it is gone"
    return ", ".join(f"{name} {then[name]} -> {now.get(name)}" for name in then if then[name] != now.get(name))


def fingerprints(spec: RunSpec) -> Fingerprints:
    """Return the fingerprints of all files that the run reads."""
    by_key: Fingerprints = {}
    for field in path_fields(spec):
        path = field.rule.hashed(field.path)
        if path is not None:
            files = by_key.setdefault(field.mapped_by or field.key, {})
            files.update((portable_name(str(file)), _fingerprint(file)) for file in _files(path))
    return by_key


def _files(path: Path) -> list[Path]:
    """Return the file, the files in a folder, or those that a glob matches."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    if path.exists():
        return [path]
    return sorted(file for file in Path("/").glob(str(path).removeprefix("/")) if file.is_file())


def _fingerprint(file: Path) -> Fingerprint:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE:
            return {"bytes": size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        ends = hashlib.sha256(stream.read(_END))
        stream.seek(-_END, os.SEEK_END)
        ends.update(stream.read(_END))
        return {"bytes": size, "sha256_of_both_ends": ends.hexdigest()}


@functools.cache
def environment() -> Mapping[str, object]:
    """Return Python, packages, host and loaded modules of the launcher."""
    packages = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "modules": [name for name in os.environ.get("LOADEDMODULES", "").split(":") if name],
        "packages": dict(sorted((name, version) for name, version in packages.items() if name)),
    }
