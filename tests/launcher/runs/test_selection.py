"""Which runs a command selects: by name, state, age and group."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.errors import ConfigError
from launcher.contract.job_state import JobState
from launcher.contract.manifest import read_manifest, write_manifest
from launcher.contract.rundir import RunPaths
from launcher.runs.selection import Selection, parse_since, parse_states
from tests.launcher.conftest import Commands
from tests.launcher.fake_slurm import FakeSlurm
from tests.launcher.runs.test_state import make_run


def test_selection(tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    slurm = FakeSlurm(commands)
    jobs = slurm.submit("llama-1", "llama-2", "qwen")
    for name, job in zip(("llama-1", "llama-2", "qwen"), jobs, strict=True):
        make_run(tmp_path, name, job_id=job)
    slurm.start("1")

    def shown(*words: str) -> list[str]:
        main(["--debug", words[0], "--run-root", str(tmp_path), *words[1:]])
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]

    assert shown("status", "--name", "llama-*") == ["llama-1", "llama-2"]
    assert shown("status", "--state", "pending") == ["llama-2", "qwen"]
    assert shown("status", "--state", "pending,running", "--name", "*-1") == ["llama-1"]
    assert shown("list", "--since", "1d") == []  # made in 1970
    assert shown("list", "--since", "1970-01-01", "--name", "qwen") == ["qwen"]
    assert shown("list", "--state", "failed") == []
    qwen = RunPaths(tmp_path / "qwen")
    write_manifest(qwen, dataclasses.replace(read_manifest(qwen), group="sweep"))
    assert shown("list", "--group", "sweep") == shown("status", "--group", "sweep") == ["qwen"]


def test_bad_selections() -> None:
    with pytest.raises(ConfigError, match="--state RUNING: no such state; did you mean 'RUNNING'"):
        parse_states(["pending,runing"])
    with pytest.raises(ConfigError, match="--since yesterday: write how long ago"):
        parse_since("yesterday")
    assert abs(parse_since("2h") - (time.time() - 7200)) < 5
    assert Selection().fits(JobState.UNKNOWN)
