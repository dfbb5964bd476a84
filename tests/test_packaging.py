"""The wheel in an empty environment, away from the checkout: the launcher works without torch and finds its files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.conftest import write_workdir

pytestmark = pytest.mark.slow  # pip builds a wheel and installs its dependencies

CHECKOUT = Path(__file__).parents[1]
SOURCES = ("launcher", "sft", "templates", "cluster_configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    """Return what a command prints; its environment says nothing of the checkout or of another environment."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "SFT_LAUNCHER_HOME", "SFT_RUN_ROOT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that holds the wheel and what it depends on."""
    root = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, root / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (root / "source").mkdir(exist_ok=True)
            shutil.copy(source, root / "source")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir=.", root / "source", cwd=root)
    (wheel,) = root.glob("*.whl")
    run(sys.executable, "-m", "venv", root / "env", cwd=root)
    run(root / "env" / "bin" / "python", "-m", "pip", "install", "--quiet", wheel, cwd=root)
    shutil.rmtree(root / "source")
    return root / "env" / "bin"


def test_nothing_of_the_training_side_is_installed(programs: Path, tmp_path: Path) -> None:
    packages = run(programs / "python", "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    names = {line.partition("==")[0].lower() for line in packages.splitlines()}
    assert "slurm-sft-launcher" in names
    assert names.isdisjoint({"torch", "megatron-core", "pytorch-lightning", "transformers", "numpy"})


def test_commands_find_templates_and_cluster_files(programs: Path, tmp_path: Path) -> None:
    write_workdir(tmp_path)
    launcher = programs / "launcher"
    assert "submit" in run(launcher, "--help", cwd=tmp_path)
    assert "2 ranks" in run(launcher, "validate", "cfg.yaml", cwd=tmp_path)
    script = run(launcher, "render", "cfg.yaml", "--cluster", "slurm-dev", cwd=tmp_path)
    assert "#SBATCH --ntasks-per-node=2" in script
    assert "srun" in script
