"""The errors that a user can meet.

LauncherError               exit 1
+-- ConfigError             exit 2   a key, value or file of the config is wrong
|   +-- TopologyError       exit 2   the parallel layout does not fit model, batch or machines
|   +-- DataError           exit 2   a data file or an example in it cannot be used
|   +-- ModelError          exit 2   a model directory or tokenizer is incomplete or not supported
|   +-- HubError            exit 2   a repository of the hub is absent, not for this user, or cannot be reached
|   +-- TemplateError       exit 2   a template or cluster file is missing or does not render
|   +-- UserCodeError       exit 2   a function that the config names raised
+-- SchedulerError          exit 3   Slurm cannot be reached or refused the job
+-- RunStateError           exit 4   the run is unknown, or its state does not allow the request
+-- TrainingError           exit 1   the numbers went wrong: steps without a finite loss or gradient
+-- CheckpointError         exit 74  a checkpoint cannot be written or read

A message says what is wrong (dotted key and value), why (the arithmetic) and what to do. All problems of a kind are
collected, then one error is raised.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence

from launcher.contract.exit_codes import ExitCode

_STORAGE_FAULTS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG", "ESTALE", "ENOTDIR", "EISDIR")
}


class LauncherError(Exception):
    """Base of every error that is shown without a traceback."""

    exit_code: ExitCode = ExitCode.FAILURE


class ConfigError(LauncherError):
    """One or more problems in the config, with a message each in `problems`."""

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class TopologyError(ConfigError):
    """The parallel layout breaks one or more rules."""


class DataError(ConfigError):
    """Training data that cannot be used. The message names file and line if there is one."""


class ModelError(ConfigError):
    """A model directory, tokenizer or architecture that cannot be used."""


class HubError(ConfigError):
    """A model or data set that the Hugging Face hub does not give."""


class TemplateError(ConfigError):
    """A template or cluster file that is missing or does not render."""


class UserCodeError(ConfigError):
    """A function that the config names, e.g. evaluation.metric, raised an exception."""


class SchedulerError(LauncherError):
    """Slurm did not answer, or refused."""

    exit_code = ExitCode.SCHEDULER


class RunStateError(LauncherError):
    """The run does not exist, or its state forbids what was asked."""

    exit_code = ExitCode.CONFLICT


class TrainingError(LauncherError):
    """Training stopped itself because its numbers went wrong."""


class CheckpointError(LauncherError):
    """A checkpoint could not be written or read."""

    exit_code = ExitCode.IO_ERROR


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint at the closest known word, to be put behind a message, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_storage_fault(error: OSError) -> bool:
    """Return whether a file could not be read or written for the disk's or its permissions' sake: exit code 74."""
    return error.errno in _STORAGE_FAULTS
