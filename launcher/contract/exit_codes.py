"""Exit codes of both programs, in one place because batch scripts, tests and people read them.

The numbers of the rank program follow sysexits.h where it has a fitting one, so that a shell can tell
a full disk (74) from a request to be started again (75).
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What `python -m launcher` and `python -m sft` exit with."""

    OK = 0
    """Done."""
    FAILURE = 1
    """A bug or an unforeseen fault; `--debug` shows the traceback."""
    BAD_INPUT = 2
    """The config, data, model or arguments are wrong: nothing was submitted, nothing is worth retrying."""
    SCHEDULER = 3
    """The scheduler cannot be reached, or refused."""
    CONFLICT = 4
    """The run's state does not allow it (still active, already finished, unknown run)."""
    IO_ERROR = 74
    """A checkpoint or file could not be written; the last complete checkpoint is untouched."""
    REQUEUE = 75
    """Stopped on request at a step boundary with a complete checkpoint: start again to go on."""
    HANG = 76
    """No rank finished a step for too long; the watchdog wrote down where each of them stood, and ended them."""
    BAD_NODE = 77
    """A node failed its preflight checks: the run belongs on other nodes."""
    NEVER_REQUEUE = 93
    """A program's word that another start would end the same way; other resiliency tools use the same number."""
    TIMED_OUT = 124
    """`launcher wait --timeout`: the runs go on."""
    INTERRUPTED = 130
    """Ctrl-C."""
