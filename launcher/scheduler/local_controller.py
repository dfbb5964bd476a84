"""submitit's local controller with a given script: time limit and warning signal for a run on this machine.

As for Slurm, submitit's pickled functions are not used. The private methods that are relied upon are named in
tests/launcher/scheduler/slurm/test_executor.py.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TypeVar

from submitit.local.local import LocalExecutor, LocalJob

from launcher.contract.time_limit import time_limit_minutes

_Result = TypeVar("_Result")  # of submitit's functions, which are not used

TOKEN_VARIABLE = "SFT_SUBMISSION"
"""Environment variable in which a local run carries the token of its submission."""


class ScriptLocalExecutor(LocalExecutor):
    """Runs a given script under the controller, in a session of its own, so that it outlives the shell."""

    def __init__(self, folder: Path, time_limit: str | None, signal_seconds: int, token: str = "") -> None:
        super().__init__(folder)
        self.token = token
        a_year = 365 * 24 * 60.0
        self.update_parameters(
            timeout_min=time_limit_minutes(time_limit) or a_year, signal_delay_s=signal_seconds, stderr_to_stdout=True
        )

    def submit_script(self, script: Path) -> str:
        """Start the controller and return its process id, which is also that of its session."""
        return str(self._submit_command(shlex.join(["bash", str(script)])).job_id)

    def _submit_command(self, command: str) -> LocalJob[_Result]:
        # submitit's start_controller leaves the controller in the shell's session, where it dies with the terminal.
        environment = {
            **os.environ,
            TOKEN_VARIABLE: self.token,
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": "1",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(int(60 * self.parameters["timeout_min"])),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(self.parameters["signal_delay_s"]),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
        }
        log = str(self.folder / "controller.log")
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "submitit.local._local", str(self.folder)],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        return LocalJob(folder=self.folder, job_id=str(pid))
