"""submitit executors that submit exactly the rendered script, through `_submit_command` and without a pickle.

submitit brings the submission, the job handle and the local controller (time limit, warning signal); its pickled
functions, its requeue and its state guesses are not in play. The private methods relied upon are named in
tests/launcher/scheduler/test_executor.py, and submitit is pinned to the minor version they were read in.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor

from launcher.contract.errors import SchedulerError
from launcher.scheduler.environment import clean_environment
from launcher.scheduler.slurm import time_limit_minutes
from launcher.submission.intent import SBATCH_TIMEOUT, TOKEN_VARIABLE

_TIMED_OUT = 124  # what coreutils `timeout` exits with
_LOST = ("timed out", "zero bytes", "send/recv", "transport endpoint", "connection reset", "unexpected message")
"""Words of an sbatch whose job was sent and whose answer was lost; one that cannot connect has sent nothing."""


class SubmissionUnknown(SchedulerError):
    """sbatch was given up on, and may have succeeded all the same."""


class ScriptSlurmExecutor(SlurmExecutor):
    """sbatch of a given text, with `options` on its command line and without the variables `hidden`."""

    def __init__(self, folder: Path, script: str, options: Sequence[str] = (), hidden: Collection[str] = ()) -> None:
        try:
            super().__init__(folder)
        except RuntimeError:
            raise SchedulerError(
                "Slurm's commands are not on PATH; submit from a login node of the cluster, or use --cluster local"
            ) from None
        self.script = script
        self.options = tuple(options)
        self.hidden = frozenset(hidden)

    def submit_script(self) -> str:
        """Submit and return the job id."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with _environment(clean_environment(self.hidden)):
                return str(self._submit_command("").job_id)
        except FailedJobError as error:
            code = getattr(error.__cause__, "returncode", None)
            if code == _TIMED_OUT:
                raise SubmissionUnknown(f"sbatch gave no answer within {SBATCH_TIMEOUT} s") from None
            if code is not None and code < 0:
                raise SubmissionUnknown(f"sbatch was ended by signal {-code}") from None
            if any(words in str(error).lower() for words in _LOST):
                raise SubmissionUnknown(f"sbatch lost the controller's answer:\n{_said(error)}") from None
            raise SchedulerError(f"sbatch refused the job:\n{_said(error)}") from None
        except FailedSubmissionError as error:
            raise SubmissionUnknown(f"sbatch answered without a job id: {error}") from None
        except KeyboardInterrupt:
            raise SubmissionUnknown("interrupted while sbatch was at work") from None
        except OSError as error:
            raise SchedulerError(f"sbatch could not be started: {error}") from None

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        bounded = ["timeout", "--kill-after=5", str(SBATCH_TIMEOUT)]
        return [*bounded, "sbatch", "--parsable", *self.options, str(submission_file_path)]

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        text = string.decode() if isinstance(string, bytes) else string
        lines = text.strip().splitlines()
        job_id = lines[-1].partition(";")[0] if lines else ""  # JOBID;CLUSTER on a federation
        if not job_id.isdigit():
            raise FailedSubmissionError(repr(text))
        return job_id


class ScriptLocalExecutor(LocalExecutor):
    """A given script under submitit's local controller, in a session of its own: it outlives the shell."""

    def __init__(self, folder: Path, time_limit: str | None, signal_seconds: int, token: str = "") -> None:
        super().__init__(folder)
        self.token = token
        a_year = 365 * 24 * 60.0
        self.update_parameters(
            timeout_min=time_limit_minutes(time_limit) or a_year, signal_delay_s=signal_seconds, stderr_to_stdout=True
        )

    def submit_script(self, script: Path) -> str:
        """Start the script and return its process id, which is the session's too."""
        return str(self._submit_command(shlex.join(["bash", str(script)])).job_id)

    def _submit_command(self, command: str) -> LocalJob[Any]:
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


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables for the processes started in the body: submitit passes on os.environ as it is."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _said(error: Exception) -> str:
    return "\n".join(f"  {line}" for line in str(error).splitlines() or ["(nothing)"])
