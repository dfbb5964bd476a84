"""Where the values of env_from are kept on their way to a job, and where they never are."""

from __future__ import annotations

import dataclasses
import stat
import subprocess
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import ClusterSpec, RunSpec
from launcher.submission.secret_files import secrets_file, write_secrets
from tests.launcher.conftest import Commands

VALUE = 'it\'s $(touch pwned) `x` \\ "y"\nsecond line'


def spec_with(folder: Path, scheduler: str = "slurm") -> RunSpec:
    cluster = ClusterSpec(scheduler=scheduler, env_from=["A_TOKEN"], secrets_dir=str(folder))  # type: ignore[arg-type]
    return RunSpec(name="first", cluster=cluster, env_from=["B_KEY", "A_TOKEN"])


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", VALUE)
    monkeypatch.setenv("B_KEY", "b")


def test_file_is_private_and_a_shell_reads_the_values_back(tmp_path: Path, values: None) -> None:
    spec, paths = spec_with(tmp_path / "private"), RunPaths(tmp_path / "runs" / "first")
    write_secrets(spec, paths)
    file = secrets_file(spec, paths)
    assert file is not None
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    command = ["env", "-i", "bash", "-c", 'set -u; . "$0"; printf %s "$A_TOKEN$B_KEY"', str(file)]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == f"{VALUE}b"
    assert not (tmp_path / "pwned").exists()


def test_files_of_runs_that_are_gone_are_cleared_away(tmp_path: Path, values: None) -> None:
    spec = spec_with(tmp_path / "private")
    here, gone = RunPaths(tmp_path / "here"), RunPaths(tmp_path / "gone")
    here.root.mkdir()
    for paths in (gone, here, RunPaths(tmp_path / "next")):
        write_secrets(spec, paths)
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "private").iterdir())
    assert names == ["here", "next"]


def test_folder_that_others_can_enter_is_refused(tmp_path: Path, values: None) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(Exception, match=r"cluster\.secrets_dir: .*/open must be a folder of yours that nobody else"):
        write_secrets(spec_with(folder), RunPaths(tmp_path / "run"))
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="must be a folder of yours"):
        write_secrets(spec_with(folder), RunPaths(tmp_path / "run"))


def test_local_run_inherits(tmp_path: Path, values: None) -> None:
    write_secrets(spec_with(tmp_path / "private", "local"), RunPaths(tmp_path / "run"))
    assert not (tmp_path / "private").exists()


def test_missing_value_is_an_error_before_the_queue(
    workdir: Path, commands: Commands, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.add("srun", "")
    commands.add("sbatch", "echo 1")
    monkeypatch.delenv("NO_TOKEN", raising=False)
    words = ["submit", "cfg.yaml", "--cluster=slurm-dev", "env_from=[NO_TOKEN]"]
    assert main(words) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err.startswith("error: env_from: NO_TOKEN is not set in this shell")
    assert commands.calls("sbatch") == []
    assert not Path("runs").exists()
    assert main([*words, "env_from=[NO-TOKEN]", "cluster.env.TWICE=1", "cluster.env_from=[TWICE]"]) == 2
    err = capsys.readouterr().err
    assert "env_from: 'NO-TOKEN' is not the name of an environment variable" in err
    assert "cluster.env_from: TWICE is set by cluster.env; drop one" in err


@pytest.mark.parametrize("cluster", ["local", "slurm-dev"])
@pytest.mark.parametrize(
    ("address", "problem"),
    [(None, "HOOK is not set in this shell"), ("", "HOOK holds no http(s)"), ("hooks/secret", "HOOK holds no http(s)")],
)
def test_a_webhook_without_address_is_an_error_at_submission(
    workdir: Path,
    commands: Commands,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cluster: str,
    address: str | None,
    problem: str,
) -> None:
    """It was told when an attempt had ended, or by the name of another key."""
    commands.add("sbatch", "echo 1")
    monkeypatch.delenv("HOOK", raising=False)
    if address is not None:
        monkeypatch.setenv("HOOK", address)
    assert main(["submit", "cfg.yaml", "--cluster", cluster, "notify.webhook_env=HOOK"]) == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith(f"error: notify.webhook_env: {problem}")
    assert "secret" not in error
    assert not Path("runs").exists()


def test_refused_job_leaves_no_secret(workdir: Path, commands: Commands, values: None) -> None:
    commands.add("srun", "")
    commands.add("sbatch", "exit 1")
    words = ["env_from=[A_TOKEN]", "cluster.secrets_dir=private"]
    assert main(["submit", "cfg.yaml", "--cluster=slurm-dev", *words]) == ExitCode.SCHEDULER
    assert list(Path("private").iterdir()) == []


def test_script_names_them_and_asks_for_them(tmp_path: Path) -> None:
    from tests.launcher.submission.test_render_script import make_spec, script

    cluster = ClusterSpec(scheduler="slurm", env_from=["A_TOKEN"], secrets_dir="/private dir")
    text = script(make_spec(cluster=cluster))
    assert "secrets='/private dir/demo-" in text
    assert "export A_TOKEN" not in text
    assert "inherited=(-u A_TOKEN) said " in text  # a job submitted by this one reads the file itself
    assert "secrets" not in script(make_spec(cluster=dataclasses.replace(cluster, env_from=[])))


def test_links_and_folders_of_others_are_no_run_directories(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "elsewhere").mkdir()
    Path("runs").mkdir()
    Path("runs/first").symlink_to(workdir / "elsewhere")
    assert main(["submit", "cfg.yaml"]) == ExitCode.CONFLICT
    assert list((workdir / "elsewhere").iterdir()) == []
    for name in ("../first", "/first", "..", ".first", "a/b", ""):
        assert main(["submit", "cfg.yaml", f"name={name}"]) == ExitCode.BAD_INPUT
    capsys.readouterr()
