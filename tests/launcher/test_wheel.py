"""What a wheel contains: every package, template and data file, and a launcher that works away from the checkout."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("launcher", "sft")


def test_setup_lists_every_package() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    listed = settings["options"]["packages"].split()
    folders = {file.parent.relative_to(ROOT) for name in PROGRAMS for file in (ROOT / name).rglob("*.py")}
    elsewhere = {"launcher.templates", "launcher.cluster_configs"}  # mapped by package_dir
    assert sorted(listed) == sorted({".".join(folder.parts) for folder in folders} | elsewhere)
    assert [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_git_ignores_no_source() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    files = [str(file) for name in (*PROGRAMS, "tests") for file in (ROOT / name).rglob("*.py")]
    words = ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(words, input="\n".join(files), capture_output=True, text=True).stdout.splitlines()
    assert ignored == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the contents of the project's wheel."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (*PROGRAMS, "templates", "cluster_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_every_file_of_its_packages(site: Path) -> None:
    moved = {"templates": "launcher/templates", "cluster_configs": "launcher/cluster_configs"}
    expected = {
        str(Path(moved.get(name, name)) / file.relative_to(ROOT / name))
        for name in (*PROGRAMS, *moved)
        for file in (ROOT / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    found = {str(file.relative_to(site)) for file in site.rglob("*") if file.is_file()}
    assert expected - found == set()


def test_the_launcher_of_the_wheel_works_away_from_the_checkout(
    site: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site))
    where = subprocess.run(
        [sys.executable, "-c", "import launcher; print(launcher.__file__)"], capture_output=True, text=True
    )
    assert where.stdout.strip() == str(site / "launcher" / "__init__.py")
    for cluster in ("local", "slurm-dev"):  # each has a template and a cluster file of its own
        words = [sys.executable, "-m", "launcher", "render", "cfg.yaml", "--cluster", cluster]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("#!/bin/bash\n")
