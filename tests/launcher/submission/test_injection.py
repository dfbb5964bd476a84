"""Every text of a config is data: a value that looks like a command is never executed, wherever it is used."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import ConfigError
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import field_types
from launcher.contract.topology import build_topology
from launcher.submission.render_script import render
from tests.launcher.conftest import Commands
from tests.launcher.submission.test_render_script import golden_scripts

_TEXTS = (str, str | None, list[str], dict[str, str])
_BASES = ("slurm-everything", "slurm-venv", "slurm-conda", "slurm-apptainer", "local-none", "slurm-pyxis")
_STUBS = ("python", "/opt/python", "srun", "scontrol", "conda", "apptainer", "module", "timeout", "python3")


def text_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all fields that hold free text."""
    for name, kind in field_types(section).items():
        if dataclasses.is_dataclass(kind):
            yield from text_keys(typing.cast(type, kind), f"{prefix}{name}.")
        elif kind in _TEXTS:
            yield f"{prefix}{name}"


def with_text(value: Any, key: str, text: str) -> Any:
    """The dataclass with `text` in the field of this key, past all checks."""
    name, _, rest = key.partition(".")
    if rest:
        return dataclasses.replace(value, **{name: with_text(getattr(value, name), rest, text)})
    kind = field_types(type(value))[name]
    held = [text] if kind == list[str] else {"KEY": text} if kind == dict[str, str] else text
    return dataclasses.replace(value, **{name: held})


def payload(canary: Path) -> str:
    """Closes every quote, opens every substitution, and ends every command."""
    touch = f"touch {canary}"
    quotes = f"x$({touch})`{touch}`';{touch};'\";{touch};\"\\';{touch};$'\\'';{touch} #"
    return f"{quotes}&&{touch}||{touch}|{touch}&{touch})}}];{touch};"


@pytest.fixture
def stubs(commands: Commands) -> Commands:
    for name in _STUBS:
        if "/" not in name:
            commands.add(name, "exit 0")
    commands.add("scontrol", "echo node1")
    return commands


def run_script(script: str, folder: Path) -> None:
    """Parse it, then run it with harmless stand-ins for all it starts."""
    file = folder / "job.sh"
    file.write_text(script)
    checked = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "HOSTNAME": "node1"}
    job["SLURM_JOB_END_TIME"] = "4102444800"
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **job}
    subprocess.run(["bash", str(file)], cwd=folder, env=environment, capture_output=True, timeout=60)


def run_with(base: RunSpec, key: str, folder: Path) -> bool:
    """Whether the payload at this key came into a script; it is run then."""
    canary = folder / "canary"
    spec = with_text(base, key, payload(canary))
    try:
        script = render(spec, build_topology(spec, None), RunPaths(folder / "run"), "/opt/python", None)
    except ConfigError:
        return False
    if "touch" not in script:
        return False
    run_script(script, folder)
    assert not canary.exists(), f"{key} was run"
    return True


def test_the_payload_would_be_seen(tmp_path: Path, stubs: Commands) -> None:
    """The test's own test: unquoted, in single and in double quotes, it runs."""
    for number, script in enumerate(("echo {}", "echo '{}'", 'echo "{}"', "x={}")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "job.sh").write_text(script.format(payload(folder / "canary")))
        subprocess.run(["bash", str(folder / "job.sh")], capture_output=True, cwd=folder)
        assert (folder / "canary").exists(), script


@pytest.mark.parametrize("name", [name for name in _BASES if name in golden_scripts()])
def test_no_text_is_run(name: str, tmp_path: Path, stubs: Commands) -> None:
    base = golden_scripts()[name]
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, cache_dir=str(tmp_path / "cache")))
    keys = list(text_keys(RunSpec))
    used = [key for key in keys if run_with(base, key, tmp_path)]
    assert len(keys) > 40
    assert len(used) >= 4, used


def test_all_at_once_in_directives(tmp_path: Path, stubs: Commands) -> None:
    """sbatch reads directives line by line: no value may begin a line, and none may end one."""
    base = golden_scripts()["slurm-everything"]
    before = _directives(render(base, build_topology(base, None), RunPaths(tmp_path / "run"), "/opt/python", None))
    spec = base
    for key in (
        f"resources.{name}" for name in ("partition", "account", "qos", "constraint", "reservation", "nodelist")
    ):
        spec = with_text(spec, key, payload(tmp_path / "canary"))
    after = _directives(render(spec, build_topology(spec, None), RunPaths(tmp_path / "run"), "/opt/python", None))
    assert [line.partition("=")[0].replace('"', "") for line in after] == [
        line.partition("=")[0].replace('"', "") for line in before
    ]


def _directives(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]
