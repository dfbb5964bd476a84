"""The preflight: each check by itself, which nodes are blamed, and several tasks that really meet."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, read_json, read_lines
from launcher.contract.spec import PreflightSpec, RunSpec, to_yaml
from launcher.contract.versions import version_problems
from sft.health.preflight import checks
from sft.health.preflight.checks import Check
from sft.health.preflight.pairs import blame, rounds
from sft.health.preflight.report import Report, combine, table
from sft.health.preflight.run import _conclude
from tests.slurm.processes import free_ports

CHECKOUT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("body", "ok", "detail"),
    [
        ("printf '0, 0\\n1, [N/A]\\n'", True, "2 GPUs, no uncorrected ECC errors"),
        ("printf '0, 0\\n1, 3\\n'", False, "uncorrected ECC errors: GPU 1: 3"),
        ("printf '0, 0\\n'", False, "1 GPUs, and resources.gpus_per_node is 2"),
        ("echo 'driver mismatch'; exit 9", False, "nvidia-smi failed: driver mismatch"),
    ],
)
def test_gpus(body: str, ok: bool, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert checks.check_gpus(2) == Check(name="gpus", ok=ok, detail=detail)
    assert checks.check_gpus(0).detail == "skipped: CPU ranks"


def test_gpus_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(checks, "_NVIDIA_SMI_SECONDS", 0.2)
    assert "gave no answer" in checks.check_gpus(1).detail
    monkeypatch.setenv("PATH", "")
    assert checks.check_gpus(1).detail == "skipped: no nvidia-smi"


def test_shm(tmp_path: Path) -> None:
    assert checks.check_shm(1, tmp_path).ok
    assert not checks.check_shm(2**50, tmp_path).ok
    assert checks.check_shm(1, tmp_path / "absent").detail.endswith("No such file or directory")


def test_limits_of_a_shell(tmp_path: Path) -> None:
    """Tried in a child: a soft limit of CPU time cannot be taken back."""
    code = "from sft.health.preflight.checks import check_limits; print(check_limits())"

    def look(limit: str) -> str:
        command = ["bash", "-c", f"ulimit {limit}; exec {sys.executable} -c '{code}'"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT).stdout

    assert "ok=False" in look("-S -t 500") and "ulimit -t: 500 s" in look("-S -t 500")
    assert "ulimit -n: 100 open files, 1024 needed" in look("-S -n 100")
    assert "ok=True" in look("-S -c 0")


def test_run_directory(tmp_path: Path) -> None:
    assert checks.check_run_directory(tmp_path / "new", "n1", 0).ok
    assert not list((tmp_path / "new").iterdir())
    assert checks.check_run_directory(tmp_path, "n1", 1e9).fault == "run"
    if Path("/dev/full").exists():
        (tmp_path / ".preflight-n1.partial").symlink_to("/dev/full")
        full = checks.check_run_directory(tmp_path, "n1", 0)
        assert (full.ok, full.fault) == (False, "run")
        assert "No space left" in full.detail


def test_clock_is_judged_beyond_what_is_uncertain() -> None:
    assert checks.check_clock(7.0, 3.0, 5.0).ok
    assert not checks.check_clock(-9.0, 3.0, 5.0).ok


def test_versions_are_compared_with_what_most_nodes_have() -> None:
    reference = checks.most_common([{"torch": "2.9"}, {"torch": "2.8"}, {"torch": "2.9"}])
    assert reference == {"torch": "2.9"}
    assert checks.check_versions({"torch": "2.8"}, reference).detail == "torch 2.8, elsewhere 2.9"
    assert checks.most_common([{"torch": "2.8"}, {"torch": "2.9"}]) == {"torch": "2.8"}


def test_packages_that_do_not_work_are_the_runs_fault_where_most_nodes_have_them() -> None:
    good, bad = checks.check_packages({"python": "3.12.1"}), checks.check_packages({"torch": "2.1.0"})
    assert (good.ok, good.detail) == (True, "python 3.12.1")
    assert (bad.ok, bad.detail) == (False, version_problems({"torch": "2.1.0"})[0])
    one = combine([report(0, bad), report(1, good), report(2, good)], ["n0", "n1", "n2"])
    assert {check.fault for check in one["n0"]} == {"node"}
    most = combine([report(0, bad), report(1, bad), report(2, good)], ["n0", "n1", "n2"])
    assert {check.fault for found in most.values() for check in found if not check.ok} == {"run"}


@pytest.mark.parametrize("name", ["packages", "run directory"])
def test_a_fault_of_the_run_has_its_own_exit_code(name: str, tmp_path: Path) -> None:
    failed = Check(name=name, ok=False, detail="d", fault="run")
    code = _conclude(RunPaths(tmp_path), "7.0", {"n0": [failed]}, 1.0)
    assert code == {"packages": ExitCode.BAD_INPUT, "run directory": ExitCode.IO_ERROR}[name]


@given(st.integers(1, 40))
def test_rounds_are_disjoint_and_bring_new_partners(nodes: int) -> None:
    plan = rounds(nodes)
    pairs = [pair for pairs in plan for pair in pairs]
    assert len(pairs) == len(set(pairs))
    for round_pairs in plan:
        places = [place for pair in round_pairs for place in pair]
        assert len(places) == len(set(places)) == nodes // 2 * 2


@given(st.integers(4, 40), st.data())
def test_the_one_bad_node_is_blamed(nodes: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, nodes - 1))
    results = {pair: bad not in pair for pairs in rounds(nodes) for pair in pairs}
    assert set(blame(results, [])) == {bad}
    assert blame(results, [bad]) == {}


def test_a_pair_that_nothing_tells_apart() -> None:
    assert blame({(0, 1): False}, []) == {0: [1], 1: [0]}


def report(node: int, *extra: Check, version: str = "1", pairs: dict[int, str | None] | None = None) -> Report:
    return Report(node=node, host=f"n{node}", checks=list(extra), versions={"torch": version}, pairs=pairs or {})


def test_results_name_silent_nodes_and_shared_faults() -> None:
    full = Check(name="run directory", ok=False, detail="d")
    results = combine([report(0, full), report(1), report(3)], ["n0", "n1", "n2", "n3"])
    assert [host for host, found in results.items() if not all(check.ok for check in found)] == ["n0", "n2"]
    assert {check.fault for check in results["n0"]} == {"node"}
    assert "n2  FAILED\n" in table(results)
    assert "answer: no report in time" in table(results)
    everywhere = combine([report(0, full), report(1, full)], ["n0", "n1"])
    assert {check.fault for found in everywhere.values() for check in found if not check.ok} == {"run"}


def test_tasks_meet_and_a_missing_one_is_named(tmp_path: Path) -> None:
    """Four tasks, one of which never starts: the first one names it and exits 77."""
    paths = RunPaths(tmp_path)
    spec = RunSpec(name="a", preflight=PreflightSpec(timeout_seconds=24, min_shm_mib=1, min_disk_gib=0))
    paths.config.write_text(to_yaml(spec))
    (port,) = free_ports(1)
    processes = []
    for node in (0, 1, 3):
        env = {
            **os.environ,
            "PYTHONPATH": str(CHECKOUT),
            "PYTHONUNBUFFERED": "1",
            "SLURM_PROCID": str(node),
            "SLURM_NTASKS": "4",
            "SLURMD_NODENAME": f"n{node}",
            "SFT_HOSTS": "n0 n1 n2 n3",
            "SFT_ATTEMPT": "7.0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, "-m", "sft", "preflight", str(paths.config)]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [ExitCode.BAD_NODE, 0, 0], outputs
    (event,) = read_lines(paths.events)
    assert [node["host"] for node in event["nodes"]] == ["n2"], json.dumps(event)
    assert "n2  FAILED" in outputs[0]
    assert "\npackages: python 3." in outputs[0]
    saved = read_json(paths.preflight("7.0")) or {}
    pair_checks = [check for node in saved["nodes"] for check in node["checks"] if check["name"] == "all-reduce"]
    assert len(pair_checks) == 3 and all(check["ok"] and "with n" in check["detail"] for check in pair_checks)
