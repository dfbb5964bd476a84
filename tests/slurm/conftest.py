"""One cluster for all Slurm tests of a session; skipped with the reason where none can be started."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launcher.contract.rundir import RunPaths
from tests.slurm.cluster import SlurmCluster, why_unavailable
from tests.slurm.matrix import TWO_RANKS, wait_for_end
from tests.slurm.runs import Workbench, make_workbench


@pytest.fixture(scope="session")
def slurm_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """The session's cluster; tests take `slurm`, which leaves its queue empty."""
    reason = why_unavailable()
    if reason:
        pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_session: SlurmCluster) -> Iterator[SlurmCluster]:
    """A cluster of four idle nodes."""
    yield slurm_session
    slurm_session.cancel_all()


@pytest.fixture
def slurm_with_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster of two nodes of its own, with slurmdbd and MariaDB behind it."""
    reason = why_unavailable(accounting=True)
    if reason:
        pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurmdbd"), nodes=2, accounting=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def bench(slurm_session: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_workbench(tmp_path_factory.mktemp("runs"), slurm_session)


@pytest.fixture(scope="session")
def uninterrupted(bench: Workbench) -> RunPaths:
    """The run that the others are compared with; on its way it is seen in each state."""
    blocker = bench.cluster.run(["sbatch", "--parsable", "-N4", "--exclusive", "-o/dev/null", "--wrap", "sleep 300"])
    bench.cluster.wait_for_job(blocker.stdout.strip(), {"RUNNING"})
    run = bench.submit("uninterrupted", "logging.plot=true")
    bench.wait_for_state(run, "PENDING")
    bench.cluster.run(["scancel", blocker.stdout.strip()])
    bench.wait_for_state(run, "RUNNING")
    bench.wait_for_state(run, "COMPLETED")
    return run


@pytest.fixture(scope="session")
def undisturbed(bench: Workbench) -> RunPaths:
    """The same run with one rank on each node."""
    return wait_for_end(bench, bench.submit("undisturbed", *TWO_RANKS))
