"""A local run from submit to its end, and what remains when it cannot start."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.exit_codes import ExitCode
from launcher.contract.job_state import JobState
from launcher.contract.lease import BY_HAND, held
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import COMPLETE, RunPaths, append_event
from launcher.contract.spec import read_resolved
from launcher.runs.state import collect
from launcher.views import logs
from launcher.views.log_files import Choice
from tests.launcher.conftest import Commands

RUN = RunPaths(Path("runs/first"))


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state(paths: RunPaths = RUN) -> JobState:
    return collect([RunPaths(paths.root.absolute())])[0][0].state


def launch(*words: str) -> int:
    return main(["submit", "cfg.yaml", *words])


def test_local_run(workdir: Path, fake_python: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(fake_python, "--follow") == 0
    out = capfd.readouterr().out
    assert "\ntrain 0\n" in out
    out = out.replace("\ntrain 0\n", "\n", 1)  # a rank's log is followed beside the others: its lines come anywhere
    for line in (
        "topology   pp2 = 2 ranks",
        "batch      4 examples a step = micro-batch 1 x dp 1 x 4 accumulated; at most 512 tokens",
        "next       launcher status first\n",
        "\nprepare \ntrain: pp2 = 2 ranks\n",
        "\nexport\nexport \nattempt local-1 ended with exit code 0\n",
    ):
        assert line in out
    assert len(out[: out.index("submitted  process")].splitlines()) < 10  # the values are for validate and --dry-run
    assert "values that are not defaults" not in out
    assert RUN.rank_log("local-1", 1).read_text() == "train 1\n"
    manifest = read_manifest(RUN)
    assert (manifest.name, manifest.parent_run, manifest.topology["summary"]) == ("first", None, "pp2 = 2 ranks")
    assert manifest.command[:3] == ("launcher", "submit", "cfg.yaml")
    assert [job.id.scheduler for job in manifest.jobs] == ["local"]
    assert manifest.versions["submitit"].startswith("1.5")
    assert state() is JobState.COMPLETED
    assert stat.S_IMODE(RUN.root.stat().st_mode) == 0o700


def test_run_outlives_the_process_that_submitted_it(workdir: Path, fake_python: str) -> None:
    command = [sys.executable, "-m", "launcher", "submit", "cfg.yaml", fake_python, "--json"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin:/bin", "FAKE_TICKS": "20"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True)
    assert json.loads(done.stdout)["run"] == "first", done.stderr
    assert done.stderr == ""
    assert state() is JobState.RUNNING
    wait_for(lambda: state() is JobState.COMPLETED)


def test_existing_run_is_left_alone(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RUN.root.mkdir(parents=True)
    (RUN.root / "mine").touch()
    assert launch() == ExitCode.CONFLICT
    assert capsys.readouterr().err == (
        f"error: run first exists in {workdir}/runs; go on with `launcher resubmit first`, "
        "or choose another name (name=...)\n"
    )
    assert [path.name for path in RUN.root.iterdir()] == ["mine"]


def test_refused_job_leaves_nothing(workdir: Path, commands: Commands) -> None:
    commands.add("srun", "")
    commands.add("sbatch", "echo 'sbatch: error: no' >&2; exit 1")
    assert launch("--cluster=slurm-dev", "run_root=new/deep") == ExitCode.SCHEDULER
    assert not Path("new").exists()


def test_bad_config_leaves_nothing(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("topology.tensor_parallel=3", "topology.pipeline_parallel=1") == ExitCode.BAD_INPUT
    assert capsys.readouterr().err.startswith("error: topology.tensor_parallel 3 does not divide the 2 ranks of a node")
    assert not Path("runs").exists()


def test_run_root_that_cannot_be_made(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("run_root=cfg.yaml/x") == ExitCode.BAD_INPUT
    assert (
        capsys.readouterr().err == f"error: run_root: {workdir}/cfg.yaml/x/first cannot be created: Not a directory\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dry-run", "--json"), "--dry-run prints text, and no JSON"),
        (("--test-only", "--json"), "--test-only prints text, and no JSON"),
        (("--follow", "--json"), "--follow prints text, and no JSON"),
        (("--dry-run", "--follow"), "--dry-run and --follow exclude each other"),
        (("--dry-run", "--test-only"), "--dry-run and --test-only exclude each other"),
    ],
)
def test_options_of_which_one_was_ignored(
    workdir: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert launch(*words) == ExitCode.BAD_INPUT
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True)
    assert not Path("runs").exists()


def test_what_a_cluster_without_a_queue_does_not_use_is_said(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("resources.partition=gpu", "resources.exclusive=true", "cluster.srun_args=[--mpi=none]")
    assert main(["validate", "cfg.yaml", *words]) == 0
    said = "unused     resources.partition, resources.exclusive, cluster.srun_args: cluster local has no queue\n"
    assert said in capsys.readouterr().out
    assert main(["validate", "cfg.yaml", "--cluster", "slurm-dev", *words]) == 0
    assert "unused" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["watchdog.enabled=false", "watchdog.multiple=3", "watchdog.floor_seconds=9"],
            "watchdog.multiple, watchdog.floor_seconds: watchdog.enabled is false",
        ),
        (["restart.how=none", "restart.hang=9"], "restart.hang: restart.how is none"),
        (["preflight.enabled=off", "preflight.min_shm_mib=9"], "preflight.min_shm_mib: preflight.enabled is off"),
        (
            ["--cluster=slurm-dev", "preflight.min_shm_mib=9"],
            "preflight.min_shm_mib: preflight.enabled is auto: there are neither several nodes nor GPUs to test",
        ),
        (
            ["restart.how=in_place", "restart.node_seconds=9", "restart.timeout=9"],
            "restart.node_seconds, restart.timeout: cluster local has no queue",
        ),
    ],
)
def test_settings_of_what_is_switched_off_are_said(
    workdir: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    """They were ignored without a word."""
    assert main(["validate", "cfg.yaml", *words]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "unused" in line] == [f"unused     {said}"]


def test_render_has_no_use_for_a_run_root_without_a_run(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script was that of the config's own run_root."""
    assert main(["render", "cfg.yaml", "--run-root", "elsewhere"]) == ExitCode.BAD_INPUT
    out, err = capsys.readouterr()
    assert (out, err.startswith("error: --run-root says where the RUN of --diff is; ")) == ("", True)


def test_a_template_that_is_missing_is_not_valid(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`validate` was seen to say valid of what `submit` refused."""
    for command in ("submit", "validate"):
        assert main([command, "cfg.yaml", "cluster.template=mine.sh.j2"]) == ExitCode.BAD_INPUT
        assert capsys.readouterr().err.startswith("error: template 'mine.sh.j2' not found; ")


def test_dry_run_and_render_write_nothing(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--dry-run") == 0
    dry = capsys.readouterr().out
    assert main(["render", "cfg.yaml"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert dry.endswith(f"\n\n{script}")
    assert main(["validate", "cfg.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["topology"]["pipeline_parallel"] == 2
    assert not Path("runs").exists()


def test_source_and_uncommitted_changes_are_kept(workdir: Path, fake_python: str) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "cfg.yaml"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    Path("cfg.yaml").write_text(Path("cfg.yaml").read_text() + "# changed\n")
    assert launch(fake_python, "--follow") == 0
    source = read_manifest(RUN).source[str(workdir)]
    assert (len(source["commit"]), source["dirty"], " M cfg.yaml" in source["changed"]) == (40, True, True)
    assert "+# changed\n" in RUN.source_diff.read_text()


def test_failed_rank_gives_the_run_its_code(
    workdir: Path, fake_python: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_BAD_RANK", "1")
    monkeypatch.setenv("FAKE_CODE", "74")
    assert launch(fake_python, "--follow") == 74
    assert main(["status", "first"]) == 0
    out = capfd.readouterr().out
    assert "exited" not in out
    assert "rank 1 on " in out.splitlines()[-1]
    assert "export \n" not in out


def test_cancel_and_go_on(
    workdir: Path, fake_python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_TICKS", "1000")
    assert launch(fake_python) == 0
    wait_for(RUN.rank_log("local-1", 1).exists)
    wait_for(lambda: RUN.rank_log("local-1", 1).read_text())
    assert main(["resubmit", "first"]) == ExitCode.CONFLICT
    assert "is RUNNING as job" in capsys.readouterr().err
    assert main(["cancel", "first"]) == 0
    assert state() is JobState.CANCELLED
    assert RUN.rank_log("local-1", 0).read_text() == "train 0\nasked to stop\n"
    assert main(["cancel", "first"]) == ExitCode.CONFLICT
    monkeypatch.setenv("FAKE_TICKS", "1")
    assert main(["resubmit", "first"]) == 0
    wait_for(lambda: state() is JobState.COMPLETED)
    assert [job.id.scheduler for job in read_manifest(RUN).jobs] == ["local", "local"]
    assert RUN.rank_log("local-2", 1).read_text() == "train 1\n"


def test_a_run_on_another_machine_is_left_alone(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.launcher.runs.test_state import make_run

    paths = make_run(Path("runs"), "a", scheduler="local", host="elsewhere", process_start=1)
    assert main(["cancel", "a"]) == ExitCode.CONFLICT
    assert capsys.readouterr().err == "error: run a cannot be cancelled from here: it runs on elsewhere; look there\n"
    assert main(["resubmit", "a"]) == ExitCode.CONFLICT
    assert "cannot tell whether a is still at work: it runs on elsewhere" in capsys.readouterr().err
    assert not paths.events.exists()


def test_ranks_by_hand_hold_the_run(
    workdir: Path, fake_python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_BAD_RANK", "1")
    monkeypatch.setenv("FAKE_CODE", "74")
    assert launch(fake_python, "--follow") == 74
    with held(RUN, BY_HAND):
        assert main(["resubmit", "first"]) == ExitCode.CONFLICT
        assert f"run first is held by attempt by-hand on {socket.gethostname()}" in capsys.readouterr().err
        assert main(["resubmit", "first", "train.seed=9"]) == ExitCode.CONFLICT
    monkeypatch.setenv("FAKE_BAD_RANK", "none")
    assert main(["resubmit", "first"]) == 0
    wait_for(lambda: state() is JobState.COMPLETED)


@pytest.mark.parametrize("how", ["requeue", "in_place"])
def test_local_run_is_started_again(
    how: str, workdir: Path, commands: Commands, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the same process, and with the same followers, until the budget is used up or it is done."""
    judge = f'[[ "$2" != launcher.attempts* ]] || exec {sys.executable} "$@"\n'
    killed = '[ "$3 ${RANK-}" != "train 1" ] || [ "$SFT_ATTEMPT" = local-3 ] || kill -9 $$\n'
    python = commands.add("killed-twice", judge + killed)
    assert launch(f"cluster.runtime.python={python}", f"restart.how={how}", "--follow") == 0
    out = capfd.readouterr().out
    for line in (
        f"unknown (killed by signal 9, and nothing says by whom): {how}; restart 1 of 2 without progress",
        "attempt local-1 ended with exit code 137",
        f"unknown (killed by signal 9, and nothing says by whom): {how}; restart 2 of 2 without progress",
        "attempt local-2 ended with exit code 137",
        "attempt local-3 ended with exit code 0",
    ):
        assert f"{line}\n" in out
    assert state() is JobState.COMPLETED
    assert len(read_manifest(RUN).jobs) == 1


def test_child_run_of_a_finished_run(workdir: Path, fake_python: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cfg.yaml").write_text(Path("cfg.yaml").read_text() + "logging: {prompts: ['costs \\${x}']}\n")
    assert launch(fake_python, "--follow") == 0
    RUN.checkpoint(3).mkdir(parents=True)
    (RUN.checkpoint(3) / COMPLETE).touch()
    assert main(["resubmit", "first"]) == ExitCode.CONFLICT
    assert "has finished; to train on, raise its steps" in capsys.readouterr().err
    assert main(["resubmit", "first", "train.seed=9"]) == ExitCode.CONFLICT
    assert "do not train longer" in capsys.readouterr().err
    assert main(["resubmit", "first", "train.max_steps=9"]) == 0
    child = RunPaths(Path("runs/first-2"))
    spec = read_resolved(child.config)
    assert spec.checkpoint.resume_from == str(RUN.checkpoint(3).absolute())
    assert (spec.name, spec.train.max_steps, spec.logging.prompts) == ("first-2", 9, ["costs ${x}"])
    assert read_manifest(child).parent_run == str(RUN.root.absolute())
    wait_for(lambda: state(child) is JobState.COMPLETED)
    capsys.readouterr()
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["state"]) for row in rows] == [("first", "COMPLETED"), ("first-2", "COMPLETED")]


def test_a_run_that_may_have_stopped_early_goes_on_with_more_patience(workdir: Path, fake_python: str) -> None:
    """It has trained fewer steps than it was given. It was refused as one that does not train longer."""
    words = ("data.validation=a.jsonl", "train.eval_every=1", "train.early_stopping.patience=2")
    assert launch(fake_python, *words, "--follow") == 0
    assert main(["resubmit", "first", "train.early_stopping.patience=2"]) == ExitCode.CONFLICT
    assert main(["resubmit", "first", "train.early_stopping.patience=5"]) == 0
    child = RunPaths(Path("runs/first-2"))
    wait_for(lambda: state(child).terminal)


def test_a_run_that_goes_on_starts_from_no_other_model(
    workdir: Path, fake_python: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are those of the checkpoint: the other model would be named in the config, and not be read."""
    assert launch(fake_python, "--follow") == 0
    RUN.checkpoint(3).mkdir(parents=True)
    (RUN.checkpoint(3) / COMPLETE).touch()
    shutil.copytree("model", "other")
    longer = ["resubmit", "first", "train.max_steps=9"]
    capsys.readouterr()
    for override in ("model.path=other", "model.init=random"):
        assert main([*longer, override]) == ExitCode.CONFLICT
        said = capsys.readouterr().err
        assert f"{override.partition('=')[0]} " in said and "would be those of " in said, said
    assert main([*longer, "model.path=other", "checkpoint.resume_from=null", "name=anew"]) == 0
    shutil.rmtree("model")  # moved
    assert main([*longer, "model.path=other"]) == 0
    for name in ("anew", "first-2"):
        wait_for(lambda name=name: state(RunPaths(Path("runs") / name)).terminal)  # type: ignore[misc]


def test_logs_of_ranks_batch_and_attempts(workdir: Path, fake_python: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(fake_python, "--follow") == 0
    capsys.readouterr()

    def shown(*words: str) -> str:
        assert main(["logs", "first", *words]) == 0
        return capsys.readouterr().out

    assert shown() == shown("--rank=0") == "train 0\n"
    assert shown("--rank=1") == shown("--rank=1", "--attempt=local-1") == "train 1\n"
    assert shown("--batch").endswith("ended with exit code 0\n")
    assert main(["logs", "first", "--rank=1", "-f"]) == 0
    assert capsys.readouterr().out == "train 1\n"
    assert main(["logs", "first", "--attempt=local-2"]) == ExitCode.CONFLICT
    assert capsys.readouterr().err == (
        "error: run first has no attempt 'local-2'; did you mean 'local-1'?; it has local-1\n"
    )
    assert main(["logs", "first", "--rank=9"]) == 0
    assert "run first: job" in capsys.readouterr().err


def test_logs_before_the_first_rank_show_the_batch_log(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.launcher.runs.test_state import make_run, started

    paths = make_run(Path("runs"), "a", scheduler="local", host="elsewhere")
    logs.show(logs.choose(paths, Choice()))
    assert capsys.readouterr().err == "# no log yet; run a: job 7 is UNKNOWN (it runs on elsewhere; look there)\n"
    started(paths, "local-1")
    (paths.logs / "local-1").mkdir()
    (paths.logs / "local-1" / "batch.log").write_text("preparing\n")
    logs.show(logs.choose(paths, Choice()))
    captured = capsys.readouterr()
    assert captured.out == "preparing\n"
    assert captured.err.startswith("# no rank-0.log yet; ")
    append_event(paths, "attempt_ended", attempt="local-1", exit_code=3)
    assert logs.follow(paths, Choice(batch=True)).exit_code == 3
    assert capsys.readouterr().out == "preparing\n"


@pytest.mark.handmade_records
def test_moved_run_goes_on_as_a_run_of_its_own(
    workdir: Path, fake_python: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(fake_python, "--follow") == 0
    RUN.checkpoint(3).mkdir(parents=True)
    (RUN.checkpoint(3) / COMPLETE).touch()
    append_event(RUN, "attempt_started", attempt="local-2", job_id="1", scheduler="local")
    append_event(RUN, "attempt_ended", attempt="local-2", exit_code=1)
    Path("elsewhere").mkdir()
    RUN.root.rename("elsewhere/first")
    moved = RunPaths(Path("elsewhere/first").absolute())
    Path("link").symlink_to("runs")
    before = sorted(path.name for path in moved.root.iterdir())
    capsys.readouterr()
    assert main(["resubmit", "elsewhere/first"]) == ExitCode.CONFLICT
    said = capsys.readouterr().err
    assert f"{moved.root} was {RUN.root.absolute()} when it was submitted" in said
    assert f"`launcher resubmit {moved.root} name=first-2`" in said
    assert not RUN.root.exists()
    assert sorted(path.name for path in moved.root.iterdir()) == before
    assert main(["resubmit", "elsewhere/first", "name=first-2", "train.max_steps=9"]) == 0
    child = read_resolved(Path("elsewhere/first-2/config.yaml"))
    assert child.run_root == str(Path("elsewhere").absolute())
    assert child.checkpoint.resume_from == str(moved.checkpoint(3))
    moved.root.rename(RUN.root)
    assert main(["resubmit", "link/first"]) == 0  # the same place by another name


def test_interrupted_showing_says_that_the_run_goes_on(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fake_python: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(logs, "follow", interrupt)
    assert launch(fake_python, "--follow") == ExitCode.INTERRUPTED
    said = "run first goes on; `launcher logs -f first` shows it again, `launcher cancel first` ends it\n"
    assert capsys.readouterr().err.endswith(said)
    assert main(["logs", "-f", "first"]) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err.endswith(said)


def test_child_run_shows_what_differs_from_its_parent(
    workdir: Path, fake_python: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(fake_python, "--follow") == 0
    capsys.readouterr()
    assert main(["resubmit", "first", "train.max_steps=9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    changed = lines[lines.index("changed:") + 1 :]
    assert [line.split() for line in changed[:2]] == [
        ["name", "first-2", "(before:", "first)"],
        ["train.max_steps", "9", "(before:", "3)"],
    ]
    assert changed[2].startswith("submitted ")


def test_single_process_that_failed_is_shown(
    workdir: Path, commands: Commands, capfd: pytest.CaptureFixture[str]
) -> None:
    """prepare refuses the data: no rank has failed, and the first error is known all the same."""
    record = '{"rank": 0, "host": "n", "kinds": ["DataError", "LauncherError"], "message": "a.jsonl:7: no text"}'
    body = f"echo '{record}' >\"logs/$SFT_ATTEMPT/error.json\"; exit 2"
    python = commands.add("refuses", f'[ "$3" != prepare ] || {{ {body}; }}')
    assert launch(f"cluster.runtime.python={python}", "--follow") == ExitCode.BAD_INPUT
    capfd.readouterr()
    assert main(["logs", "first", "--failed"]) == 0
    assert capfd.readouterr().out == "# DataError on n:\na.jsonl:7: no text\n"
    assert main(["status", "first"]) == 0
    assert "a.jsonl:7: no text (exit code 2, bad input)" in capfd.readouterr().out


def test_python_that_is_not_there_is_said(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("cluster.runtime.python=/nowhere/python", "--follow") == 127
    capfd.readouterr()
    assert main(["status", "first"]) == 0
    said = "the run could not be taken: "
    assert said in capfd.readouterr().out
    assert main(["logs", "first", "--failed"]) == 0
    shown = capfd.readouterr().out
    assert shown.startswith(f"# {said}")
    assert "/nowhere/python: No such file or directory" in shown


def test_resubmit_on_a_full_disk_ends_with_the_code_of_a_disk(
    workdir: Path, fake_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was 1, which is for bugs."""
    monkeypatch.setenv("FAKE_TICKS", "1")
    assert launch(fake_python) == 0
    wait_for(lambda: state() is JobState.COMPLETED)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = io.StringIO()  # pytest's are files
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
            code = main(["resubmit", "first", "train.max_steps=9"])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ExitCode.IO_ERROR
