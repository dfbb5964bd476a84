"""What sites and shells do to a run: wrapped commands, answers that fail, variables and limits of the login shell."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launcher.contract.exit_codes import ExitCode
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import ClusterSpec
from launcher.runs.excluded_nodes import Ledger, by_hand
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.slurm.runs import Workbench, events, make_workbench

pytestmark = pytest.mark.slurm

PYTHON = f"""#!/bin/bash
# The launcher's own steps are real. Ranks write what they see of the shell that submitted, and end as they are told.
[ "$2" = sft ] || exec {sys.executable} "$@"
[ "$3" = train ] || exit 0
here=$(dirname "$0")
echo "${{RANK-unset}} ${{WORLD_SIZE-unset}} $(ulimit -S -t) ${{SFT_END_TIME-unset}} $MASTER_ADDR" >>"$here/seen"
until [ -e "$here/go-on" ]; do sleep 0.1; done
[ -e "$here/once" ] || {{ touch "$here/once"; exit 75; }}
"""
ALONE = (
    "resources.nodes=1",
    "resources.tasks_per_node=1",
    "topology.tensor_parallel=1",
    "topology.sequence_parallel=false",
    "checkpoint.export=false",
)


@pytest.fixture
def bench(slurm: SlurmCluster, tmp_path: Path) -> Workbench:
    return make_workbench(tmp_path / "bench", slurm)


def site(bench: Workbench, name: str, **commands: str) -> tuple[str, dict[str, str]]:
    """Return the override for ranks of this site, and a PATH on which these commands come before Slurm's."""
    folder = bench.root / name
    folder.mkdir()
    for command, body in {"python": PYTHON, **commands}.items():
        (folder / command).write_text(body)
        (folder / command).chmod(0o755)
    return f"cluster.runtime.python={folder}/python", {"PATH": f"{folder}:{bench.cluster.env['PATH']}"}


def jobs_named(bench: Workbench, name: str) -> list[str]:
    return bench.cluster.run(["squeue", "-h", "--states=all", f"--name={name}", "-o", "%i"]).stdout.split()


SBATCH = {
    "banner": """#!/bin/bash
echo "Welcome to the cluster"
/usr/bin/sbatch "$@"; code=$?
echo "charged to: physics"
exit $code
""",
    "mute": '#!/bin/bash\n/usr/bin/sbatch "$@" >/dev/null; echo "your job was sent"\n',
}


@pytest.mark.parametrize("kind", SBATCH)
def test_run_that_goes_on_as_a_new_job(bench: Workbench, kind: str) -> None:
    """The new job is recorded, whatever sbatch prints, and a run that waits for the old one waits for it."""
    python, env = site(bench, "site", sbatch=SBATCH[kind])
    env["XDG_STATE_HOME"] = str(bench.root / "state")
    bench.launcher("nodes", "add", "node4", "--cluster=slurm-dev", "--why=fan", env=env)
    run = bench.submit(f"{kind}-first", *ALONE, python, "restart.how=resubmit", env=env)
    (old,) = read_manifest(run).jobs
    behind = bench.submit(f"{kind}-behind", *ALONE, python, f"after={run.name}", env=env)
    assert f"Dependency: waits for job {old.id.text} to succeed" in bench.status(behind)["reason"]
    (bench.root / "site" / "go-on").touch()
    wait_until(lambda: len(events(run, "submitted")) == 2, "the run's own submission", timeout=120)
    bench.wait_for_state(run, "COMPLETED")
    new = events(run, "submitted")[1]
    assert sorted(jobs_named(bench, run.name)) == sorted([old.id.text, new["job_id"]])
    assert new["by"] == f"{old.id.text}.0"
    assert "ExcNodeList=node4 " in bench.cluster.run(["scontrol", "show", "job", "-o", new["job_id"]]).stdout
    assert not run.submission.exists()
    assert bench.status(run)["job"] == new["job_id"]
    bench.wait_for_state(behind, "COMPLETED")


SQUEUE = '#!/bin/bash\n[ -z "${SLURM_JOB_ID-}" ] || exit 1\nexec /usr/bin/squeue "$@"\n'
SCONTROL = """#!/bin/bash
case "$*" in "show node"*) [ -e "$0.failed" ] || { touch "$0.failed"; exit 1; } ;; esac
exec /usr/bin/scontrol "$@"
"""


def test_nothing_of_the_login_shell_reaches_the_ranks(bench: Workbench) -> None:
    """Nor does a scheduler that fails to answer once: no deadline is made up, and no run is given up."""
    python, env = site(bench, "site", squeue=SQUEUE, scontrol=SCONTROL)
    (bench.root / "site" / "once").touch()
    (bench.root / "site" / "go-on").touch()
    words = [str(bench.config), "name=clean", *ALONE, python, "cluster.rendezvous=node_addr"]
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere"}
    command = 'ulimit -S -t 300; exec "$@"'
    bench.cluster.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "launcher", "submit", *words],
        cwd=Path(__file__).parents[2],
        env={**env, **torchrun},
    )
    bench.wait_for_state(bench.run_paths("clean"), "COMPLETED")
    assert (bench.root / "site" / "seen").read_text().split() == ["unset", "unset", "unlimited", "unset", "127.0.0.1"]
    assert (bench.root / "site" / "scontrol.failed").exists()


def test_renamed_job_is_known_by_its_token(bench: Workbench, slurm: SlurmCluster) -> None:
    run = bench.submit("named", "cluster.runtime.python=/bin/true", "resources.extra_sbatch=[--hold]")
    job = bench.status(run)["job"]
    slurm.run(["scontrol", "update", f"JobId={job}", "JobName=another"])
    assert (bench.state(run), bench.status(run)["job"]) == ("HELD", job)
    assert bench.launcher("resubmit", str(run.root), check=False).returncode == ExitCode.CONFLICT
    assert jobs_named(bench, "named") == []
    bench.launcher("cancel", str(run.root))
    assert bench.state(run) == "CANCELLED"


def test_nodes_that_do_not_exist(bench: Workbench, tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    named = bench.launcher("nodes", "add", "node99", "--cluster=slurm-dev", "--why=typo", check=False, env=env)
    assert (named.returncode, "node99: no node of cluster slurm-dev" in named.stderr) == (ExitCode.BAD_INPUT, True)
    bench.launcher("nodes", "add", "node[1-2]", "--cluster=slurm-dev", "--why=fan", env=env)
    shown = json.loads(bench.launcher("nodes", "--json", env=env).stdout)
    assert {row["host"] for row in shown} == {"node1", "node2"}
    Ledger(_ledger(tmp_path)).add([by_hand("node99", "gone since", 1)])
    words = ["name=kept", "cluster.runtime.python=/bin/true", "resources.extra_sbatch=[--hold]"]
    said = bench.launcher("submit", str(bench.config), *words, env=env).stderr
    assert "not excluded, since the cluster has no such node: node99" in said
    job = read_manifest(RunPaths(bench.root / "runs" / "kept")).jobs[0].id.text
    assert "ExcNodeList=node[1-2] " in bench.cluster.run(["scontrol", "show", "job", "-o", job]).stdout


def _ledger(tmp_path: Path) -> Path:
    return tmp_path / "state" / "slurm-sft-launcher" / "nodes" / f"{ClusterSpec(name='slurm-dev').name}.json"
