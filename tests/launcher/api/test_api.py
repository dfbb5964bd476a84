"""launcher.api: what the commands do, as functions that return values and print nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher import api
from launcher.contract.errors import ConfigError, RunStateError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.job_state import JobState
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths
from launcher.runs.selection import Selection
from launcher.runs.state import RunStatus
from launcher.views.log_files import Choice
from tests.launcher.submission.test_submit import wait_for

CHECKOUT = Path(__file__).parents[3]


def ends(runs: list[str]) -> Sequence[RunStatus]:
    """The runs' states once they have ended; asked more often than `wait` alone does, which looks every 5 s."""
    wait_for(lambda: all(row.state.terminal for row in api.status(runs).rows))
    return api.wait(runs, timeout=60) or ()


def test_a_run_from_config_to_its_child(
    workdir: Path, fake_python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_BAD_RANK", "1")
    monkeypatch.setenv("FAKE_CODE", "3")
    checked = api.validate("cfg.yaml", [fake_python, "restart.how=none"])
    assert isinstance(checked, api.CheckedRun)
    assert checked.answer().topology.pipeline_parallel == 2
    assert not Path("runs").exists()
    job = api.submit(checked)
    assert (job.run, job.directory, job.scheduler) == ("first", str(workdir / "runs" / "first"), "local")
    (ended,) = ends(["first"])
    assert (ended.state, ended.exit_code) == (JobState.FAILED, 3)
    assert api.status().rows == api.status([job.directory]).rows == (ended,)
    assert api.status(select=Selection(states=frozenset({JobState.RUNNING}))).rows == ()
    (told,) = api.why(["first"])
    assert "attempt local-1 ended with exit code 3" in told.history
    assert "rank 1 on" in api.logs("first", Choice(failed=True)).words
    assert api.logs("first", Choice(ranks=(1,))).tail(5) == "train 1"
    assert Path(api.report("first").file).read_text().startswith("<!doctype html>")
    monkeypatch.delenv("FAKE_BAD_RANK")
    child = api.resubmit("first", ["train.max_steps=9"])
    assert child.run == "first-2"
    (again,) = ends([child.directory])
    assert again.state is JobState.COMPLETED
    manifest = read_manifest(RunPaths(Path(child.directory)))
    assert manifest.command == ("launcher.api.resubmit", "first", "train.max_steps=9")
    assert manifest.parent_run == job.directory
    assert [row.run for row in api.list_runs()] == ["first", "first-2"]
    with pytest.raises(RunStateError, match="nothing to cancel"):
        api.cancel(["first"])
    assert capsys.readouterr().out == ""


def test_a_sweep_and_its_results(workdir: Path, fake_python: str) -> None:
    with Path("cfg.yaml").open("a") as file:
        file.write("sweep: {product: {train.seed: [1, 2]}}\n")
    checked = api.validate("cfg.yaml", [fake_python])
    assert isinstance(checked, api.CheckedSweep)
    assert checked.answer() == api.ValidSweep(
        group="first", runs={"first-0": {"train.seed": "1"}, "first-1": {"train.seed": "2"}}
    )
    assert list(api.submit(checked).runs) == ["first-0", "first-1"]
    assert [row.state for row in ends(["first"])] == [JobState.COMPLETED] * 2
    assert [row.set for row in api.results("first")] == [{"train.seed": "1"}, {"train.seed": "2"}]
    assert api.resubmit_failed("first").runs == {}


def test_a_costly_run_is_submitted_only_where_its_cost_is_accepted(workdir: Path, fake_python: str) -> None:
    words = [fake_python, "resources.gpus_per_node=2", "resources.gpu_hour_limit=0.5", "resources.time=1:00:00"]
    with pytest.raises(ConfigError, match=r"the run takes up to 2\.0 GPU hours.*submit with --yes"):
        api.submit("cfg.yaml", words)
    assert not Path("runs").exists()


def test_a_limit_of_cost_is_not_kept_by_a_run_of_unknown_cost(workdir: Path, fake_python: str) -> None:
    """Without a time limit, and with a GPU that is not known, the limit was passed over."""
    words = [fake_python, "resources.gpus_per_node=2", "resources.gpu_hour_limit=0.5", "resources.time=null"]
    with pytest.raises(ConfigError, match=r"how many GPU hours the run takes is not known.*submit with --yes"):
        api.submit("cfg.yaml", words)
    assert not Path("runs").exists()


def test_errors_have_the_exit_code_of_the_command(workdir: Path) -> None:
    with pytest.raises(ConfigError) as wrong:
        api.validate("cfg.yaml", ["train.max_step=3", "topology.nope=1"])
    assert len(wrong.value.problems) == 2
    assert wrong.value.exit_code is ExitCode.BAD_INPUT
    with pytest.raises(RunStateError) as unknown:
        api.logs("absent")
    assert unknown.value.exit_code is ExitCode.CONFLICT


def test_answers_cannot_be_changed(workdir: Path) -> None:
    answers = [kind for name in api.__all__ if isinstance(kind := getattr(api, name), type)]
    assert len(answers) > 8
    for kind in answers:
        assert dataclasses.is_dataclass(kind), kind
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]


def test_importing_it_is_cheap() -> None:
    """`status` does not wait for what only `submit` needs."""
    tell = "import sys, launcher.api; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", tell], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"omegaconf", "jinja2", "submitit", "torch", "pydantic", "mcp"}
