"""The ledger of bad nodes: what counts as evidence, for how long, how many nodes, and concurrent writers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.__main__ import main
from launcher.contract.errors import LauncherError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, append_event
from launcher.contract.spec import ClusterSpec, RunSpec, to_yaml
from launcher.runs import excluded_nodes
from launcher.runs.excluded_nodes import Entry, Ledger, by_hand, excluded
from tests.launcher.conftest import Commands

CHECKOUT = Path(__file__).parents[3]


def entry(host: str, kind: excluded_nodes.Kind = "preflight", when: float = 0.0, attempt: str = "1.0") -> Entry:
    now = time.time() + when
    return Entry(host=host, kind=kind, why="w", time=now, expires=now + 1000, attempt=attempt)


def test_one_failed_preflight_excludes_and_two_hangs_do() -> None:
    assert excluded([entry("a"), entry("b", "hang")], 9) == ["a"]
    assert excluded([entry("b", "hang"), entry("b", "hang", attempt="2.0")], 9) == ["b"]


def test_cap_keeps_the_newest() -> None:
    assert excluded([entry("a", when=-9), entry("c", when=-1), entry("b", when=-5)], 2) == ["b", "c"]
    assert excluded([entry("a")], 0) == []


def test_entries_lapse_and_repeats_count_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x" / "c.json")
    ledger.add([entry("a"), entry("a"), dataclasses.replace(entry("old"), expires=time.time() - 1)])
    assert [known.host for known in ledger.entries()] == ["a"]
    assert ledger.clear("a") == 1
    assert ledger.entries() == []


def test_a_ledger_is_the_same_file_from_every_folder(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "home" / "cluster_configs" / "site.yaml"
    site.parent.mkdir(parents=True)
    monkeypatch.setenv("SFT_LAUNCHER_HOME", str(tmp_path / "home"))
    site.write_text("scheduler: slurm\nnode_ledger: nodes.json\n")
    why = "node_ledger: 'nodes.json' is not a path from / or ~ on; what it is relative to would depend on where"
    assert main(["nodes", "list", "--cluster", "site"]) == ExitCode.BAD_INPUT
    assert f"{site}:2: {why}" in capsys.readouterr().err
    assert main(["validate", "cfg.yaml", "--cluster", "site"]) == ExitCode.BAD_INPUT
    assert f"{site}:2: cluster.{why}" in capsys.readouterr().err
    for path in (f"{tmp_path}/nodes.json", "~/nodes.json"):
        site.write_text(f"scheduler: slurm\nnode_ledger: {path}\n")
        assert main(["nodes", "list", "--cluster", "site"]) == 0


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("[{}]")
    with pytest.raises(LauncherError, match="is not a ledger of nodes"):
        Ledger(tmp_path / "c.json").add([entry("a")])
    assert (tmp_path / "c.json").read_text() == "[{}]"


def test_writers_side_by_side_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from launcher.runs.excluded_nodes import Ledger, by_hand\n"
        "for n in range(20): Ledger(Path(sys.argv[1])).add([by_hand(f'{sys.argv[2]}-{n}', 'w', 1)])"
    )
    path = tmp_path / "c.json"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), who], cwd=CHECKOUT) for who in "abc"]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert len(Ledger(path).entries()) == 60


def make_run(root: Path, cluster: str, *events: dict[str, Any]) -> RunPaths:
    paths = RunPaths(root)
    root.mkdir(parents=True)
    paths.config.write_text(to_yaml(RunSpec(name=root.name, cluster=ClusterSpec(name=cluster, scheduler="slurm"))))
    for event in events:
        append_event(paths, **event)
    return paths


PREFLIGHT = {
    "event": "preflight_failed",
    "attempt": "1.0",
    "nodes": [{"host": "n1", "checks": [{"name": "gpus", "detail": "ECC"}]}],
}


def hang(*hosts: str, told_apart: bool = True) -> dict[str, Any]:
    behind = [{"rank": rank, "host": host} for rank, host in enumerate(hosts)]
    return {"event": "hang_detected", "attempt": "2.0", "step": 7, "told_apart": told_apart, "behind": behind}


@pytest.mark.handmade_records
def test_events_of_this_cluster_s_runs_are_evidence(tmp_path: Path) -> None:
    cluster = ClusterSpec(name="c", node_ledger=str(tmp_path / "ledger.json"))
    runs = [
        make_run(tmp_path / "r1", "c", PREFLIGHT, hang("n2")),
        make_run(tmp_path / "r2", "c", hang("n3", "n4"), hang("n5", told_apart=False)),
        make_run(tmp_path / "r3", "another", PREFLIGHT | {"nodes": [{"host": "n6", "checks": []}]}),
    ]
    for _ in range(2):
        excluded_nodes.learn(runs, cluster)
        found = excluded_nodes.ledger_of(cluster).entries()
        assert [(known.host, known.kind, known.why) for known in found] == [
            ("n1", "preflight", "gpus: ECC"),
            ("n2", "hang", "rank 0 hung after step 7"),
        ]
    assert excluded_nodes.exclude_option(cluster, "x[1-3]") == "x[1-3],n1"
    assert excluded_nodes.exclude_option(dataclasses.replace(cluster, max_excluded=0), None) is None


def test_command(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nodes"]) == 0
    assert capsys.readouterr().out == "no evidence against any node\n"
    assert main(["nodes", "add", "n7", "--cluster=slurm-dev", "--why=slow disk"]) == 0
    assert main(["nodes", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert (row["cluster"], row["host"], row["why"], row["excluded"]) == ("slurm-dev", "n7", "slow disk", True)
    assert main(["nodes", "--cluster=slurm-dev"]) == 0
    assert "slow disk" in capsys.readouterr().out
    assert main(["nodes", "clear", "n7", "--cluster=slurm-dev"]) == 0
    assert main(["nodes", "clear", "n7", "--cluster=slurm-dev"]) == ExitCode.CONFLICT
    assert main(["nodes", "add", "n7"]) == ExitCode.BAD_INPUT
    assert "needs a node and its cluster" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("scheduler: local", "it is this machine alone"),
        ("scheduler: slurm\nmax_excluded: 0", "its max_excluded is 0"),
        ("scheduler: slurm\nnode_days: 0", "its node_days is 0"),
    ],
)
def test_nothing_is_added_of_what_no_job_keeps_away_from(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str, why: str
) -> None:
    folder = tmp_path / ".config" / "slurm-sft-launcher" / "cluster_configs"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"{settings}\n")
    assert main(["nodes", "add", "n7", "--cluster=mine", "--why=slow disk"]) == ExitCode.BAD_INPUT
    assert f"nodes add has no effect on cluster mine: {why}" in capsys.readouterr().err
    assert excluded_nodes.ledger_of(ClusterSpec(name="mine")).entries() == []


def test_of_more_nodes_than_are_excluded_none_is_left_out_silently(
    workdir: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    """All were said to be kept away from, and the first four were."""
    commands.add("sinfo", "printf 'n1\nn2\nn3\nn4\nn5\nn6\n'")
    commands.add("scontrol", 'echo "$3" | tr , "\n"')
    add = ["nodes", "add", "--cluster=slurm-dev", "--why=fan"]
    assert main([*add, "n1,n2,n3,n4,n5"]) == ExitCode.BAD_INPUT
    assert "5 nodes, and jobs of cluster slurm-dev keep away from at most 4; raise" in capsys.readouterr().err
    assert main([*add, "n1,n2,n3"]) == main([*add, "n4"]) == 0
    assert "used again" not in capsys.readouterr().out
    assert main([*add, "n5,n6"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("kept away from for 3 days: n5, n6\nused again, as max_excluded of slurm-dev is 4: n")
    assert len(shown.splitlines()[1].rpartition(": ")[2].split(", ")) == 2


def test_submit_keeps_away_and_says_so(workdir: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ClusterSpec(name="slurm-dev")
    excluded_nodes.ledger_of(cluster).add([by_hand("n7", "slow", 1)])
    commands.add("srun", "")
    commands.add("sbatch", "echo 5")
    assert main(["submit", "cfg.yaml", "--cluster=slurm-dev", "resources.exclude=n[1-2]"]) == 0
    assert "--exclude=n[1-2],n7" in commands.calls("sbatch")[0]
    assert "excluded   n7 (see `launcher nodes --cluster slurm-dev`)" in capsys.readouterr().out


def test_names_are_compared_with_those_of_the_cluster(
    workdir: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.add("sinfo", "printf 'n1\\nn2\\nn1\\n'")
    commands.add("scontrol", 'echo "$3" | sed "s/n\\[1-2\\]/n1\\nn2/"')
    why = ["--cluster=slurm-dev", "--why=fan"]
    assert main(["nodes", "add", "node99", *why]) == ExitCode.BAD_INPUT
    assert "node99: no node of cluster slurm-dev" in capsys.readouterr().err
    assert main(["nodes", "add", "n[1-2]", *why]) == 0
    assert main(["nodes", "--json"]) == 0
    assert [row["host"] for row in json.loads(capsys.readouterr().out.partition("\n")[2])] == ["n1", "n2"]
    assert main(["nodes", "clear", "n[1-2]", "--cluster=slurm-dev"]) == 0
    assert excluded_nodes.ledger_of(ClusterSpec(name="slurm-dev")).entries() == []


def test_nodes_that_are_gone_are_not_excluded(
    workdir: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    excluded_nodes.ledger_of(ClusterSpec(name="slurm-dev")).add([by_hand("n1", "slow", 1), by_hand("gone", "old", 1)])
    for name, body in (("srun", ""), ("sbatch", "echo 5"), ("sinfo", "echo n1")):
        commands.add(name, body)
    assert main(["submit", "cfg.yaml", "--cluster=slurm-dev"]) == 0
    assert "--exclude=n1 " in commands.calls("sbatch")[0]
    assert "not excluded, since the cluster has no such node: gone" in capsys.readouterr().err
