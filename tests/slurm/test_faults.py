"""The fault matrix: a run that is interfered with ends with the loss curve of one that was not, bit by bit.

Rows are worked on some at a time, each by a function that interferes; the test behind it says what must have come of
it: the curve, the cause of each interruption, and the decision that followed, which is what `status --why` tells.
All of it once more on a cluster with sacct is `slow`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths
from launcher.submission.unchanged import digests
from tests.slurm.cluster import SlurmCluster, why_unavailable
from tests.slurm.matrix import (
    PATIENCE,
    TWO_RANKS,
    Matrix,
    Row,
    decided,
    job_of,
    rank_processes,
    rank_python,
    start_launcher,
    started_after,
    stopped_after,
    wait_for_decisions,
    wait_for_end,
)
from tests.slurm.processes import wait_until
from tests.slurm.runs import STEPS, Curve, Workbench, events, loss_curve, make_workbench, wait_for_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

ALONE = "resources.exclusive=true"
"""For faults of a whole node, which must not hit another row's run."""


@pytest.fixture(scope="module", params=["without-sacct", pytest.param("with-sacct", marks=pytest.mark.slow)])
def matrix(
    request: pytest.FixtureRequest,
    uninterrupted: RunPaths,
    undisturbed: RunPaths,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Matrix]:
    """The rows of the chosen tests, under way. Those of slow tests come later: other tests are between."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    is_slow = _is_slow(request._pyfuncitem)
    chosen: list[dict[str, Any]] = [item.callspec.params for item in items if _is_slow(item) == is_slow]
    rows: list[Row] = [params["run"] for params in chosen if params["matrix"] == request.param and "run" in params]
    with contextlib.ExitStack() as stack:
        if request.param == "with-sacct":
            if reason := why_unavailable(accounting=True):
                pytest.skip(reason)
            cluster = stack.enter_context(SlurmCluster(tmp_path_factory.mktemp("slurmdbd"), accounting=True))
        else:
            cluster = request.getfixturevalue("slurm_session")
            stack.callback(cluster.cancel_all)
        started = Matrix(make_workbench(tmp_path_factory.mktemp("faults"), cluster), rows)
        stack.callback(started.stop)
        yield started


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


@pytest.fixture
def run(request: pytest.FixtureRequest, matrix: Matrix) -> RunPaths:
    """The run of the test's row."""
    return matrix.run(request.param)


def row(function: Row) -> pytest.MarkDecorator:
    """The row that a test looks at."""
    return pytest.mark.parametrize("run", [function], indirect=True, ids=[""])


@pytest.fixture
def curve(undisturbed: RunPaths) -> Curve:
    """What two undisturbed ranks arrive at."""
    return loss_curve(undisturbed)


def why(run: RunPaths) -> str:
    """What `status --why` says; that it tells each cause and each decision holds for every run."""
    told = subprocess.run(
        [sys.executable, "-m", "launcher", "status", "--why", str(run.root)], capture_output=True, text=True, check=True
    ).stdout
    for cause, decision in decided(run):
        assert re.search(rf"cause: {cause.replace('_', ' ')} \(.+\)\n +decision: {decision}", told), told
    return told


def killed_rank(bench: Workbench) -> RunPaths:
    """The last rank is killed, while somebody follows the logs."""
    run = bench.submit("killed-rank", *TWO_RANKS)
    follower = start_launcher(bench, run.root / "followed.txt", "logs", "--follow", str(run.root))
    wait_for_checkpoint(run, PATIENCE)
    os.kill(rank_python(job_of(run), rank=1, ranks=2), signal.SIGKILL)
    wait_for_end(bench, run)
    assert follower.wait(timeout=120) == 0
    return run


@row(killed_rank)
def test_killed_rank(run: RunPaths, curve: object) -> None:
    assert decided(run) == [("unknown", "requeue"), ("done", "stop")]
    assert loss_curve(run) == curve
    assert "killed by signal 9" in why(run)
    assert "this restart is free [2 of 2 restarts left]" in why(run)
    assert not run.lease.exists()


@row(killed_rank)
def test_logs_are_followed_across_a_requeue(run: RunPaths) -> None:
    followed = (run.root / "followed.txt").read_text()
    for event in events(run, "attempt_ended"):
        assert f"attempt {event['attempt']} ended with exit code {event['exit_code']}" in followed
    assert f"step {STEPS}/{STEPS}" in followed


def lost_batch_node(bench: Workbench) -> RunPaths:
    """The node of the batch script takes with it who could say how it ended."""
    run = bench.submit("lost-node", *TWO_RANKS, ALONE)
    wait_for_checkpoint(run, PATIENCE)
    lost = bench.cluster.nodes_of(job_of(run))[0]
    bench.cluster.kill_node(lost)
    try:
        return wait_for_end(bench, run)
    finally:
        bench.cluster.start_node(lost)


@row(lost_batch_node)
def test_lost_batch_node(run: RunPaths, curve: object) -> None:
    """The next attempt judges the lost one, and takes its lease."""
    assert decided(run) == [("node_failure", "leave"), ("done", "stop")]
    assert len(events(run, "lease_taken_over")) == 1
    assert "went down while it ran" in why(run)
    assert loss_curve(run) == curve


def preempted(bench: Workbench) -> RunPaths:
    run = bench.submit("preempted", *TWO_RANKS, ALONE)
    wait_for_checkpoint(run, PATIENCE)
    node = bench.cluster.nodes_of(job_of(run))[0]
    urgent = ["--partition=urgent", f"--nodelist={node}", "--output=/dev/null", "--wrap", "sleep 1"]
    bench.cluster.run(["sbatch", "-N1", "--exclusive", *urgent])
    return wait_for_end(bench, run)


@row(preempted)
def test_preemption(run: RunPaths, curve: object) -> None:
    """With notice: not a step is lost."""
    assert decided(run) == [("preempted", "leave"), ("done", "stop")]
    assert started_after(run) == [0, *stopped_after(run)]
    assert "stopped after step" in why(run)
    assert loss_curve(run) == curve


SHORT = ("resources.time=10", "resources.signal_seconds=590", "resources.extra_sbatch=[--signal=USR2@1]")
"""Ranks are to stop early enough for a save of as long as the whole job: so they do, after each step."""


def time_limit_requeue(bench: Workbench) -> RunPaths:
    run = bench.submit("time-requeue", *TWO_RANKS, *SHORT)
    wait_for_decisions(run, 2)
    longer = ["scontrol", "update", f"JobId={job_of(run)}", "TimeLimit=100"]
    wait_until(lambda: bench.cluster.run(longer, check=False).returncode == 0, "a longer limit", timeout=PATIENCE)
    return wait_for_end(bench, run, attempts=3)


def time_limit_resubmit(bench: Workbench) -> RunPaths:
    """The next job starts at once: what the third asks for is written down while the second is at work.

    With the digest, without which the run would not go on.
    """
    run = bench.submit("time-resubmit", *TWO_RANKS, *SHORT, "restart.how=resubmit")
    wait_until(lambda: len(events(run, "attempt_started")) == 2, "the second job", timeout=PATIENCE)
    before = digests(run)[run.script.name]
    run.script.write_text(run.script.read_text().replace("#SBATCH --time=10\n", "#SBATCH --time=100\n"))
    run.manifest.write_text(run.manifest.read_text().replace(before, digests(run)[run.script.name]))
    return wait_for_end(bench, run, attempts=3)


@row(time_limit_requeue)
def test_time_limit_twice(run: RunPaths, curve: object) -> None:
    """Ranks stop by themselves: the signal would come only a second before the end, and not a step is lost."""
    assert decided(run) == [("timeout", "requeue")] * 2 + [("done", "stop")]
    assert started_after(run) == [0, *stopped_after(run)]
    assert len({event["job_id"] for event in events(run, "attempt_started")}) == 1
    assert "the end of the job's time is near" in why(run)
    assert loss_curve(run) == curve


@pytest.mark.slow  # by default the requeued run stands for both: a chain of jobs differs in how the next one comes
@row(time_limit_resubmit)
def test_time_limit_twice_with_a_chain_of_jobs(run: RunPaths, curve: object) -> None:
    assert decided(run) == [("timeout", "resubmit")] * 2 + [("done", "stop")]
    assert started_after(run) == [0, *stopped_after(run)]
    assert len({event["job_id"] for event in events(run, "attempt_started")}) == 3
    assert why(run).count("by the run itself") == 2
    assert loss_curve(run) == curve


def cancelled_and_damaged(bench: Workbench) -> RunPaths:
    """scancel; then the newest checkpoint is cut short, and a person goes on."""
    run = bench.submit("scancelled", *TWO_RANKS)
    wait_until(lambda: len(run.complete_checkpoints()) == 2, "two checkpoints", timeout=PATIENCE, interval=0.05)
    bench.cluster.run(["scancel", job_of(run)])
    wait_for_end(bench, run, "CANCELLED")
    newest = run.complete_checkpoints()[-1]
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    bench.launcher("resubmit", str(run.root))
    return wait_for_end(bench, run, attempts=2)


@row(cancelled_and_damaged)
def test_scancel_then_resubmit_with_a_damaged_checkpoint(run: RunPaths, curve: object) -> None:
    assert decided(run) == [("cancelled", "stop"), ("done", "stop")]
    first, second = started_after(run)
    assert first == 0 < second < stopped_after(run)[0]
    assert loss_curve(run) == curve
    assert "a person ended it" in why(run)


def killed_launcher(bench: Workbench) -> RunPaths:
    """The launcher dies while sbatch is at work, the command is given again; then a second job goes behind its back."""
    folder = bench.root / "kills"
    folder.mkdir()
    real = bench.cluster.run(["which", "sbatch"]).stdout.strip()
    kill = "kill -9 \"$(cut -d' ' -f4 /proc/$PPID/stat)\""
    (folder / "sbatch").write_text(f'#!/bin/bash\n{real} "$@" >/dev/null || exit\n{kill}\n')
    (folder / "sbatch").chmod(0o755)
    path = {"PATH": f"{folder}:{bench.cluster.env['PATH']}"}
    words = ["submit", str(bench.config), "name=killed-launcher", *TWO_RANKS]
    submit = start_launcher(bench, folder / "output", *words, env=path)
    assert submit.wait(timeout=PATIENCE) == -signal.SIGKILL
    run = bench.submit("killed-launcher", *TWO_RANKS)
    wait_until(lambda: bool(events(run, "attempt_started")), "the job to begin", timeout=PATIENCE)
    second = bench.cluster.run(["sbatch", "--wait", str(run.script)], check=False, timeout=PATIENCE)
    # A busy sbatch may ask after Slurm has forgotten the job (MinJobAge); that it was refused is an event as well.
    assert second.returncode == ExitCode.CONFLICT or "no longer found" in second.stderr, second.stderr
    return wait_for_end(bench, run)


@row(killed_launcher)
def test_launcher_killed_in_mid_submit(run: RunPaths, curve: object) -> None:
    assert decided(run) == [("done", "stop")]
    assert len(events(run, "submitted")) == 1
    assert why(run).count("submitted as slurm job") == 1
    assert loss_curve(run) == curve


@row(killed_launcher)
def test_second_job_of_a_run_refuses(run: RunPaths) -> None:
    (started,) = events(run, "attempt_started")
    (refusal,) = events(run, "lease_refused")
    assert f"held by attempt {started['attempt']}" in refusal["reason"]
    assert f"attempt {refusal['attempt']} refused to start" in why(run)


def fill(disk: Path, left: int) -> None:
    """Leave `left` bytes, whatever the run writes meanwhile.

    Piece by piece: one that does not fit takes all room for a moment, in which a rank cannot even say why it ends.
    """
    with (disk / "filler").open("wb") as file:
        size = 0
        while (room := shutil.disk_usage(disk).free - left) > 0:
            piece = min(room, 2**18)
            os.posix_fallocate(file.fileno(), size, piece)
            size += piece


def full_disk(bench: Workbench) -> RunPaths:
    """A file system of 100 MB, with 1 MB left after the first checkpoint."""
    disk = bench.root / "disk"
    disk.mkdir()
    if bench.cluster.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)], check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        cache = f"data.cache_dir={bench.root / 'runs' / '.cache'}"
        bench.submit("full", *TWO_RANKS, f"run_root={disk}", cache)
        run = RunPaths(disk / "full")
        wait_for_checkpoint(run, PATIENCE)
        fill(disk, 2**20)
        wait_for_end(bench, run, "FAILED")
        (disk / "filler").unlink()
        bench.launcher("resubmit", str(run.root))
        wait_for_end(bench, run, attempts=2)
        kept = bench.run_paths("full")
        bench.cluster.run(["cp", "-r", str(run.root), str(kept.root)])
        return kept
    finally:
        bench.cluster.run(["umount", "--lazy", str(disk)])


@row(full_disk)
def test_full_disk(run: RunPaths, curve: object) -> None:
    """Nothing starts again by itself before somebody has made room."""
    assert decided(run) == [("disk_full", "stop"), ("done", "stop")]
    assert loss_curve(run) == curve
    assert "checkpoint.keep_last" in why(run)


def hanging_rank(bench: Workbench) -> RunPaths:
    """Four ranks, so that the stopped one has a neighbour on its node who sees it."""
    run = bench.submit(
        "hangs", "watchdog.floor_seconds=15", "watchdog.checkpoint_seconds=60", "checkpoint.export=false"
    )
    wait_for_checkpoint(run, PATIENCE)
    for pid in rank_processes(job_of(run), rank=3, ranks=4):
        os.kill(pid, signal.SIGSTOP)
    return wait_for_end(bench, run)


@pytest.mark.slow  # by default tests/sft/health stops a rank, and the rows above requeue a run
@row(hanging_rank)
def test_a_stopped_rank_is_named_and_the_run_goes_on(run: RunPaths, uninterrupted: RunPaths) -> None:
    (hang,) = events(run, "hang_detected")
    (behind,) = hang["behind"]
    assert (behind["rank"], behind["answered"]) == (3, False)
    assert "stopped" in behind["process"]
    first, _ = events(run, "attempt_ended")
    assert first["exit_code"] == ExitCode.HANG
    log = (run.logs / hang["attempt"] / "batch.log").read_text()
    assert f"rank 3 on {behind['host']} failed first, with exit code 76" in log
    for rank in range(3):
        assert "Thread 0x" in run.stacks(hang["attempt"], rank).read_text()
    assert decided(run) == [("hang", "requeue"), ("done", "stop")]
    assert "rank 3" in why(run)
    assert loss_curve(run) == loss_curve(uninterrupted)


def stopped_node(bench: Workbench) -> RunPaths:
    """The only rank of the second node, so that nobody on it is left."""
    run = bench.submit("stopped-node", *TWO_RANKS, "watchdog.floor_seconds=15")
    wait_for_checkpoint(run, PATIENCE)
    for pid in rank_processes(job_of(run), rank=1, ranks=2):
        os.kill(pid, signal.SIGSTOP)
    return wait_for_end(bench, run)


@pytest.mark.slow  # stopped processes that take each other for the rest of a node are in tests/sft/health
@row(stopped_node)
def test_a_node_whose_ranks_are_all_stopped_is_named_and_the_run_goes_on(run: RunPaths, curve: object) -> None:
    (hang,) = events(run, "hang_detected")
    (behind,) = hang["behind"]
    assert (behind["rank"], behind["answered"]) == (1, False)
    assert decided(run) == [("hang", "requeue"), ("done", "stop")]
    assert loss_curve(run) == curve


PYTHON_WITH_A_BAD_NODE = f"""#!/bin/bash
# Python on every node; where the first preflight's second task ran, with a /dev/shm too small, as containers have it.
bad=$(dirname "$0")/bad-host
[ "${{3-}} ${{SLURM_PROCID-}}" != 'preflight 1' ] || (set -C; echo "$SLURMD_NODENAME" >"$bad") 2>/dev/null
[ "${{SLURMD_NODENAME-}}" != "$(cat "$bad" 2>/dev/null)" ] ||
  exec unshare -m sh -c 'mount -t tmpfs -o size=8M tmpfs /dev/shm && exec "$@"' sh {sys.executable} "$@"
exec {sys.executable} "$@"
"""


def bad_node(bench: Workbench) -> RunPaths:
    """A ledger of its own, which keeps node4 away from the beginning; then a node fails the preflight."""
    folder = bench.root / "bad"
    folder.mkdir()
    python = folder / "python"
    python.write_text(PYTHON_WITH_A_BAD_NODE)
    python.chmod(0o755)
    state = {"XDG_STATE_HOME": str(folder / "state")}
    bench.launcher("nodes", "add", "node4", "--cluster=slurm-dev", "--why=fan", env=state)
    look = ("preflight.enabled=auto", "preflight.min_shm_mib=64", "preflight.timeout_seconds=240")
    words = (*TWO_RANKS, *look, f"cluster.runtime.python={python}", f"run_root={folder}")
    bench.submit("bad-node", *words, env=state)
    run = wait_for_end(bench, RunPaths(folder / "bad-node"))
    listed = bench.launcher("nodes", "--cluster=slurm-dev", f"--run-root={folder}", "--json", env=state).stdout
    (folder / "listed.json").write_text(listed)
    return run


@row(bad_node)
def test_a_bad_node_is_named_and_kept_away_from(run: RunPaths, curve: object) -> None:
    (failed,) = events(run, "preflight_failed")
    (node,) = failed["nodes"]
    assert [check["name"] for check in node["checks"]] == ["shm"]
    assert decided(run) == [("bad_node", "requeue"), ("done", "stop")]
    first, second = events(run, "attempt_started")
    assert first["job_id"] == second["job_id"]
    assert started_after(run) == [0]
    looks = [json.loads(run.preflight(event["attempt"]).read_text())["nodes"] for event in (first, second)]
    hosts = [{report["host"] for report in nodes} for nodes in looks]
    assert node["host"] in hosts[0]
    assert not hosts[1] & {node["host"], "node4"}
    assert f"{node['host']}  FAILED" in (run.logs / first["attempt"] / "batch.log").read_text()
    assert f"decision: requeue, avoiding {node['host']}" in why(run)
    listed = json.loads((run.root.parent / "listed.json").read_text())
    assert {(entry["host"], entry["kind"], entry["excluded"]) for entry in listed} == {
        ("node4", "by hand", True),
        (node["host"], "preflight", True),
    }
    assert loss_curve(run) == curve


METRIC_THAT_RAISES = """\
calls = []


def metric(*, samples, prompts, outputs):
    calls.append(1)
    if len(calls) == 2:
        raise ZeroDivisionError("the user's own mistake")
    return {"length": 1.0}
"""


def raising_metric(bench: Workbench) -> RunPaths:
    """Answers are asked for before the first step and after the seventh."""
    folder = bench.root / "raising"
    folder.mkdir()
    (folder / "users_metric.py").write_text(METRIC_THAT_RAISES)
    (folder / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    metric = ["evaluation.metric=users_metric:metric", f"evaluation.prompts={folder}/prompts.jsonl"]
    words = [*TWO_RANKS, *metric, "train.eval_every=7", "evaluation.max_new_tokens=1"]
    run = bench.submit("raising", *words, env={"PYTHONPATH": str(folder)})  # sbatch hands it on
    return wait_for_end(bench, run, "FAILED")


@row(raising_metric)
def test_user_code_that_raises_is_not_started_again(run: RunPaths, curve: Curve) -> None:
    assert decided(run) == [("user_code", "stop")]
    assert "ZeroDivisionError: the user's own mistake" in why(run)
    assert loss_curve(run) == {step: curve[step] for step in range(1, 8)}
    assert len(events(run, "attempt_started")) == 1


def test_restarted_controller(matrix: Matrix, curve: object) -> None:
    """The last one: while no other row needs the controller."""
    run = matrix.bench.submit("controller", *TWO_RANKS)
    wait_for_checkpoint(run, PATIENCE)
    matrix.bench.cluster.restart_controller()
    wait_for_end(matrix.bench, run)
    assert decided(run) == [("done", "stop")]
    assert started_after(run) == [0]
    assert "training finished" in why(run)
    assert loss_curve(run) == curve
