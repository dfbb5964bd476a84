"""Submitting to a real Slurm from another machine: a connection that is lost in mid-submit makes no second job."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.contract.exit_codes import ExitCode
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.slurm.runs import CHECKOUT, make_workbench
from tests.ssh_server import SshServer, close_connections, why_unavailable

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

SBATCH = """\
#!/bin/bash
{sbatch} "$@" || exit
[ ! -e {folder}/hold ] || {{ touch {folder}/submitted; while [ -e {folder}/hold ]; do sleep 0.1; done; }}
"""


def test_connection_lost_after_sbatch(
    slurm: SlurmCluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sockets = tmp_path_factory.mktemp("ssh")  # names of sockets are short
    bench = make_workbench(tmp_path / "bench", slurm)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH.format(sbatch=shutil.which("sbatch"), folder=tmp_path))
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    there = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_CONF": slurm.env["SLURM_CONF"]}
    (tmp_path / "server").mkdir()
    with SshServer(tmp_path / "server", there) as server:
        folder = tmp_path / "laptop" / "cluster_configs"
        folder.mkdir(parents=True)
        cluster = yaml.safe_load((CHECKOUT / "cluster_configs" / "slurm-dev.yaml").read_text())
        cluster |= {"host": "login", "host_directory": str(bench.root), "host_python": sys.executable}
        (folder / "far.yaml").write_text(yaml.safe_dump({**cluster, "host_options": server.options}))
        laptop = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        laptop |= {"HOME": str(tmp_path / "laptop"), "SFT_LAUNCHER_HOME": str(folder.parent)}
        laptop |= {"XDG_RUNTIME_DIR": str(sockets), "PYTHONPATH": str(CHECKOUT)}
        words = [sys.executable, "-m", "launcher", "submit", str(bench.config), "name=lost", "--cluster", "far"]
        words += ["cluster.runtime.python=/bin/true", "resources.extra_sbatch=[--hold]"]

        (tmp_path / "hold").touch()
        first = subprocess.Popen(words, env=laptop, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: (tmp_path / "submitted").exists() or first.poll() is not None, "sbatch", timeout=120)
        assert first.poll() is None, first.communicate()[1]
        os.kill(connection(sockets), signal.SIGKILL)
        said = first.communicate(timeout=60)[1]
        assert (first.returncode, "the connection to login ended" in said) == (ExitCode.SCHEDULER, True), said
        (tmp_path / "hold").unlink()

        def finished() -> bool:  # the first command's far end may still be asking Slurm, and holds the directory
            done = subprocess.run(words, env=laptop, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            return done.returncode == 0 or "run lost exists" in done.stderr

        wait_until(finished, "the submission to be finished", timeout=120, interval=1)
        (job,) = read_manifest(RunPaths(bench.root / "runs" / "lost")).jobs
        jobs = slurm.run(["squeue", "-h", "--states=all", "--name=lost", "--format=%i"]).stdout.split()
        assert jobs == [job.id.text]
        assert server.logins() == 2  # once before and once after the loss
        close_connections(sockets)


def connection(sockets: Path) -> int:
    """Process id of the ssh that holds the shared connection."""
    (socket,) = sockets.glob("slurm-sft-launcher-*/ssh-*")
    done = subprocess.run(
        ["ssh", "-O", "check", "-o", f"ControlPath={socket}", "any"], capture_output=True, text=True, check=True
    )
    return int(done.stderr.partition("pid=")[2].partition(")")[0])
