"""A test session that is killed leaves no process behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.session_end import processes_of
from tests.slurm.cluster import why_unavailable
from tests.slurm.processes import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]

CHECKOUT = Path(__file__).parents[1]
CASE = "tests/left_behind.py"
DAEMONS = {"munged", "slurmctld", "slurmd", "slurmstepd"}


def name_of(pid: int) -> str:
    """Return the name of a process's program; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_killed_session_leaves_no_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Seen to fail without the watcher: the job's steps and the process in a session of its own live on."""
    folder = tmp_path_factory.mktemp("killed")  # a short name: sockets lie below it
    ready = folder / "ready"
    with (folder / "output").open("wb") as output:
        session = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/s", CASE],
            cwd=CHECKOUT,
            env={**os.environ, "LEFT_BEHIND_READY": str(ready)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: ready.exists() or session.poll() is not None, "the session to be at work", timeout=240)
            assert ready.exists(), (folder / "output").read_text()
            token, scratch = json.loads(ready.read_text())
            before = [name_of(pid) for pid in processes_of(token, scratch)]
        finally:
            session.kill()
            session.wait()
    assert before.count("sleep") >= 1
    assert len([name for name in before if "python" in name]) >= 3  # two ranks and their fork server
    if why_unavailable() is None:
        assert set(before) >= DAEMONS
    wait_until(lambda: not list(processes_of(token, scratch)), "all of the session's processes to end", timeout=60)
