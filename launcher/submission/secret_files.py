"""Secrets by name only: `env_from` names variables, whose values are those of the shell that submits the run.

A local run inherits them. A batch job reads them from a file (mode 0600) in a private folder outside the run directory,
which the batch script sources, so that no value is in a script, a command line, a log, the run directory, or in the
environment that the scheduler stores with a job. The file is named after the run and stays until the run has succeeded
or was cancelled: a requeued job needs it again, and a resubmission rewrites it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import stat
import time
from pathlib import Path

from launcher.contract.errors import ConfigError
from launcher.contract.rundir import RunPaths, write_atomic
from launcher.contract.schedulers import CAPABILITIES
from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import values_under
from launcher.contract.spec.notify import WEB_SCHEMES
from launcher.contract.spec.rules import SHELL_VARIABLE

DEFAULT_FOLDER = Path("~/.config/slurm-sft-launcher/secrets")

_OWNER = "# run directory: "


def secrets_file(spec: RunSpec, paths: RunPaths) -> Path | None:
    """Return the file of the run's secrets, or None where it has none or its jobs inherit them."""
    if not spec.secret_names or CAPABILITIES[spec.cluster.scheduler].inherits_environment:
        return None
    folder = Path(spec.cluster.secrets_dir) if spec.cluster.secrets_dir else DEFAULT_FOLDER.expanduser()
    digest = hashlib.sha256(os.fsencode(paths.root)).hexdigest()
    return folder / f"{paths.name}-{digest[:12]}.env"


def check_secrets(spec: RunSpec) -> None:
    """Raise ConfigError where a named variable is missing from our environment, or holds no address of a webhook."""
    problems = [
        f"{key}: {name} is not set in this shell, from which the run would take it; export it and submit again"
        for key, name in values_under(spec, SHELL_VARIABLE)
        if name not in os.environ
    ]
    webhook = spec.notify.webhook_env
    if webhook and not os.environ.get(webhook, WEB_SCHEMES[0]).startswith(WEB_SCHEMES):  # it may be a secret: not shown
        problems.append(f"notify.webhook_env: {webhook} holds no http(s) address in this shell; correct it")
    if problems:
        raise ConfigError(problems)


def write_secrets(spec: RunSpec, paths: RunPaths) -> None:
    """Write the values for the run's next job, and delete the files of runs whose directory is gone."""
    check_secrets(spec)
    path = secrets_file(spec, paths)
    if path is None:
        return
    _make_private(path.parent)
    _prune(path.parent)
    exports = [f"export {name}={shlex.quote(os.environ[name])}" for name in spec.secret_names]
    write_atomic(path, "\n".join([f"{_OWNER}{json.dumps(str(paths.root))}", *exports, ""]), mode=0o600)


def remove_secrets(spec: RunSpec, paths: RunPaths) -> None:
    """Delete the run's file: no job of it will start again by itself."""
    path = secrets_file(spec, paths)
    if path is not None:
        path.unlink(missing_ok=True)


def _make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"cluster.secrets_dir: {folder} must be a folder of yours that nobody else can enter: chmod 700 it"
        )


def _prune(folder: Path) -> None:
    for file in folder.glob("*.env"):
        with contextlib.suppress(OSError, ValueError):
            owner = json.loads(file.read_text(encoding="utf-8").partition("\n")[0].removeprefix(_OWNER))
            if not Path(owner).exists():
                file.unlink()
    for half_written in folder.glob(".*.env.*"):  # by a launcher that was killed
        with contextlib.suppress(OSError):
            if half_written.stat().st_mtime < time.time() - 3600:
                half_written.unlink()
