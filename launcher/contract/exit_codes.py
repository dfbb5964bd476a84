"""Exit codes of both programs, with what each means to a user. `launcher --help` and docs/exit-codes.md
print them from here.

Where sysexits.h has a number that fits, it is used: 74 is an I/O error, 75 a temporary failure that a retry may fix.
"""

from __future__ import annotations

from enum import IntEnum

_PAGE = """# Exit codes

What `python -m launcher` and `python -m sft` exit with. `launcher reference exit-codes` prints this page.
`submit --follow`, `logs -f` and `wait` exit with the run's own exit code.

| code | name | meaning |
|---|---|---|
"""


class ExitCode(IntEnum):
    """What `python -m launcher` and `python -m sft` exit with."""

    meaning: str

    def __new__(cls, code: int, meaning: str = "") -> ExitCode:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    OK = 0, "done"
    FAILURE = 1, "a bug or an unforeseen fault; --debug shows the traceback"
    BAD_INPUT = 2, "config, data, model or arguments are wrong: nothing was submitted, a retry would fail too"
    SCHEDULER = 3, "the scheduler cannot be reached, or refused"
    CONFLICT = 4, "the run's state does not allow it (still active, already finished, unknown run)"
    IO_ERROR = 74, "a checkpoint or file could not be written; the last complete checkpoint is untouched"
    REQUEUE = 75, "stopped on request with a complete checkpoint: `launcher resubmit` resumes"
    HANG = 76, "no rank finished a step in time; hang.json says where each of them was"
    BAD_NODE = 77, "a node failed its preflight checks: the run belongs on other nodes"
    # Other resiliency tools use the same number for it.
    NEVER_REQUEUE = 93, "another start would end the same way"
    TIMED_OUT = 124, "`launcher wait --timeout`: the runs are still active"
    INTERRUPTED = 130, "interrupted (Ctrl-C)"


def exit_code_reference() -> str:
    """Return the page docs/exit-codes.md."""
    return _PAGE + "".join(f"| {code.value} | `{code.name}` | {code.meaning} |\n" for code in ExitCode)
