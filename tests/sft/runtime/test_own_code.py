"""Functions that a config names, in an archive of code: they find their files, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MODULE = "from pathlib import Path\nWORDS = (Path(__file__).parent / 'words.txt').read_text()\n"
PROGRAM = """
import sys
from sft.runtime.own_code import import_named
names = sys.argv[1:]
found = [import_named(name) for name in names]
print([module.WORDS for module in found], len({module.__file__.partition("sft-code-")[2][:8] for module in found}))
"""


@pytest.mark.parametrize("init", [True, False])  # a package with __init__.py, and a folder without
def test_a_module_of_the_archive_reads_files_beside_it(tmp_path: Path, init: bool) -> None:
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        archive.writestr("mine/", "")
        if init:
            archive.writestr("mine/__init__.py", "")
        archive.writestr("mine/scores.py", MODULE)
        archive.writestr("mine/words.txt", "in the package")
        archive.writestr("alone.py", MODULE)
        archive.writestr("words.txt", "beside the module")
    (tmp_path / "scratch").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path / 'code.zip'}{os.pathsep}{ROOT}",
        "TMPDIR": str(tmp_path / "scratch"),
    }
    command = [sys.executable, "-c", PROGRAM, "mine.scores", "alone"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("['in the package', 'beside the module'] 1\n", "")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_other_modules_are_imported_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(MODULE)
    (tmp_path / "words.txt").write_text("here")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    program = "from sft.runtime.own_code import import_named as f; print(f('alone').__file__, f('json').__name__)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{tmp_path}/alone.py json\n", "")
