"""A test that tests/test_session_end.py runs in a pytest of its own, and kills in mid-flight."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.session_end import MARK
from tests.slurm.cluster import SlurmCluster, why_unavailable

SLEEP = ["sleep", "600"]


def sleep_for_long(ready: Path) -> None:
    """Runs on a rank, which nothing interrupts."""
    (ready.parent / f"rank-{os.environ['RANK']}").touch()
    time.sleep(600)


def test_starts_all_kinds_of_processes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    ready = Path(os.environ["LEFT_BEHIND_READY"])
    threading.Thread(target=run_ranks, args=(2, sleep_for_long, ready), kwargs={"timeout": 600}, daemon=True).start()
    subprocess.Popen(SLEEP, start_new_session=True)
    while len(list(ready.parent.glob("rank-*"))) < 2:
        time.sleep(0.1)
    if why_unavailable() is None:
        cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=1)
        cluster.start()
        job = cluster.run(["sbatch", "--parsable", "--output=/dev/null", "--wrap", f"srun {' '.join(SLEEP)}"]).stdout
        cluster.wait_for_job(job.strip(), {"RUNNING"})
    basetemp = str(tmp_path_factory.getbasetemp())
    ready.with_suffix(".partial").write_text(json.dumps([os.environ[MARK], basetemp]))
    ready.with_suffix(".partial").rename(ready)
    time.sleep(600)
