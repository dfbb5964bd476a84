"""What a run directory keeps to understand and repeat the run: code, lockfile, environment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher.__main__ import main
from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.manifest import read_manifest
from launcher.contract.records import read_events
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import EvaluationSpec, RunSpec
from launcher.submission import code_snapshot
from launcher.submission.code_snapshot import digest, take_snapshot
from launcher.submission.lockfile import read_lockfile
from launcher.submission.submission import make_submission
from launcher.submission.submit import prepare
from tests.launcher.conftest import Commands

CHECKOUT = Path(__file__).parents[3]
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


def names(archive: Path) -> list[str]:
    return sorted(name for name in zipfile.ZipFile(archive).namelist() if not name.endswith("/"))


def test_snapshot_is_the_working_tree(checkout: Path, tmp_path: Path) -> None:
    (checkout / "program").write_text("#!/bin/sh\n")
    (checkout / "program").chmod(0o755)
    taken = take_snapshot(RunSpec(), tmp_path / "code.zip")
    assert names(tmp_path / "code.zip") == [
        ".gitignore",
        "launcher/__init__.py",
        "program",
        "tracked.py",
        "ünträcked.py",
    ]
    archive = zipfile.ZipFile(tmp_path / "code.zip")
    assert archive.read("tracked.py") == b"changed\n"
    assert [archive.getinfo(name).external_attr >> 16 & 0o777 for name in ("program", "tracked.py")] == [0o555, 0o444]
    assert (tmp_path / "code.zip").stat().st_mode & 0o222 == 0
    archive.extractall(tmp_path / "unpacked")
    assert (taken.files, taken.sha256) == (5, digest(tmp_path / "unpacked"))


def test_the_same_files_give_the_same_archive(checkout: Path, tmp_path: Path) -> None:
    first = take_snapshot(RunSpec(), tmp_path / "a.zip")
    for file in checkout.rglob("*"):
        os.utime(file, (0, 0))
    assert take_snapshot(RunSpec(), tmp_path / "b.zip") == first
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    (checkout / "more.py").touch()
    assert take_snapshot(RunSpec(), tmp_path / "b.zip").sha256 != first.sha256


def test_a_name_that_is_no_utf8_is_left_out(checkout: Path, tmp_path: Path) -> None:
    (checkout / os.fsdecode(b"caf\xe9.txt")).touch()
    assert take_snapshot(RunSpec(), tmp_path / "code.zip").left_out == (os.fsdecode(b"caf\xe9.txt"),)


IMPORTED = """
import sys
import mine.deep.shared
from launcher.contract.hardware import gpu_kinds
from launcher.contract.model_shape import named_model_shape
from launcher.contract.named_templates import NAMES, named_template
from sft.models.registry import read_architecture

assert all(map(named_template, NAMES)) and gpu_kinds() and named_model_shape("llama2-7b")
ours = [module for name, module in sys.modules.items() if name.split(".")[0] in ("sft", "launcher")]
print({module.__file__.partition(".zip/")[0] for module in ours})
"""


def test_ranks_import_the_archive_and_find_its_data_files(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages without `__init__.py` as well."""
    shutil.rmtree(checkout / "launcher")
    for part in ("launcher", "sft"):
        shutil.copytree(CHECKOUT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "mine" / "deep").mkdir(parents=True)
    (checkout / "mine" / "deep" / "shared.py").touch()
    take_snapshot(RunSpec(), tmp_path / "code.zip")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code.zip"))
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str({str(tmp_path / "code")}), "")


def test_large_files_are_left_out_and_a_large_tree_is_refused(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "weights.bin").write_bytes(bytes(2000))
    monkeypatch.setattr(code_snapshot, "LARGEST_FILE", 1000)
    assert take_snapshot(RunSpec(), tmp_path / "a.zip").left_out == ("weights.bin",)
    assert "weights.bin" not in names(tmp_path / "a.zip")
    monkeypatch.setattr(code_snapshot, "LARGEST_FILE", 1 << 30)
    monkeypatch.setattr(code_snapshot, "LARGEST_SNAPSHOT", 1000)
    with pytest.raises(ConfigError, match=r"list it in \.gitignore\. Largest: weights\.bin \(0 MiB\), "):
        take_snapshot(RunSpec(), tmp_path / "b.zip")
    monkeypatch.setattr(code_snapshot, "LARGEST_SNAPSHOT", 1 << 30)
    monkeypatch.setattr(code_snapshot, "MOST_FILES", 3)
    with pytest.raises(ConfigError, match=r"would have 5 files, more than 3; keep data out"):
        take_snapshot(RunSpec(), tmp_path / "b.zip")


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
        take_snapshot(spec, tmp_path / f"{metric}.zip")
        assert names(tmp_path / f"{metric}.zip") == expected


def test_a_module_beside_the_config_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    """It did with `python -m launcher` alone; jobs of the command `launcher` ended in `prepare` without it."""
    (tmp_path / "my_metrics.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    monkeypatch.setattr(code_snapshot, "checkout_root", lambda: None)
    spec = RunSpec(evaluation=EvaluationSpec(metric="my_metrics:accuracy"))
    take_snapshot(spec, tmp_path / "code.zip")
    assert names(tmp_path / "code.zip") == ["my_metrics.py"]


def test_run_directory_has_code_lock_and_environment(workdir: Path, fake_python: str) -> None:
    assert main(["submit", "cfg.yaml", fake_python]) == 0
    assert {"sft/__main__.py", "templates/base.sh.j2"} <= set(names(RUN.code))
    assert [path.name for path in RUN.code.parent.iterdir() if path != RUN.environment] == ["code.zip"]
    assert f"export PYTHONPATH={workdir}/runs/first/bundle/code.zip$" in RUN.script.read_text()
    for name, sha256 in read_manifest(RUN).digests.items():
        assert hashlib.sha256((RUN.root / name).read_bytes()).hexdigest() == sha256
    assert sorted(read_manifest(RUN).digests) == ["bundle/code.zip", "job.sh"]
    lock = read_lockfile(RUN.lock)
    unpack(RUN.code, workdir / "unpacked")
    assert lock["code"]["sha256"] == digest(workdir / "unpacked")
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


@pytest.fixture
def failed(workdir: Path, fake_python: str, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run that failed."""
    monkeypatch.setenv("FAKE_BAD_RANK", "1")
    monkeypatch.setenv("FAKE_CODE", "1")
    assert main(["submit", "cfg.yaml", fake_python, "--follow"]) == 1
    return RunPaths(RUN.root.absolute())


def unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)


@contextlib.contextmanager
def damaged(file: Path) -> Iterator[None]:
    """One byte is another while the block runs."""
    before, mode = file.read_bytes(), file.stat().st_mode
    file.chmod(0o644)
    middle = len(before) // 2
    file.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    yield
    file.write_bytes(before)
    file.chmod(mode)


@pytest.mark.parametrize("name", ["bundle/code.zip", "job.sh"])
def test_damaged_code_or_script_is_not_submitted_again(
    failed: RunPaths, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with damaged(failed.root / name):
        assert main(["resubmit", "first"]) == ExitCode.CONFLICT
    said = capsys.readouterr().err
    assert f"{failed.root / name} is not what was submitted: damaged, or changed since; restore it, or start" in said
    with damaged(failed.root / name):
        (failed.root / name).unlink()
        assert main(["resubmit", "first"]) == ExitCode.CONFLICT
    assert main(["resubmit", "first"]) == 0


def test_a_job_looks_at_its_code_before_it_starts_anything(failed: RunPaths) -> None:
    with damaged(failed.code):
        done = subprocess.run(["bash", str(failed.script)])
    assert done.returncode == ExitCode.BAD_INPUT
    (last,) = (event for event in read_events(failed) if event.get("attempt") == "local-2" and "exit_code" in event)
    assert str(last["detail"]).startswith("bundle/code.zip is not what was submitted, by its digest in manifest.json")
    assert "prepare" not in (failed.logs / "local-2" / "batch.log").read_text()
    assert subprocess.run(["bash", str(failed.script)]).returncode == 1  # that of its bad rank


GOES_ON = """
case "$2 $3" in
  "launcher.attempts.attempt end") echo requeue; exit ;;
  "launcher.attempts.attempt begin")
    [ ! -e damage ] || { rm damage; echo '# damaged' >>job.sh; }
    exit
    ;;
esac
exit 75
"""


@pytest.mark.parametrize(("damage", "attempts"), [(False, 3), (True, 1)])
def test_a_damaged_script_does_not_start_itself_again(
    workdir: Path, commands: Commands, damage: bool, attempts: int
) -> None:
    """The script is damaged in its first attempt, and otherwise goes on until a third is there."""
    stop = '[ ! -d logs/local-3 ] || [ "$3" != end ] || exit 0\n'
    python = commands.add("rank-python", stop + GOES_ON)
    submission = make_submission(Path("cfg.yaml"), [f"cluster.runtime.python={python}"])
    prepare(submission, ["test"], "group")
    if damage:
        (RUN.root / "damage").touch()
    subprocess.run(["bash", str(RUN.script.absolute())])
    assert len(list(RUN.logs.glob("local-*"))) == attempts
    said = (RUN.logs / f"local-{attempts}" / "batch.log").read_text()
    assert ("job.sh is not what was submitted, so the run does not go on" in said) is damage


def test_a_run_with_a_folder_of_code_is_resubmitted_as_it_was(
    failed: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions copied each file, and noted no digests in the manifest."""
    unpack(failed.code, failed.loose_code)
    failed.code.unlink()
    failed.script.write_text(failed.script.read_text().replace("unchanged bundle/code.zip", "true").replace(".zip", ""))
    values = json.loads(failed.manifest.read_text())
    del values["digests"]
    failed.manifest.write_text(json.dumps(values))
    (failed.loose_code / "sft" / "__pycache__").mkdir()
    (failed.loose_code / "sft" / "__pycache__" / "x.pyc").touch()
    (failed.loose_code / "sft" / "new.py").touch()
    assert main(["resubmit", "first"]) == ExitCode.CONFLICT
    assert "bundle/code is not what was submitted" in capsys.readouterr().err
    (failed.loose_code / "sft" / "new.py").unlink()
    assert main(["status", "first"]) == 0
    assert main(["resubmit", "first"]) == 0
    assert main(["submit", str(failed.lock)]) == 0
    assert f"for the run's own: cd {failed.loose_code} && python -m launcher" in capsys.readouterr().err


def test_the_note_on_the_runs_own_code_can_be_pasted(
    failed: RunPaths, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["submit", str(failed.lock)]) == 0
    said = capsys.readouterr().err
    (note,) = (line.partition("the run's own: ")[2] for line in said.splitlines() if line.startswith("code "))
    words = note.replace("python -m", f"{sys.executable} -m")
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run(["bash", "-c", f"{words} name=third"], cwd=workdir, env=environment, check=True)
    third = RunPaths(workdir / "runs" / "third")
    assert read_lockfile(third.lock)["code"]["files"] > 300


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
