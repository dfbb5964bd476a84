"""On a real Slurm: a run uses the code it was submitted with, and its lock file makes the same run again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import CHECKOUT, loss_curve, make_workbench

pytestmark = pytest.mark.slurm


def test_damaged_code_is_noticed_before_any_rank_starts(slurm: SlurmCluster, tmp_path: Path) -> None:
    bench = make_workbench(tmp_path / "bench", slurm)
    run = bench.submit("damaged", "resources.extra_sbatch=[--hold]")
    whole = run.code.read_bytes()
    run.code.chmod(0o644)
    run.code.write_bytes(whole[:-100])
    slurm.run(["scontrol", "release", bench.status(run)["job"]])
    bench.wait_for_state(run, "FAILED")
    assert bench.status(run)["reason"].startswith("bundle/code.zip is not what was submitted")
    assert not list(run.logs.rglob("rank-*.log"))
    refused = bench.launcher("resubmit", str(run.root), check=False)
    assert (refused.returncode, "code.zip is not what was submitted" in refused.stderr) == (4, True)


def test_edits_after_submit_change_nothing(slurm: SlurmCluster, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for part in ("launcher", "sft", "templates", "cluster_configs"):
        shutil.copytree(CHECKOUT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "setup.cfg", source)
    bench = make_workbench(tmp_path / "bench", slurm)

    def submit(config: Path, cwd: Path, *words: str) -> None:
        command = [sys.executable, "-m", "launcher", "submit", str(config), *words]
        subprocess.run(command, env=slurm.env, cwd=cwd, check=True, capture_output=True, timeout=120)

    small = ["resources.nodes=1", "resources.tasks_per_node=1", "topology.tensor_parallel=1"]
    small += ["topology.sequence_parallel=false", "train.max_steps=3", "checkpoint.export=false"]
    submit(bench.config, source, "name=first", *small, "resources.extra_sbatch=[--hold]")
    for module in ("sft/__main__.py", "sft/training/trainer.py", "launcher/contract/local_ranks.py"):
        (source / module).write_text("raise SystemExit('this is not the code that was submitted')\n")
    first = bench.run_paths("first")
    slurm.run(["scontrol", "release", bench.status(first)["job"]])
    bench.wait_for_state(first, "COMPLETED")
    shutil.rmtree(source)
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(first.code, unpacked)
    submit(first.lock, unpacked, "resources.extra_sbatch=[]")
    again = bench.run_paths("first-2")
    bench.wait_for_state(again, "COMPLETED")
    assert len(loss_curve(first)) == 3
    assert loss_curve(again) == loss_curve(first)
