"""One job on a real Slurm, however the launcher dies and whatever happens to sbatch's answer."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time

import pytest

from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import CHECKOUT, Workbench, make_workbench

pytestmark = pytest.mark.slurm

HELD = ["cluster.runtime.python=/bin/true", "resources.extra_sbatch=[--hold]"]
"""A job that only waits: what is looked at is how many there are."""


@pytest.fixture(scope="module")
def bench(slurm_session: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_workbench(tmp_path_factory.mktemp("once"), slurm_session)


def start_submit(bench: Workbench, name: str, path: str | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launcher", "submit", str(bench.config), f"name={name}", *HELD]
    environment = {**bench.cluster.env, "PATH": path or bench.cluster.env["PATH"]}
    return subprocess.Popen(
        command, env=environment, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(submits: dict[str, subprocess.Popen[str]]) -> None:
    for process in submits.values():
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output


def jobs_named(bench: Workbench, name: str) -> list[str]:
    return bench.cluster.run(["squeue", "-h", "--states=all", f"--name={name}", "--format=%i"]).stdout.split()


def test_launcher_killed_at_random_moments(bench: Workbench, slurm: SlurmCluster) -> None:
    """Killed three times each, the last call is left to finish."""
    names = [f"killed-{number}" for number in range(3)]
    for name in names * 3:
        process = start_submit(bench, name)
        time.sleep(random.uniform(0.1, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    unfinished = [name for name in names if not _attempts(bench, name)]
    finish({name: start_submit(bench, name) for name in unfinished})
    for name in names:
        assert jobs_named(bench, name) == _attempts(bench, name)
        assert len(_attempts(bench, name)) == 1


def _attempts(bench: Workbench, name: str) -> list[str]:
    paths = bench.run_paths(name)
    if not paths.manifest.exists() or paths.submission.exists():
        return []
    return [job.id.text for job in read_manifest(paths).jobs]


def plant_sbatch(bench: Workbench, folder: str, after: str) -> str:
    """A PATH on which sbatch is the real one, whose answer goes astray."""
    directory = bench.root / folder
    directory.mkdir()
    (directory / "sbatch").write_text(f'#!/bin/bash\n/usr/bin/sbatch "$@" >/dev/null || exit\n{after}\n')
    (directory / "sbatch").chmod(0o755)
    return f"{directory}:{bench.cluster.env['PATH']}"


def test_job_whose_launcher_died_in_sbatch_is_adopted(bench: Workbench, slurm: SlurmCluster) -> None:
    path = plant_sbatch(bench, "kills", "kill -9 \"$(cut -d' ' -f4 /proc/$PPID/stat)\"")
    process = start_submit(bench, "adopted", path)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    finish({"adopted": start_submit(bench, "adopted", path)})
    assert len(jobs_named(bench, "adopted")) == 1
    assert jobs_named(bench, "adopted") == _attempts(bench, "adopted")


def test_job_whose_answer_is_lost_is_adopted_by_submit_and_resubmit(bench: Workbench, slurm: SlurmCluster) -> None:
    lost = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
    path = plant_sbatch(bench, "loses", lost)
    finish({"unheard": start_submit(bench, "unheard", path)})
    run = bench.run_paths("unheard")
    (job,) = _attempts(bench, "unheard")
    bench.cluster.run(["scancel", job])
    bench.wait_for_state(run, "CANCELLED")
    command = [sys.executable, "-m", "launcher", "resubmit", str(run.root)]
    subprocess.run(command, env={**bench.cluster.env, "PATH": path}, cwd=CHECKOUT, check=True, timeout=120)
    assert jobs_named(bench, "unheard") == _attempts(bench, "unheard")
    assert len(_attempts(bench, "unheard")) == 2


def test_job_submitted_from_inside_a_job_is_its_own(bench: Workbench, slurm: SlurmCluster) -> None:
    """The outer job has one node and one task; the inner one asks for two nodes with two ranks each."""
    python = bench.root / "python-that-shows"
    python.write_text('#!/bin/bash\necho "$3 $SLURM_NTASKS $SLURM_NNODES ${SLURM_MEM_PER_NODE-} ${SBATCH_ACCOUNT-}"\n')
    python.chmod(0o755)
    words = [sys.executable, "-m", "launcher", "submit", str(bench.config), "name=inner"]
    words += [f"cluster.runtime.python={python}", "checkpoint.export=false"]
    environment = {**bench.cluster.env, "SBATCH_ACCOUNT": "nobody", "SQUEUE_FORMAT": "%u"}
    outer = ["srun", "-N1", "-n1", "--mem=77"]
    subprocess.run([*outer, *words], env=environment, cwd=CHECKOUT, check=True, timeout=120)
    run = bench.run_paths("inner")
    bench.wait_for_state(run, "COMPLETED")
    (attempt,) = [path for path in run.logs.iterdir() if path.is_dir()]
    assert [_line(run, attempt.name, rank) for rank in range(4)] == ["train 4 2  \n"] * 4


def _line(run: RunPaths, attempt: str, rank: int) -> str:
    return run.rank_log(attempt, rank).read_text()


def test_test_only_says_when_and_where_and_leaves_nothing(bench: Workbench, slurm: SlurmCluster) -> None:
    said = bench.launcher("submit", str(bench.config), "name=asked", "--test-only").stdout
    assert re.search(r"\nstart      Job [0-9]+ to start at 20\S+ using [0-9]+ processors on nodes node\S+ in", said)
    assert jobs_named(bench, "asked") == []
    assert not bench.run_paths("asked").root.exists()


def test_sweep_holds_runs_back(bench: Workbench, slurm: SlurmCluster) -> None:
    """Two at once: the third waits for the end of the first, however that ends."""
    config = bench.root / "sweep.yaml"
    config.write_text(bench.config.read_text() + "sweep: {product: {train.seed: [1, 2, 3]}, max_at_once: 2}\n")
    bench.launcher("submit", str(config), "name=swept", "cluster.runtime.python=/bin/false")
    runs = [bench.run_paths(f"swept-{number}") for number in range(3)]
    for run in runs:
        bench.wait_for_state(run, "FAILED")
    first, third = (_shown(bench, name) for name in ("swept-0", "swept-2"))
    assert third["StartTime"] >= first["EndTime"]


def _shown(bench: Workbench, name: str) -> dict[str, str]:
    """What `scontrol show job` says of a run's job."""
    text = bench.cluster.run(["scontrol", "show", "job", "-o", _attempts(bench, name)[0]]).stdout
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def test_run_after_another_starts_when_that_has_succeeded(bench: Workbench, slurm: SlurmCluster) -> None:
    bench.launcher("submit", str(bench.config), "name=before", *HELD)
    words = ["name=behind", "after=before", f"model.path={bench.run_paths('before').export}", HELD[0]]
    bench.launcher("submit", str(bench.config), *words)
    before, behind = bench.run_paths("before"), bench.run_paths("behind")
    assert bench.status(behind)["reason"].startswith("Dependency")
    slurm.run(["scontrol", "release", _attempts(bench, "before")[0]])
    bench.wait_for_state(behind, "COMPLETED")
    bench.launcher("submit", str(bench.config), "name=fails", "cluster.runtime.python=/bin/false")
    bench.wait_for_state(bench.run_paths("fails"), "FAILED")
    refused = bench.launcher("submit", str(bench.config), "name=never", "after=fails", check=False)
    assert (refused.returncode, "would wait for ever" in refused.stderr) == (4, True)
    assert bench.state(before) == "COMPLETED"
