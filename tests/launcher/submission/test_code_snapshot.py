"""What a run directory keeps to understand and repeat the run: code, lockfile, environment."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launcher.__main__ import main
from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import EvaluationSpec, RunSpec
from launcher.submission import code_snapshot
from launcher.submission.code_snapshot import digest, take_snapshot
from launcher.submission.lockfile import read_lockfile
from tests.launcher.conftest import Commands

RUN = RunPaths(Path("runs/first"))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a tracked, a changed, an untracked, an ignored and a deleted file."""
    root = tmp_path / "checkout"
    (root / "launcher").mkdir(parents=True)
    for name in ("launcher/__init__.py", "tracked.py", "deleted.py"):
        (root / name).write_text("committed\n")
    (root / ".gitignore").write_text("ignored*\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (root / "tracked.py").write_text("changed\n")
    (root / "deleted.py").unlink()
    (root / "ünträcked.py").write_text("new\n")
    (root / "ignored.bin").write_text("data\n")
    (root / "tests").mkdir()
    (root / "tests" / "test_x.py").write_text("no run needs it\n")
    monkeypatch.setattr(code_snapshot, "checkout_root", lambda: root)
    return root


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_snapshot_is_the_working_tree(checkout: Path, tmp_path: Path) -> None:
    taken = take_snapshot(RunSpec(), tmp_path / "code")
    assert names(tmp_path / "code") == [".gitignore", "launcher/__init__.py", "tracked.py", "ünträcked.py"]
    assert (tmp_path / "code" / "tracked.py").read_text() == "changed\n"
    assert (tmp_path / "code" / "tracked.py").stat().st_mode & 0o222 == 0
    assert (taken.files, taken.sha256) == (4, digest(tmp_path / "code"))
    (tmp_path / "code" / "launcher" / "__pycache__").mkdir()
    (tmp_path / "code" / "launcher" / "__pycache__" / "x.pyc").touch()
    assert taken.sha256 == digest(tmp_path / "code")
    (tmp_path / "code" / "more.py").touch()
    assert taken.sha256 != digest(tmp_path / "code")


def test_large_files_are_left_out_and_a_large_tree_is_refused(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "weights.bin").write_bytes(bytes(2000))
    monkeypatch.setattr(code_snapshot, "LARGEST_FILE", 1000)
    assert take_snapshot(RunSpec(), tmp_path / "a").left_out == ("weights.bin",)
    assert not (tmp_path / "a" / "weights.bin").exists()
    monkeypatch.setattr(code_snapshot, "LARGEST_FILE", 1 << 30)
    monkeypatch.setattr(code_snapshot, "LARGEST_SNAPSHOT", 1000)
    with pytest.raises(ConfigError, match=r"list it in \.gitignore\. Largest: weights\.bin \(0 MiB\), "):
        take_snapshot(RunSpec(), tmp_path / "b")


def test_modules_that_the_config_names_go_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    monkeypatch.setattr(code_snapshot, "checkout_root", lambda: None)
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "mine" / "deep" / "scores.py").touch()
    (tmp_path / "alone.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for metric, expected in (
        ("mine.deep.scores:f", ["mine/__init__.py", "mine/deep/scores.py"]),
        ("alone:f", ["alone.py"]),
        ("json:dumps", []),
        ("numpy:mean", []),
        ("nowhere:f", []),
    ):
        spec = RunSpec(evaluation=EvaluationSpec(metric=metric))
        assert code_snapshot.has_own_code(spec) == bool(expected)
        take_snapshot(spec, tmp_path / metric)
        assert names(tmp_path / metric) == expected


def test_run_directory_has_code_lock_and_environment(workdir: Path, fake_python: str) -> None:
    assert main(["submit", "cfg.yaml", fake_python]) == 0
    assert (RUN.code / "sft" / "__main__.py").is_file()
    assert f"export PYTHONPATH={workdir}/runs/first/bundle/code$" in RUN.script.read_text()
    lock = read_lockfile(RUN.lock)
    assert lock["code"]["sha256"] == digest(RUN.code)
    assert [entry["bytes"] for entry in lock["files"]["data.train"].values()] == [35]
    assert list(lock["files"]["model.path"]) == [f"{workdir}/model/config.json"]
    environment = json.loads(RUN.environment.read_text())
    assert environment["packages"]["submitit"].startswith("1.5")


def test_lock_is_submitted_again_as_a_new_run(
    workdir: Path, fake_python: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "cfg.yaml", fake_python, "--follow"]) == 0
    shutil.copy(RUN.lock, "elsewhere.lock.yaml")
    assert main(["submit", "elsewhere.lock.yaml", "--json"]) == 0
    child = RunPaths(Path("runs/first-2"))
    assert read_manifest(child).parent_run == str(RUN.root.absolute())
    was, now = (yaml.safe_load(paths.config.read_text()) for paths in (RUN, child))
    assert now == {**was, "name": "first-2"}
    assert main(["submit", str(RUN.lock), "run_root=other"]) == 0
    assert Path("other/first/manifest.json").is_file()
    capsys.readouterr()
    Path("a.jsonl").write_text('{"prompt": "a", "completion": "x"}\n')
    assert main(["submit", "elsewhere.lock.yaml"]) == ExitCode.BAD_INPUT
    err = capsys.readouterr().err
    assert f"data.train: {workdir}/a.jsonl is not what it was when elsewhere.lock.yaml was made: sha256 " in err
    assert not Path("runs/first-3").exists()
    assert main(["submit", "elsewhere.lock.yaml", "data.train=a.jsonl"]) == 0


def test_files_of_one_source_are_replaced_and_the_others_compared(
    workdir: Path, fake_python: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = "data: {sources: {one: {files: a.jsonl}, two: {files: b.jsonl}}, seq_length: 128}\n"
    config = Path("cfg.yaml").read_text().replace('data: {train: "*.jsonl", seq_length: 128}\n', sources)
    Path("cfg.yaml").write_text(config)
    for name in ("b.jsonl", "c.jsonl"):
        shutil.copy("a.jsonl", name)
    assert main(["submit", "cfg.yaml", fake_python, "--follow"]) == 0
    shutil.copy(RUN.lock, "elsewhere.lock.yaml")
    Path("b.jsonl").unlink()
    assert main(["submit", "elsewhere.lock.yaml", "data.sources.two.files=c.jsonl"]) == 0
    Path("a.jsonl").write_text('{"prompt": "a", "completion": "x"}\n')
    capsys.readouterr()
    assert main(["submit", "elsewhere.lock.yaml", "data.sources.two.files=c.jsonl"]) == ExitCode.BAD_INPUT
    assert f"data.sources: {workdir}/a.jsonl is not what it was" in capsys.readouterr().err


def test_changed_code_is_not_submitted_again(
    workdir: Path, fake_python: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BAD_RANK", "1")
    monkeypatch.setenv("FAKE_CODE", "1")
    assert main(["submit", "cfg.yaml", fake_python, "--follow"]) == 1
    (RUN.code / "sft" / "new.py").touch()
    assert main(["resubmit", "first"]) == ExitCode.CONFLICT
    assert "bundle/code was changed since run first was submitted" in capsys.readouterr().err
    (RUN.code / "sft" / "new.py").unlink()
    assert main(["resubmit", "first"]) == 0


def test_killed_submission_of_a_lock_is_finished_not_doubled(
    workdir: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.scheduler.slurm.scheduler.Slurm.settle_seconds", 0.0)
    commands.add("srun", "")
    commands.add("sbatch", "echo 1")
    assert main(["submit", "cfg.yaml", "--cluster=slurm-dev"]) == 0
    commands.add("sbatch", "kill -9 $$")
    commands.add("squeue", "exit 1")
    assert main(["submit", str(RUN.lock)]) == ExitCode.SCHEDULER
    commands.add("squeue", "")
    commands.add("sacct", "exit 1")
    commands.add("sbatch", "echo 2")
    assert main(["submit", str(RUN.lock)]) == 0
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["first", "first-2"]
