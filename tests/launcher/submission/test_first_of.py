"""`submit --first-of`: a job on each cluster or partition; whichever starts first has the run, and no other writes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.attempts.attempt import main as attempt
from launcher.contract import lease, race
from launcher.contract.exit_codes import ExitCode
from launcher.contract.manifest import read_manifest
from launcher.contract.records import read_events
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import read_resolved
from tests.launcher.scheduler.test_other_scheduler import Paper, paper, shown

__all__ = ["paper"]

SUBMIT = ["submit", "cfg.yaml", "--cluster=slurm-dev", "--first-of=fast,large"]
RUN = RunPaths(Path("runs/first"))


def begin(candidate: str, job: str, restart: int = 0) -> int:
    words = [str(RUN.root), f"--attempt={job}.{restart}", f"--job-id={job}", "--pid=1", f"--candidate={candidate}"]
    return attempt(["begin", *words])


def events(name: str) -> list[dict[str, object]]:
    return [event for event in read_events(RUN) if event["event"] == name]


def test_each_gets_a_job_and_the_first_to_start_has_the_run(
    paper: type[Paper], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SUBMIT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidates"] == {"fast": "1", "large": "2"}
    scripts = [request.script for request in paper.requests.values()]
    assert [script.parent.name for script in scripts] == ["fast", "large"]
    assert "#SBATCH --partition=large\n" in scripts[1].read_text()
    assert shown(capsys) == {"first": "PENDING"}
    assert begin("large", "2") == 0
    assert capsys.readouterr().out == "rival 1\n"
    assert read_resolved(RUN.config).resources.partition == "large"
    paper.states_of |= {"1": paper.states_of["1"].CANCELLED, "2": paper.states_of["2"].RUNNING}
    assert shown(capsys) == {"first": "RUNNING"}
    assert [event["candidate"] for event in events("race_won")] == ["large"]
    assert main(["status", "--why", "first"]) == 0
    said = capsys.readouterr().out
    assert "submitted as slurm job 2 to large, if it is the first to start" in said
    assert "job 2, on large, was the first to start and has the run" in said


def test_a_loser_never_has_the_run(paper: type[Paper]) -> None:
    """Neither beside the winner nor when its lease is gone, and the winner that is requeued goes on."""
    assert main(SUBMIT) == 0
    assert begin("large", "2") == 0
    assert begin("fast", "1") == ExitCode.CONFLICT
    RUN.lease.unlink()
    before = RUN.config.read_text()
    assert begin("fast", "1") == ExitCode.CONFLICT
    assert (RUN.config.read_text(), lease.holder(RUN)) == (before, None)
    assert begin("large", "2", restart=1) == 0
    assert [event["reason"] for event in events("lease_refused")] == [
        "large was the first to start, and this job is for fast"
    ] * 2


def test_a_race_at_the_same_moment(paper: type[Paper], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever each of many jobs sees first, one of them wins, and all agree which."""
    assert main(SUBMIT) == 0
    monkeypatch.setattr(race, "winner", _slow(race.winner))
    for _ in range(10):
        RUN.winner.unlink(missing_ok=True)
        RUN.lease.unlink(missing_ok=True)
        won: list[str] = []
        starters = [
            threading.Thread(target=_start, args=(name, job, won)) for name, job in (("fast", "1"), ("large", "2"))
        ]
        for starter in starters:
            starter.start()
        for starter in starters:
            starter.join()
        assert won == [race.winner(RUN)]
        assert read_resolved(RUN.config).resources.partition == won[0]


def _slow(function):  # type: ignore[no-untyped-def]
    def slowly(paths: RunPaths) -> str | None:
        found = function(paths)
        threading.Event().wait(0.01)
        return found  # type: ignore[no-any-return]

    return slowly


def _start(candidate: str, job: str, won: list[str]) -> None:
    if begin(candidate, job) == 0:
        won.append(candidate)


def test_a_look_at_all_of_them(paper: type[Paper], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "--dry-run"]) == 0
    scripts = capsys.readouterr().out
    assert ("--candidate fast" in scripts, "--candidate large" in scripts) == (True, True)
    assert main([*SUBMIT, "--test-only"]) == 0
    assert capsys.readouterr().out.endswith("start      fast: not known\nstart      large: not known\n")
    assert not Path("runs").exists()


def test_cancel_and_resubmit_before_anything_started(paper: type[Paper], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SUBMIT) == 0
    assert main(["resubmit", "first"]) == ExitCode.CONFLICT
    capsys.readouterr()
    assert main(["cancel", "first"]) == 0
    assert capsys.readouterr().out == "cancelled run first (jobs 1, 2)\n"
    assert {state.value for state in paper.states_of.values()} == {"CANCELLED"}
    assert shown(capsys) == {"first": "CANCELLED"}
    assert main(["resubmit", "first"]) == 0
    assert shown(capsys) == {"first": "PENDING"}
    assert begin("fast", "3") == 0


def test_the_winner_goes_on_with_its_own_script(paper: type[Paper], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SUBMIT) == 0
    assert begin("large", "2") == 0
    paper.states_of |= {"1": paper.states_of["1"].CANCELLED, "2": paper.states_of["2"].NODE_FAIL}
    assert main(["resubmit", "first"]) == 0
    assert paper.requests["3"].script.parent.name == "large"
    script = paper.requests["3"].script.read_text()
    assert '"$run_dir/candidates/large/job.sh"' in script
    assert shown(capsys) == {"first": "PENDING"}


def test_a_submission_that_was_interrupted_is_finished(paper: type[Paper], monkeypatch: pytest.MonkeyPatch) -> None:
    submit = paper.submit
    calls: list[str] = []

    def killed(self: Paper, request: object) -> object:
        calls.append("")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return submit(self, request)  # type: ignore[arg-type]

    monkeypatch.setattr(paper, "submit", killed)
    assert main(SUBMIT) == ExitCode.INTERRUPTED
    assert list(paper.requests) == ["1"]
    assert main(SUBMIT) == 0
    assert [request.script.parent.name for request in paper.requests.values()] == ["fast", "large"]
    assert [job.id.text for job in read_manifest(RUN).jobs] == ["1", "2"]
    assert main(SUBMIT) == ExitCode.CONFLICT


def test_nothing_more_is_submitted_once_one_has_started(paper: type[Paper], monkeypatch: pytest.MonkeyPatch) -> None:
    submit = paper.submit

    def quick(self: Paper, request: object) -> object:
        job = submit(self, request)  # type: ignore[arg-type]
        assert begin("fast", "1") == 0
        return job

    monkeypatch.setattr(paper, "submit", quick)
    assert main(SUBMIT) == 0
    assert list(paper.requests) == ["1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--first-of=fast"], "name two or more clusters or partitions, each once"),
        (["--first-of=fast,fast"], "name two or more clusters or partitions, each once"),
        (["--first-of=fast,a b"], "name two or more clusters or partitions, each once"),
        (["--first-of=fast,local"], "--first-of local: cluster local has no queue"),
        (
            ["--first-of=fast,large", "resources.partition=x"],
            "--first-of names the partition fast; drop one of the two",
        ),
        (
            ["--cluster=local", "--first-of=slurm-dev,secrt"],
            "--first-of secrt: no cluster has this name; did you mean 'secret'?; as a partition: cluster local has no",
        ),
        (["--first-of=fast,far"], "--first-of far: it is reached by ssh to nowhere"),
        (["--first-of=fast,wide"], "--first-of wide: its layout is"),
        (["--first-of=fast,secret"], "--first-of secret: env_from or cluster.secrets_dir are not those of fast"),
    ],
)
def test_refusals(
    paper: type[Paper],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    folder = tmp_path / "home" / "cluster_configs"
    folder.mkdir(parents=True)
    (folder / "far.yaml").write_text("scheduler: slurm\nhost: nowhere\nhost_directory: /tmp/x\n")
    (folder / "wide.yaml").write_text("scheduler: slurm\nresources: {nodes: 2}\n")
    (folder / "secret.yaml").write_text("scheduler: slurm\nenv_from: [HOME]\n")
    monkeypatch.setenv("SFT_LAUNCHER_HOME", str(tmp_path / "home"))
    assert main(["submit", "cfg.yaml", "--cluster=slurm-dev", *words]) == ExitCode.BAD_INPUT
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()
