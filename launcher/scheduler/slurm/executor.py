"""A submitit executor that submits exactly the rendered script, through `_submit_command` and without a pickle.

submitit calls sbatch and keeps the submitted script; its pickled functions, its requeue and its guesses about states
are not used. The private methods that are relied upon are named in tests/launcher/scheduler/slurm/test_executor.py, and
submitit is pinned to the minor version in which they were read.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from launcher.contract.errors import SchedulerError
from launcher.scheduler.base import SubmissionUnknown
from launcher.scheduler.slurm.environment import clean_environment
from launcher.scheduler.slurm.refusals import advice

SBATCH_TIMEOUT = 60
"""Seconds for sbatch to answer; a loaded controller takes some."""

_ANSWER = re.compile(r"(?P<id>[0-9]+)(;(?P<cluster>\S+))?")
"""What `sbatch --parsable` prints; with the cluster where one of several was asked for."""
_TIMED_OUT = 124  # what coreutils `timeout` exits with
_LOST = ("timed out", "zero bytes", "send/recv", "transport endpoint", "connection reset", "unexpected message")
"""In the message of an sbatch that has sent the job and lost the answer; one that cannot connect has sent nothing."""


class ScriptSlurmExecutor(SlurmExecutor):
    """Submits a given text by sbatch, with `options` on its command line and without the variables `hidden`."""

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
        self.cluster = ""
        """Which of several clusters has taken the job, once it is submitted; empty for the one at hand."""

    def submit_script(self) -> str:
        """Submit the script and return the job id."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            # submitit prints what sbatch said and raises it as well
            with _environment(clean_environment(self.hidden)), contextlib.redirect_stderr(io.StringIO()):
                return str(self._submit_command("").job_id)
        except FailedJobError as error:
            code = getattr(error.__cause__, "returncode", None)
            if code == _TIMED_OUT:
                raise SubmissionUnknown(f"sbatch gave no answer within {SBATCH_TIMEOUT} s") from None
            if code is not None and code < 0:
                raise SubmissionUnknown(f"sbatch was ended by signal {-code}") from None
            if any(words in str(error).lower() for words in _LOST):
                raise SubmissionUnknown(f"sbatch lost the controller's answer:\n{_said(error)}") from None
            raise SchedulerError(f"sbatch refused the job:\n{_said(error)}{advice(str(error))}") from None
        except FailedSubmissionError as error:
            raise SubmissionUnknown(f"sbatch answered without a job id: {error}") from None
        except KeyboardInterrupt:
            raise SubmissionUnknown("interrupted while sbatch was running") from None
        except OSError as error:
            raise SchedulerError(f"sbatch could not be started: {error}") from None

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        bounded = ["timeout", "--kill-after=5", str(SBATCH_TIMEOUT)]
        return [*bounded, "sbatch", "--parsable", *self.options, str(submission_file_path)]

    def _get_job_id_from_submission_command(self, string: bytes | str) -> str:  # type: ignore[override]
        text = string.decode() if isinstance(string, bytes) else string
        answers = list(filter(None, map(_ANSWER.fullmatch, map(str.strip, text.splitlines()))))
        if not answers:
            raise FailedSubmissionError(repr(text))
        self.cluster = answers[-1]["cluster"] or ""  # sites wrap sbatch in scripts that print more
        return answers[-1]["id"]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set the whole environment for the body: submitit passes os.environ on to its processes as it is."""
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
