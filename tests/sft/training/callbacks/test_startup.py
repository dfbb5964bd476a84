"""What the log says of packages without bytecode; the phases of the first step are in tests/parity/test_startup.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ASK = """
import sys
sys.path.insert(0, sys.argv[1])
import plain
from sft.training.callbacks.startup import lacks_bytecode
print(lacks_bytecode(plain), lacks_bytecode(sys))
"""


@pytest.mark.parametrize(("options", "answer"), [([], "False False"), (["-B"], "True False")])
def test_bytecode_that_python_does_not_keep_is_noticed(tmp_path: Path, options: list[str], answer: str) -> None:
    (tmp_path / "plain.py").touch()
    command = [sys.executable, "-W", "ignore", *options, "-c", ASK, str(tmp_path)]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    told = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    assert told.strip() == answer
