"""run.lock.yaml: all it takes to submit a run again anywhere, as a new run.

A resolved config, which reads and overrides like any other, with one more section, `lock`: which code ran it, in which
environment, and what the files it names held. Submitting it compares those files first; a run of other data under the
same names would not be the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher import __version__
from launcher.contract.config.checks import package_file
from launcher.contract.config.load import read_text
from launcher.contract.errors import ConfigError
from launcher.contract.manifest import Manifest
from launcher.contract.rundir import RunPaths, write_atomic, write_json
from launcher.contract.spec import RunSpec, to_yaml
from launcher.submission.code_snapshot import Snapshot
from launcher.submission.intent import free_name
from launcher.submission.plan import Plan, make_plan

SUFFIX = ".lock.yaml"

_WHOLE = 64 << 20  # bytes; of a larger file the two ends are hashed: a login node does not read a terabyte
_END = 1 << 20


def is_lock(path: Path) -> bool:
    """Whether a config file is a run's lock file."""
    return path.name.endswith(SUFFIX)


def write_lock(paths: RunPaths, spec: RunSpec, manifest: Manifest, code: Snapshot | None) -> None:
    """Write run.lock.yaml and the environment's fingerprint."""
    section = {
        "launcher": __version__,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(manifest.created_at)),
        "run": str(paths.root),
        "parent_run": manifest.parent_run,
        "source": {top: {"commit": at["commit"], "dirty": at["dirty"]} for top, at in manifest.source.items()},
        "code": dataclasses.asdict(code) | {"left_out": list(code.left_out)} if code is not None else None,
        "versions": dict(manifest.versions),
        "files": fingerprints(spec),
    }
    head = "# Made by the launcher. `launcher submit run.lock.yaml` submits this run again, as a new one.\n"
    text = yaml.safe_dump({"lock": section}, sort_keys=False, allow_unicode=False, width=120)
    write_atomic(paths.lock, head + to_yaml(spec) + text)
    write_json(paths.environment, environment())


def plan_of_lock(path: Path, overrides: Sequence[str], cluster: str | None) -> tuple[Plan, str]:
    """The plan of a new run from a lock file, and the run it was made by; ConfigError where its files have changed."""
    plan = make_plan(path, overrides, cluster, resolved=True)
    if not any(word.startswith("name=") for word in overrides) and plan.paths.root.exists():
        plan = make_plan(path, [f"name={free_name(plan.paths)}", *overrides], cluster, resolved=True)
    lock = read_lock(path)
    given = {word.partition("=")[0] for word in overrides}
    now = fingerprints(plan.spec)
    problems = [
        f"{key}: {name} is not what it was when {path} was made: {_differences(then, now.get(key, {}).get(name))}; "
        f"restore it, or name other files with {key}=..."
        for key, files in lock["files"].items()
        if key not in given
        for name, then in files.items()
        if now.get(key, {}).get(name) != then
    ]
    if problems:
        raise ConfigError(problems)
    return plan, str(lock.get("run"))


def read_lock(path: Path) -> dict[str, Any]:
    """The `lock` section."""
    lock = yaml.safe_load(read_text(path)).get("lock")
    if not isinstance(lock, dict) or not isinstance(lock.get("files"), dict):
        raise ConfigError(f"{path}: lock: missing or damaged; to submit it as a config, give it another name")
    return lock


def code_note(path: Path) -> str:
    """How to run the code that a lock file's run had, where it is there and is not the code that runs now."""
    code = path.absolute().parent / "bundle" / "code"
    if not (code / "launcher").is_dir() or Path(__file__).is_relative_to(code):
        return ""
    return f"code       of this launcher; for the run's own: cd {code} && python -m launcher submit {path.absolute()}"


def _differences(then: dict[str, Any], now: dict[str, Any] | None) -> str:
    if now is None:
        return "it is gone"
    return ", ".join(f"{name} {then[name]} -> {now.get(name)}" for name in then if then[name] != now.get(name))


def fingerprints(spec: RunSpec) -> dict[str, dict[str, dict[str, Any]]]:
    """Config key -> file -> its size and hash, for all files that the run reads."""
    return {
        key: {str(file): _fingerprint(file) for path in paths for file in _files(path)}
        for key, paths in _named_files(spec)
    }


def _named_files(spec: RunSpec) -> Iterator[tuple[str, list[Path]]]:
    packaged = package_file(spec.model.path) if spec.model.path.startswith("package:") else Path(spec.model.path)
    yield "model.path", [packaged] if packaged else []
    yield "data.train", [Path(file) for file in spec.data.train]
    others: dict[str, list[str | None]] = {
        "data.sources": [file for source in spec.data.sources.values() for file in source.files],
        "model.tokenizer": [spec.model.tokenizer],
        "data.validation": [*spec.data.validation],
        "data.validation_sets": [*spec.data.validation_sets.values()],
        "data.chat_template": [spec.data.chat_template],
        "evaluation.prompts": [spec.evaluation.prompts],
    }
    for key, names in others.items():
        found = [Path(name) for name in names if name and name.startswith("/")]
        if found:
            yield key, found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    if path.exists():
        return [path]
    return sorted(file for file in Path("/").glob(str(path).removeprefix("/")) if file.is_file())


def _fingerprint(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE:
            return {"bytes": size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        ends = hashlib.sha256(stream.read(_END))
        stream.seek(-_END, os.SEEK_END)
        ends.update(stream.read(_END))
        return {"bytes": size, "sha256_of_both_ends": ends.hexdigest()}


@functools.cache
def environment() -> dict[str, Any]:
    """Python, packages, host and loaded modules of the launcher."""
    packages = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "modules": [name for name in os.environ.get("LOADEDMODULES", "").split(":") if name],
        "packages": dict(sorted((name, version) for name, version in packages.items() if name)),
    }
