"""scripts/structure: a tree that meets every goal passes, and each fault that the script counts makes it fail."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "structure"

FAMILY = "source files to touch for a model family"

GOOD = {
    "launcher/__init__.py": "",
    "launcher/contract/spec.py": 'DOC = "data.chat_template, model.tokenizer"\n',
    "launcher/runs/find.py": "from launcher.contract import spec\n",
    "launcher/views/logs.py": "from launcher.runs.find import spec\n",
    "launcher/scheduler/choose.py": 'def choose(scheduler: str) -> bool:\n    return scheduler == "slurm"\n',
    "sft/__init__.py": "",
    "sft/models/__init__.py": "",
    "sft/models/registry.py": "FAMILIES = ()\n",
    "sft/kernels/norm.py": "X = 1  # a reason\n",
}

FAULTS = {
    "import cycles among the packages of launcher/": {
        "launcher/runs/find.py": "def late() -> None:\n    from launcher.views import logs\n"
    },
    "import cycles among the packages of sft/": {
        "sft/hf/files.py": "import sft.nemo.read\n",
        "sft/nemo/read.py": "from sft.hf.files import sft\n",
    },
    "modules of launcher/ outside contract/ that sft/ imports": {
        "sft/data/rows.py": "from launcher.runs import find\n"
    },
    "modules directly under sft/": {f"sft/{name}.py": "" for name in ("a", "b", "c")},
    "places that test the scheduler by its word": {
        "launcher/views/table.py": 'def own(job: str) -> bool:\n    return job.startswith("local-")\n'
    },
    "lists of path-valued config keys outside the spec": {
        "launcher/runs/paths.py": "def named(spec):\n    return [spec.data.chat_template, spec.model.tokenizer]\n"
    },
    "`Any` per 1,000 lines of sft/": {"sft/data/rows.py": "from typing import Any\n\nrow: Any = 1\n"},
    "comment lines per 100 code lines: kernels, layers, optimizer": {"sft/kernels/norm.py": "X = 1\n"},
    "function docstrings that hide the result behind a semicolon": {
        "launcher/runs/load.py": 'def load() -> None:\n    """Load a run; its path."""\n'
    },
    "words with several meanings": {"launcher/contract/manifest.py": "class Attempt:\n    pass\n"},
    FAMILY: {
        "sft/models/families/other.py": "",
        "sft/engine/module.py": "",
        "sft/models/registry.py": "FAMILIES = 1\n",
    },
}


def write(root: Path, files: dict[str, str]) -> None:
    """Write files below a folder."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def commit(root: Path, files: dict[str, str]) -> None:
    """Write files and commit them."""
    write(root, files)
    for arguments in (["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "a change"]):
        subprocess.run(["git", "-C", str(root), *arguments], check=True)


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    """Load the script, whose name has no suffix, as a module."""
    loader = SourceFileLoader("structure", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("structure", loader))  # type: ignore[arg-type]
    sys.modules["structure"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository that meets every goal."""
    root = tmp_path_factory.mktemp("good")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    commit(root, GOOD)
    commit(root, {"sft/models/families/small.py": "", "sft/models/registry.py": 'FAMILIES = ("small",)\n'})
    return root


def test_a_tree_that_meets_every_goal_passes(good: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(good)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " NO" not in done.stdout


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_counted_in_its_own_row(structure: ModuleType, good: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "tree"
    shutil.copytree(good, root)
    (commit if name == FAMILY else write)(root, FAULTS[name])
    shown: list[str] = []
    assert structure.report(root, shown.append) == 1
    missed = [line for line in shown[0].splitlines() if line.endswith(" NO")]
    assert len(missed) == 1, shown
    assert missed[0].startswith(name)


def test_a_tree_without_history_has_no_figure_for_families(structure: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    shown: list[str] = []
    assert structure.report(tmp_path, shown.append) == 0
    (row,) = (line for line in shown[0].splitlines() if line.startswith(FAMILY))
    assert row.split()[-2:] == ["-", "-"]
