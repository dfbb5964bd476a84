"""What we rely on in submitit's local controller, and the limits that it gets."""

from __future__ import annotations

import inspect
from pathlib import Path

from submitit.local import local

from launcher.scheduler.local_controller import ScriptLocalExecutor


def test_controller_reads_the_variables_we_set() -> None:
    source = inspect.getsource(local.Controller.__init__)
    for name in ("NTASKS", "COMMAND", "TIMEOUT_S", "SIGNAL_DELAY_S", "WITH_SHELL"):
        assert f'"SUBMITIT_LOCAL_{name}"' in source
    assert '"SUBMITIT_STDERR_TO_STDOUT"' in source


def test_local_limits(tmp_path: Path) -> None:
    assert ScriptLocalExecutor(tmp_path, "1:00:00", 30).parameters["timeout_min"] == 60
    assert ScriptLocalExecutor(tmp_path, None, 30).parameters["timeout_min"] == 365 * 24 * 60
