"""Submission through submitit: what we rely on in it, what sbatch is given, and what it may answer."""

from __future__ import annotations

import inspect
import os
from importlib.metadata import version
from pathlib import Path

import pytest
from submitit.core.core import Executor, PicklingExecutor
from submitit.core.utils import CommandFunction, FailedJobError, FailedSubmissionError, JobPaths
from submitit.local import local
from submitit.slurm.slurm import SlurmExecutor

from launcher.contract.errors import SchedulerError
from launcher.scheduler.base import SubmissionUnknown
from launcher.scheduler.slurm.environment import clean_environment
from launcher.scheduler.slurm.executor import ScriptSlurmExecutor
from tests.launcher.conftest import Commands

SCRIPT = "#!/bin/bash\n# a script: $x 'y' \\\n"


def test_contract_with_submitit() -> None:
    """Private names that executor.py overrides or calls; read them again before the pin is moved."""
    assert version("submitit").split(".")[:2] == ["1", "5"]
    assert issubclass(SlurmExecutor, PicklingExecutor)
    assert issubclass(local.LocalExecutor, Executor)
    names = {
        SlurmExecutor._make_submission_file_text: ["self", "command", "uid"],
        SlurmExecutor._make_submission_command: ["self", "submission_file_path"],
        SlurmExecutor._get_job_id_from_submission_command: ["string"],
        PicklingExecutor._submit_command: ["self", "command"],
        local.LocalExecutor._submit_command: ["self", "command"],
        local.Controller.__init__: ["self", "folder"],
    }
    for method, parameters in names.items():
        assert list(inspect.signature(method).parameters) == parameters
    assert JobPaths("/x", "7").submission_file == Path("/x/7_submission.sh")
    assert issubclass(FailedJobError, RuntimeError)
    assert issubclass(FailedSubmissionError, RuntimeError)
    assert "env" in inspect.signature(CommandFunction.__init__).parameters


@pytest.fixture
def sbatch(commands: Commands) -> Commands:
    commands.add("srun", "")
    commands.add("sbatch", 'env >"$0.env"; cat "${@: -1}" >"$0.script"; echo "12;cluster"')
    return commands


def test_sbatch_gets_the_script_and_a_clean_environment(
    tmp_path: Path, sbatch: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = {"SLURM_JOB_ID", "SLURMD_NODENAME", "SBATCH_PARTITION", "PMIX_RANK", "PMI_RANK", "CUDA_VISIBLE_DEVICES"}
    for name in (*foreign, "HF_TOKEN", "SLURM_CONF", "KEPT"):
        monkeypatch.setenv(name, "x")
    executor = ScriptSlurmExecutor(tmp_path / "aside", SCRIPT, ["--comment=a b"], hidden=["HF_TOKEN"])
    assert executor.submit_script() == "12"
    assert sbatch.calls("sbatch")[0].startswith("--parsable --comment=a b /")
    assert (sbatch.folder / "sbatch.script").read_text() == SCRIPT
    given = dict(line.partition("=")[::2] for line in (sbatch.folder / "sbatch.env").read_text().splitlines())
    assert {"SLURM_CONF", "KEPT"} <= given.keys()
    assert not {*foreign, "HF_TOKEN"} & given.keys()
    assert os.environ["SLURM_JOB_ID"] == "x"
    assert (tmp_path / "aside" / "12_submission.sh").read_text() == SCRIPT
    assert not list(tmp_path.rglob("*.pkl"))


def test_refusal_has_slurms_words(tmp_path: Path, sbatch: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch.add("sbatch", "echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    with pytest.raises(SchedulerError) as caught:
        ScriptSlurmExecutor(tmp_path, SCRIPT).submit_script()
    words, hint = str(caught.value).rsplit("\n", 1)
    assert words == "sbatch refused the job:\n  sbatch: error: invalid partition specified: nope"
    assert hint == "set resources.partition"  # which ones there are, the fake does not tell
    assert not isinstance(caught.value, SubmissionUnknown)
    assert capsys.readouterr().err == ""  # they are in the error, and are said once


def test_sbatch_of_a_site_prints_more_than_the_id(tmp_path: Path, sbatch: Commands) -> None:
    sbatch.add("sbatch", "echo Welcome to cluster 5; echo; echo '12;far'; echo 'charged to: 99 hours'")
    executor = ScriptSlurmExecutor(tmp_path, SCRIPT)
    assert (executor.submit_script(), executor.cluster) == ("12", "far")


def test_no_answer_is_not_a_refusal(tmp_path: Path, sbatch: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch.add("sbatch", "exec sleep 60")
    monkeypatch.setattr("launcher.scheduler.slurm.executor.SBATCH_TIMEOUT", 0.2)
    with pytest.raises(SubmissionUnknown, match=r"^sbatch gave no answer within 0\.2 s$"):
        ScriptSlurmExecutor(tmp_path, SCRIPT).submit_script()
    sbatch.add("sbatch", "echo hello")
    with pytest.raises(SubmissionUnknown, match=r"^sbatch answered without a job id: 'hello'$"):
        ScriptSlurmExecutor(tmp_path, SCRIPT).submit_script()


def test_devices_outside_a_job_are_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert clean_environment()["CUDA_VISIBLE_DEVICES"] == "1"


def test_machine_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SchedulerError, match=r"^Slurm's commands are not on PATH; submit from a login node"):
        ScriptSlurmExecutor(tmp_path, SCRIPT)
