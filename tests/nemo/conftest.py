"""The oracle: the Python of .venv-nemo (scripts/bootstrap-nemo). Without it these tests are skipped, and say so."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-nemo" / "bin" / "python"

Oracle = Callable[[str, Any], Any]
"""(command of oracle.py, request) -> answer."""


@pytest.fixture
def oracle(tmp_path: Path) -> Oracle:
    """Asks the real NeMo; every question starts a process, which takes ten to twenty seconds to import it."""
    if not (ROOT / ".venv-nemo" / ".installed").is_file():
        pytest.skip(
            "the oracle environment is not built: `make test-nemo` builds it (NeMo 2.7.3, 2.5 GB) and runs this"
        )

    def ask(command: str, request: Any) -> Any:
        question, answer = tmp_path / "question.json", tmp_path / "answer.json"
        question.write_text(json.dumps(request))
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PYTHONPATH"))}
        done = subprocess.run(
            [PYTHON, Path(__file__).with_name("oracle.py"), command, question, answer],
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"oracle.py {command}:\n{done.stderr[-6000:]}"
        return json.loads(answer.read_text())

    return ask
