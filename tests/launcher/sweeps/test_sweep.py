"""Sweeps: points of a section, all checks before the first job, one job for each point, groups as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths, append_line
from launcher.contract.spec import read_resolved
from launcher.sweeps.sweep import read_sweep
from tests.launcher.conftest import Commands
from tests.launcher.submission.test_submit import wait_for

SLURM = "--cluster=slurm-dev"


def points(folder: Path, section: str) -> list[dict[str, str]]:
    path = folder / "sweep.yaml"
    path.write_text(f"name: x\nsweep: {section}\n")
    sweep = read_sweep(path)
    assert sweep is not None
    return [dict(point) for point in sweep.points]


def test_points(tmp_path: Path) -> None:
    assert points(tmp_path, "{product: {a: [1, 1e-5], b: [x, null]}}") == [
        {"a": "1", "b": "x"},
        {"a": "1", "b": ""},
        {"a": "1e-5", "b": "x"},
        {"a": "1e-5", "b": ""},
    ]
    assert points(tmp_path, "{zip: {a: [1, 2], b: [x, y]}}") == [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    assert points(tmp_path, "{list: [{a: 1}, {}], product: {b: [no, 1:30]}}") == [
        {"b": "no", "a": "1"},
        {"b": "no"},
        {"b": "1:30", "a": "1"},
        {"b": "1:30"},
    ]
    assert points(tmp_path, "{list: [{a: [x, 'y, z']}, {a: []}]}") == [{"a": '["x", "y, z"]'}, {"a": "[]"}]


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("{zip: {a: [1, 2], b: [1]}}", r"sweep\.zip: lists of one length are zipped, and these have a 2, b 1 values"),
        ("{products: {a: [1]}}", r"sweep: unknown key 'products'; did you mean 'product'\?"),
        ("{product: {a: 1}}", r"sweep\.product: a is not a list of values"),
        ("{product: {a: []}}", r"sweep\.product: a is not a list of values"),
        ("{product: {name: [a, b]}}", r"sweep\.product: name is the same for all runs of a sweep"),
        ("{list: {a: 1}}", r"sweep\.list: not a list of mappings"),
        ("{product: {a: [1]}, list: [{b: 1}, {a: 2}]}", r"sweep: a is set by two of product, zip and list, and one"),
        ("[1]", "sweep: not a mapping"),
        ("{}", "sweep: no points"),
        ("{product: {a: [1], b: [1]}, max_at_once: 0}", r"sweep\.max_at_once: not a number of runs, at least 1"),
        (f"{{product: {{a: {list(range(101))}, b: {list(range(100))}}}}}", "sweep: more than 10000 points"),
        (
            "{product: {" + ", ".join(f"{key}: {list(range(100))}" for key in "abcdefgh") + "}}",
            "sweep: more than 10000 points",  # of 10^16: they are not counted out
        ),
    ],
)
def test_problems(tmp_path: Path, section: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"sweep\.yaml:2: {problem}"):
        points(tmp_path, section)


@pytest.fixture
def jobs(workdir: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config with a sweep of four runs, and a Slurm that numbers jobs."""
    monkeypatch.setattr("launcher.scheduler.slurm.scheduler.Slurm.settle_seconds", 0.0)
    with Path("cfg.yaml").open("a") as file:
        file.write("sweep: {product: {train.seed: [1, 2], train.optimizer.lr: [1e-5, 2e-5]}, max_at_once: 3}\n")
    path = workdir / "jobs"
    path.touch()
    monkeypatch.setenv("JOBS", str(path))
    commands.add("srun", "")
    commands.add("sbatch", 'echo "$*" >>"$JOBS"; wc -l <"$JOBS"')
    commands.add("scontrol", 'echo "MaxJobCount             = 10000"')
    commands.add("sacctmgr", "exit 1")
    commands.add("squeue", "")
    commands.add("sacct", "exit 1")
    return path


def test_every_point_is_a_run_of_the_group(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "cfg.yaml", SLURM, "train.max_steps=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "group": "first",
        "runs": {"first-0": "1", "first-1": "2", "first-2": "3", "first-3": "4"},
    }
    specs = [read_resolved(Path(f"runs/first-{number}/config.yaml")) for number in range(4)]
    assert [(spec.train.seed, spec.train.optimizer.lr) for spec in specs] == [
        (1, 1e-5),
        (1, 2e-5),
        (2, 1e-5),
        (2, 2e-5),
    ]
    assert {spec.train.max_steps for spec in specs} == {7}
    assert read_manifest(RunPaths(Path("runs/first-3"))).group == "first"
    lines = jobs.read_text().splitlines()
    assert ["--dependency=afterany:1" in line for line in lines] == [False, False, False, True]
    assert main(["submit", "cfg.yaml", SLURM, "train.max_steps=7"]) == ExitCode.CONFLICT
    assert "group first exists in " in capsys.readouterr().err
    assert main(["status", "first", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4


def test_one_bad_point_submits_none(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path("cfg.yaml")
    config.write_text(config.read_text().replace("train.seed: [1, 2]", "train.seed: [1, x], topology.oops: [1]"))
    assert main(["submit", "cfg.yaml", SLURM]) == ExitCode.BAD_INPUT
    err = capsys.readouterr().err
    assert "override 'train.seed=x': train.seed: 'x' is not an integer" in err
    assert err.count("unknown key 'topology.oops'") == 1
    assert not Path("runs").exists()


def test_validate_and_render_know_of_the_sweep(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "cfg.yaml", SLURM]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["first-3  2           2e-5", "valid"]
    assert main(["validate", "cfg.yaml", SLURM, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"]["first-0"] == {"train.seed": "1", "train.optimizer.lr": "1e-5"}
    assert main(["render", "cfg.yaml", SLURM]) == 0
    shown = capsys.readouterr()
    assert "#SBATCH --job-name=first-0\n" in shown.out and "of the sweep's 4 runs the first, first-0" in shown.err
    Path("cfg.yaml").write_text(Path("cfg.yaml").read_text().replace("train.seed: [1, 2]", "train.sed: [1, 2]"))
    assert main(["validate", "cfg.yaml", SLURM]) == ExitCode.BAD_INPUT


def test_the_next_commands_name_the_run_root(jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "cfg.yaml", SLURM, f"run_root={tmp_path / 'else where'}"]) == 0
    assert f"launcher results first --run-root '{tmp_path}/else where'" in capsys.readouterr().out


def test_overrides_of_what_the_sweep_sets_are_refused(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sweep's values won, without a word."""
    key = next(iter(dict(read_sweep(Path("cfg.yaml")).points[0])))  # type: ignore[union-attr]
    assert main(["submit", "cfg.yaml", SLURM, f"{key}=1"]) == ExitCode.BAD_INPUT
    assert f"override '{key}=1': the sweep sets {key} in its runs; " in capsys.readouterr().err
    assert not Path("runs").exists()


def test_dry_run_shows_the_points(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "cfg.yaml", SLURM, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["first-3", "2", "2e-5"]
    assert not Path("runs").exists()
    assert main(["submit", "cfg.yaml", SLURM, "--follow"]) == ExitCode.BAD_INPUT


def test_interrupted_sweep_goes_on(jobs: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    commands.add("sbatch", '[ "$(wc -l <"$JOBS")" -lt 2 ] || exit 1; echo "$*" >>"$JOBS"; wc -l <"$JOBS"')
    assert main(["submit", "cfg.yaml", SLURM]) == ExitCode.SCHEDULER
    assert "2 of the 4 runs of first are submitted; give the same command again" in capsys.readouterr().err
    commands.add("sbatch", 'echo "$*" >>"$JOBS"; wc -l <"$JOBS"')
    assert main(["submit", "cfg.yaml", SLURM, "train.max_steps=9"]) == ExitCode.CONFLICT
    assert main(["submit", "cfg.yaml", SLURM]) == 0
    assert len(jobs.read_text().splitlines()) == 4


def test_limits_are_asked_first(jobs: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    commands.add("sacctmgr", "echo; echo 3")
    commands.add("scontrol", "echo 'AccountingStorageEnforce = associations,limits,qos'; echo 'MaxJobCount = 10000'")
    assert main(["submit", "cfg.yaml", SLURM]) == ExitCode.SCHEDULER
    assert "the sweep has 4 runs, and Slurm's MaxSubmitJobs is 3" in capsys.readouterr().err
    assert jobs.read_text() == ""


def test_limits_that_nobody_enforces_are_none(jobs: Path, commands: Commands) -> None:
    """sacctmgr shows 0 where no limit was ever set."""
    commands.add("sacctmgr", "echo 0")
    commands.add("scontrol", "echo 'AccountingStorageEnforce = none'; echo 'MaxJobCount = 10000'")
    assert main(["submit", "cfg.yaml", SLURM]) == 0
    assert len(jobs.read_text().splitlines()) == 4


def test_group_is_cancelled_resubmitted_and_compared(
    workdir: Path, fake_python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("cfg.yaml").open("a") as file:
        file.write("sweep: {list: [{train.seed: 1}, {train.seed: 2}]}\n")
    monkeypatch.setenv("FAKE_BAD_RANK", "1")
    monkeypatch.setenv("FAKE_CODE", "1")
    assert main(["submit", "cfg.yaml", fake_python]) == 0
    runs = [RunPaths(Path(f"runs/first-{number}").absolute()) for number in range(2)]
    for run, loss in zip(runs, (0.5, 0.25), strict=True):
        main(["logs", run.name, "-f"])
        for step in (1, 2):
            append_line(run.metrics, {"step": step, "loss": loss / step})
    capsys.readouterr()
    assert main(["results", "first"]) == 0
    head, *body = capsys.readouterr().out.splitlines()
    assert head.split() == ["RUN", "STATE", "train.seed", "loss", "step"]
    assert [line.split() for line in body] == [
        ["first-1", "FAILED", "2", "0.125", "2"],
        ["first-0", "FAILED", "1", "0.25", "2"],
    ]
    assert main(["results", "first", "--sort=los"]) == ExitCode.BAD_INPUT
    assert "no run has logged 'los'; did you mean 'loss'?" in capsys.readouterr().err
    monkeypatch.setenv("FAKE_BAD_RANK", "none")
    monkeypatch.setenv("FAKE_TICKS", "1000")
    assert main(["resubmit", "first", "--failed"]) == 0
    assert [len(read_manifest(run).jobs) for run in runs] == [2, 2]
    wait_for(lambda: all(run.rank_log("local-2", rank).exists() for run in runs for rank in range(2)))
    assert main(["cancel", "first-0"]) == 0
    capsys.readouterr()
    assert main(["cancel", "first"]) == 0
    assert capsys.readouterr().out.startswith("cancelled run first-1 ")
    assert main(["resubmit", "first", "--failed"]) == 0
    assert capsys.readouterr().out == "no run has failed\n"
