"""A run that goes on at another cluster: what its user wrote stays, the rest is of that cluster's file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.contract.rundir import RunPaths
from launcher.contract.spec import ResourcesSpec, RunSpec
from launcher.submission.lockfile import submission_of_lockfile
from launcher.submission.resubmit import child_submission
from launcher.submission.submission import Submission, make_submission
from launcher.submission.submit import prepare
from tests.launcher.conftest import CONFIG

OLD = """\
scheduler: slurm
resources:
  {account: a123, partition: gpu, qos: normal, constraint: a100, time: "24:00:00", cpus_per_task: 16, exclusive: true,
   gpus_per_node: 8, memory_per_node: 900G, extra_sbatch: [--switches=1], signal_seconds: 60}
"""
FAR = "scheduler: slurm\nresources: {partition: big, account: far-1, gpus_per_node: 4, cpus_per_task: 12}\n"
"""It has neither a quality of service nor features, and nodes of half the GPUs."""

GoesOn = Callable[[RunPaths, str], RunSpec]


@pytest.fixture
def clusters(workdir: Path, tmp_path: Path) -> Path:
    """The folder of cluster files, with old and far. The run's config asks for two nodes and a time limit."""
    folder = tmp_path / ".config" / "slurm-sft-launcher" / "cluster_configs"
    folder.mkdir(parents=True)
    (folder / "old.yaml").write_text(OLD)
    (folder / "far.yaml").write_text(FAR)
    config = CONFIG.replace("{tasks_per_node: 2, time: 1:30:00}", "{nodes: 2, time: 1:30:00}")
    Path("cfg.yaml").write_text(config.replace("batch_size: 4}", "batch_size: 16}"))
    return folder


def made(submission: Submission) -> RunPaths:
    prepare(submission, ["launcher"], "")
    return submission.paths


def child(paths: RunPaths, cluster: str) -> RunSpec:
    return child_submission(paths, [], cluster).spec


def again(paths: RunPaths, cluster: str) -> RunSpec:
    return submission_of_lockfile(paths.lock, [], cluster)[0].spec


@pytest.mark.parametrize("goes_on", [child, again])
def test_what_the_old_clusters_file_gave_is_left_behind(clusters: Path, goes_on: GoesOn) -> None:
    """Seen to ask for the old cluster's partition and account, which the new one does not have."""
    run = made(make_submission(Path("cfg.yaml"), ["resources.account=ours", "resources.exclusive=true"], "old"))
    found = goes_on(run, "far")
    assert found.cluster.name == "far"
    assert found.resources == ResourcesSpec(
        nodes=2, time="1:30:00", account="ours", exclusive=True, partition="big", gpus_per_node=4, cpus_per_task=12
    )


@pytest.mark.parametrize("goes_on", [child, again])
def test_what_the_user_wrote_stays_even_where_it_is_the_default(clusters: Path, goes_on: GoesOn) -> None:
    """The record tells it from what nobody wrote, which a resolved config does not."""
    (clusters / "far.yaml").write_text(FAR.replace("{", "{exclusive: true, qos: low, "))
    run = made(make_submission(Path("cfg.yaml"), ["resources.exclusive=false", "resources.partition=null"], "old"))
    found = goes_on(run, "far").resources
    assert (found.exclusive, found.partition, found.qos) == (False, None, "low")


def test_sizes_stay_where_the_new_file_gives_none(clusters: Path) -> None:
    (clusters / "far.yaml").write_text("scheduler: slurm\nresources: {partition: big}\n")
    run = made(make_submission(Path("cfg.yaml"), [], "old"))
    assert child(run, "far").resources == ResourcesSpec(nodes=2, time="1:30:00", gpus_per_node=8, partition="big")


def test_a_child_knows_what_its_parents_user_wrote(clusters: Path) -> None:
    """It may go on at a third cluster, or back. On the same one nothing changes."""
    first = made(make_submission(Path("cfg.yaml"), ["resources.account=ours"], "old"))
    stays = child_submission(first, ["resources.cpus_per_task=3", "name=second"], None)
    was = make_submission(Path("cfg.yaml"), ["resources.account=ours", "resources.cpus_per_task=3"], "old")
    assert stays.spec.resources == was.spec.resources
    assert (stays.config.sources["resources.partition"], stays.config.sources["resources.nodes"]) == ("cluster", "file")
    found = child(made(stays), "far").resources
    assert (found.account, found.cpus_per_task, found.partition, found.qos) == ("ours", 3, "big", None)


def test_runs_of_earlier_versions_keep_what_is_not_a_default(clusters: Path) -> None:
    """They have no record of who wrote what."""
    run = made(make_submission(Path("cfg.yaml"), [], "old"))
    manifest = json.loads(run.manifest.read_text())
    del manifest["given_resources"]
    run.manifest.write_text(json.dumps(manifest))
    second = child_submission(run, ["name=second"], "far")
    assert (second.spec.resources.partition, second.spec.resources.gpus_per_node) == ("gpu", 8)
    assert second.config.given_resources is None
