"""GPU hours of runs: what the accounting says, what the runs' own events say, and what was wasted."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.rundir import RunPaths, append_line
from launcher.contract.spec import ClusterSpec, ResourcesSpec, RestartSpec, RunSpec, read_resolved, sealed
from launcher.scheduler.slurm.accounts import gpus_in, parse_uses
from tests.launcher.conftest import Commands
from tests.launcher.runs.test_state import make_run, silent
from tests.schemas import problems

__all__ = ["silent"]

pytestmark = pytest.mark.handmade_records

BEGAN = 1_700_000_000.0


def run_of(root: Path, name: str, job: str, *, submitted_at: float = BEGAN) -> RunPaths:
    """A run on two nodes of four GPUs."""
    paths = make_run(root, name, job_id=job, submitted_at=submitted_at, token=f"sft-{job:0>32}")
    resources = ResourcesSpec(nodes=2, gpus_per_node=4, account=f"{name}-account")
    cluster = ClusterSpec(name="far", scheduler="slurm")
    paths.config.write_text(sealed(RunSpec(name=name, run_root=str(root), resources=resources, cluster=cluster)))
    return paths


def tell(paths: RunPaths, attempt: str, at: float, event: str, **fields: object) -> None:
    append_line(paths.events, {"time": BEGAN + at, "event": event, "attempt": attempt, **fields})


def attempt(
    paths: RunPaths, name: str, begin: float, end: float, *, saves: tuple[float, ...] = (), code: int = 0
) -> None:
    cause = {0: "done", 75: "timeout", 76: "hang"}.get(code, "user_code")
    tell(paths, name, begin, "attempt_started", job_id=name.partition(".")[0], nodes="node[1-2]")
    tell(paths, name, begin + 10, "training_started", step=0, max_steps=9)
    for at in saves:
        tell(paths, name, at, "checkpoint_saved", step=1)
    tell(paths, name, end, "restart_decided", cause=cause, decision="stop", exit_code=code)
    tell(paths, name, end, "attempt_ended", exit_code=code)


def usage(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> dict[str, dict[str, float]]:
    """The sums of `usage --json`, and under `total` the whole."""
    capsys.readouterr()
    assert main(["--debug", "usage", "--run-root", str(root), "--json", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert problems("usage", told) == []
    assert sum(use["gpus"] * use["seconds"] / 3600 for use in told["attempts"]) == pytest.approx(
        told["total"]["gpu_hours"]
    )
    return {one.pop("word"): one for one in (*told["sums"], told["total"])}


def test_hours_by_events(tmp_path: Path, silent: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight GPUs: what follows the last checkpoint of an attempt that failed is wasted."""
    run = run_of(tmp_path, "a", "7")
    attempt(run, "7.0", 0, 3600, saves=(900, 1800), code=76)  # the half hour behind the second save
    attempt(run, "7.1", 3600, 5400, saves=(4500,))  # it succeeded
    other = run_of(tmp_path, "b", "8")
    attempt(other, "8.0", 0, 1800, code=1)  # nothing was saved
    sums = usage(capsys, tmp_path)
    assert {word: (one["gpu_hours"], one["wasted_gpu_hours"]) for word, one in sums.items()} == {
        "a": (12.0, 4.0),
        "b": (4.0, 4.0),
        "total": (16.0, 8.0),
    }
    assert {word: one["gpu_hours"] for word, one in usage(capsys, tmp_path, "--by=cause").items()} == {
        "hang": 8.0,
        "done": 4.0,
        "user_code": 4.0,
        "total": 16.0,
    }
    assert set(usage(capsys, tmp_path, "--by=state")) == {"FAILED", "COMPLETED", "total"}
    accounts = usage(capsys, tmp_path, "--by=resources.account")
    assert {word: one["gpu_hours"] for word, one in accounts.items()} == {
        "a-account": 12.0,
        "b-account": 4.0,
        "total": 16.0,
    }
    assert usage(capsys, tmp_path, "a", "--by=user") == {"me": sums["a"], "total": sums["a"]}


def test_work_that_a_restart_inside_of_an_attempt_lost(
    tmp_path: Path, silent: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, "a", "7")
    tell(run, "7.0", 1900, "rewound", step=0, checkpoint="x")  # 900 s behind the save
    tell(run, "7.0", 2000, "training_started", step=0, max_steps=9)  # 100 s more
    attempt(run, "7.0", 0, 3600, saves=(1000, 2500))
    assert usage(capsys, tmp_path)["a"]["wasted_gpu_hours"] == pytest.approx(8 * 1000 / 3600)


SACCT = "JobID|State|ElapsedRaw|Start|End|NNodes|AllocTRES|SubmitLine"


def test_hours_by_accounting(tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    """Each start of a job counts, also one that the run knows nothing of. Another job of the same id does not."""
    commands.add("squeue", "")

    def line(at: float, seconds: int, gpus: int, token: str, state: str = "COMPLETED") -> str:
        begin, end = (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(BEGAN + add)) for add in (at, at + seconds))
        return f"7|{state}|{seconds}|{begin}|{end}|2|cpu=4,gres/gpu={gpus},node=2|sbatch --comment={token} job.sh"

    own = f"sft-{'7':0>32}"
    lines = [
        SACCT,
        line(-9e5, 3600, 8, own),
        line(0, 3600, 8, own, "REQUEUED"),
        line(3600, 1800, 8, own),
        line(5400, 900, 8, own, "NODE_FAIL"),
        line(9000, 3600, 8, f"sft-{'9':0>32}"),
        "7|PENDING|0|Unknown|Unknown|2||sbatch",
    ]
    commands.add("sacct", "cat <<'E'\n" + "\n".join(lines) + "\nE")
    run = run_of(tmp_path, "a", "7")
    attempt(run, "7.0", 5, 3590, saves=(1800,), code=76)
    attempt(run, "7.1", 3605, 5400)
    total = usage(capsys, tmp_path)["total"]
    assert (total["gpu_hours"], total["attempts"]) == (8 + 4 + 2, 3)
    assert total["wasted_gpu_hours"] == 4 + 2
    assert set(usage(capsys, tmp_path, "--by=state")) == {"REQUEUED", "COMPLETED", "NODE_FAIL", "total"}
    assert len(commands.calls("sacct")) <= 4  # one for states and one for hours, each time


def test_restarts_in_place_share_an_allocation(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spare nodes included, with accounting or without."""
    commands.add("squeue", "")
    begin, end = (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(BEGAN + at)) for at in (0, 3600))
    line = f"7|COMPLETED|3600|{begin}|{end}|3|cpu=6,gres/gpu=12,node=3|sbatch --comment=sft-{'7':0>32} job.sh"
    run = run_of(tmp_path, "a", "7")
    spec = read_resolved(run.config)
    resources, how = dataclasses.replace(spec.resources, spare_nodes=1), RestartSpec(how="in_place")
    run.config.write_text(sealed(dataclasses.replace(spec, resources=resources, restart=how)))
    attempt(run, "7.0", 0, 1000, saves=(700,), code=76)
    attempt(run, "7.0-1", 1000, 1900, saves=(1800,), code=76)
    attempt(run, "7.0-2", 1900, 3600)
    wasted = 12 * (300 + 100) / 3600
    disabled = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
    for answer in (f"cat <<'E'\n{SACCT}\n{line}\nE", disabled):
        commands.add("sacct", answer)
        total = usage(capsys, tmp_path)["total"]
        assert (total["gpu_hours"], total["attempts"]) == (12, 3)
        assert total["wasted_gpu_hours"] == pytest.approx(wasted)


def test_an_allocation_with_restarts_in_place(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its time is shared out among its attempts, and none is counted twice."""
    commands.add("squeue", "")
    begin, end = (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(BEGAN + add)) for add in (0, 3600))
    commands.add("sacct", f"printf '{SACCT}\\n7|COMPLETED|3600|{begin}|{end}|2|gres/gpu=8|x\\n'")
    run = run_of(tmp_path, "a", "7")
    attempt(run, "7.0", 5, 900, saves=(450,), code=76)
    tell(run, "7.0-1", 910, "attempt_started", job_id="7")
    tell(run, "7.0-1", 3590, "attempt_ended", exit_code=0)
    sums = usage(capsys, tmp_path, "--by=state")
    assert {word: (one["gpu_hours"], one["wasted_gpu_hours"]) for word, one in sums.items()} == {
        "COMPLETED": (pytest.approx(8 * 2690 / 3600), 0.0),
        "FAILED": (pytest.approx(8 * 910 / 3600), pytest.approx(8 * 460 / 3600)),
        "total": (pytest.approx(8.0), pytest.approx(8 * 460 / 3600)),
    }


def test_a_run_that_runs_and_one_that_died_silently(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.add("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    commands.add("squeue", "echo '8|RUNNING|None|2026-01-01T00:00:00|b|sft-00000000000000000000000000000008'")
    dead = run_of(tmp_path, "a", "7")
    tell(dead, "7.0", 0, "attempt_started", job_id="7")
    tell(dead, "7.0", 1800, "checkpoint_saved", step=1)
    now = time.time() - BEGAN
    live = run_of(tmp_path, "b", "8", submitted_at=time.time() - 3600)
    tell(live, "8.0", now - 3600, "attempt_started", job_id="8")
    sums = usage(capsys, tmp_path)
    assert (sums["a"]["gpu_hours"], sums["a"]["wasted_gpu_hours"]) == (4.0, 0.0)
    assert sums["b"]["gpu_hours"] == pytest.approx(8.0, abs=0.1)
    assert sums["b"]["wasted_gpu_hours"] == 0.0
    assert set(usage(capsys, tmp_path, "--by=cause")) == {"running", "unknown", "total"}


def test_table_and_refusals(tmp_path: Path, silent: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--run-root", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "no attempt has started\n")
    attempt(run_of(tmp_path, "a", "7"), "7.0", 0, 3600, saves=(1800,), code=1)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text("{")
    assert main(["usage", "--run-root", str(tmp_path)]) == 0
    said = capsys.readouterr()
    head, row, total, source = said.out.splitlines()
    assert head.split() == ["RUN", "ATTEMPTS", "NODE", "HOURS", "GPU", "HOURS", "WASTED"]
    assert row.split() == ["a", "1", "2.00", "8.00", "4.00", "50%"]
    assert total.split()[0] == "total"
    assert source == "from the runs' own events"
    assert said.err.startswith("not counted: odd: ")
    assert main(["usage", "--run-root", str(tmp_path), "--by=resources.acc0unt"]) == 2
    assert "did you mean 'resources.account'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [
        ("billing=2,cpu=2,gres/gpu:h100=8,gres/gpu=8,mem=1G,node=2", 8),
        ("cpu=2,gres/gpu:a=2,gres/gpu:b=3", 5),
        ("cpu=2,node=1", None),
        ("", None),
        ("gres/gpumem=80G,gres/gpuutil=3", None),
    ],
)
def test_gpus_of_an_allocation(resources: str, gpus: int | None) -> None:
    assert gpus_in(resources) == gpus


@pytest.mark.parametrize(
    "text", ["", "JobID|State", f"{SACCT}\n7", f"{SACCT}\n7|X|y|2026-99-01T00:00:00|||", "|||\n|||"]
)
def test_odd_answers_of_sacct(text: str) -> None:
    assert list(parse_uses(text)) == []
