"""What the value of a config field must be, written beside the field: `nodes: Annotated[int, AtLeast(1)] = 1`.

A rule looks at one value of one field and at no file. Rules that take several fields together are in
`launcher.contract.config.checks`, rules for paths in `launcher.contract.spec.paths`.
"""

from __future__ import annotations

import datetime
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard

from launcher.contract.rundir import RUN_NAME


class Rule(ABC):
    """One condition on the value of a field. Fields that are unset (None) are not checked."""

    __slots__ = ()

    @property
    @abstractmethod
    def description(self) -> str:
        """What the value must be, in words that fit after `is not` and into the reference page."""

    @abstractmethod
    def allows(self, value: object) -> bool:
        """Return whether one value is right."""

    def values(self, value: object) -> Iterable[object]:
        """Return what the rule is about: the items of a list, the values of a mapping, or the value itself."""
        if isinstance(value, list):
            return value
        return value.values() if isinstance(value, dict) else [value]

    def problem(self, value: object) -> str:
        """Return the message for a value that is wrong."""
        return f"{shown(value)} is not {self.description}"


@dataclass(frozen=True, slots=True)
class AtLeast(Rule):
    """A finite number, not below `least`."""

    least: float

    @property
    def description(self) -> str:
        return f"at least {self.least:g}"

    def allows(self, value: object) -> bool:
        return _is_number(value) and self.least <= value < math.inf


@dataclass(frozen=True, slots=True)
class Above(Rule):
    """A finite number above `bound`; `hint` follows the message."""

    bound: float
    hint: str = ""

    @property
    def description(self) -> str:
        return f"above {self.bound:g}"

    def allows(self, value: object) -> bool:
        return _is_number(value) and self.bound < value < math.inf

    def problem(self, value: object) -> str:
        return _with_hint(f"{shown(value)} is not {self.description}", self.hint)


@dataclass(frozen=True, slots=True)
class Fraction(Rule):
    """A number in [0, 1): a dropout, a decay."""

    @property
    def description(self) -> str:
        return "in [0, 1)"

    def allows(self, value: object) -> bool:
        return _is_number(value) and 0 <= value < 1


@dataclass(frozen=True, slots=True)
class Probability(Rule):
    """A number in (0, 1]."""

    @property
    def description(self) -> str:
        return "in (0, 1]"

    def allows(self, value: object) -> bool:
        return _is_number(value) and 0 < value <= 1


@dataclass(frozen=True, slots=True)
class Percent(Rule):
    """A number from 0 to 100."""

    @property
    def description(self) -> str:
        return "from 0 to 100"

    def allows(self, value: object) -> bool:
        return _is_number(value) and 0 <= value <= 100


@dataclass(frozen=True, slots=True)
class Bits(Rule):
    """An integer whose absolute value has at most `most` bits: what generators and lengths can be."""

    most: int

    @property
    def description(self) -> str:
        return f"of at most {self.most} bits"

    def allows(self, value: object) -> bool:
        return isinstance(value, int) and value.bit_length() <= self.most


@dataclass(frozen=True, slots=True, eq=False)
class Pattern(Rule):
    """A text that matches `regex` as a whole.

    `what` names such a text, `hint` follows the message. Two patterns are never equal: which one a field has can mean
    more than its form.
    """

    regex: re.Pattern[str]
    what: str
    hint: str = ""

    @property
    def description(self) -> str:
        return self.what

    def allows(self, value: object) -> bool:
        return self.regex.fullmatch(str(value)) is not None

    def problem(self, value: object) -> str:
        return _with_hint(f"{shown(value)} is not {self.what}", self.hint)


@dataclass(frozen=True, slots=True)
class Day(Rule):
    """A day of the calendar, YYYY-MM-DD."""

    @property
    def description(self) -> str:
        return "a day, YYYY-MM-DD"

    def allows(self, value: object) -> bool:
        try:
            return datetime.date.fromisoformat(str(value)).isoformat() == value  # 20260131 is ISO, too
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class Names(Rule):
    """The names of a mapping follow `rule`."""

    rule: Rule

    @property
    def description(self) -> str:
        return self.rule.description

    def allows(self, value: object) -> bool:
        return self.rule.allows(value)

    def values(self, value: object) -> Iterable[object]:
        return list(value) if isinstance(value, dict) else []

    def problem(self, value: object) -> str:
        return self.rule.problem(value)


@dataclass(frozen=True, slots=True)
class NumberText(Rule):
    """A text that is a number which follows `rule`: the values of mappings are texts."""

    rule: Rule

    @property
    def description(self) -> str:
        return f"a number, {self.rule.description}"

    def allows(self, value: object) -> bool:
        try:
            return self.rule.allows(float(str(value)))
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class Required(Rule):
    """A field that must not be empty; `what` says what to give."""

    what: str

    @property
    def description(self) -> str:
        return "required"

    def allows(self, value: object) -> bool:
        return bool(value)

    def values(self, value: object) -> Iterable[object]:
        return [value]

    def problem(self, value: object) -> str:
        return f"missing; {self.what}"


@dataclass(frozen=True, slots=True)
class SbatchOption(Rule):
    """A further option for sbatch, none that the launcher gives itself: sbatch takes the last one, silently."""

    @property
    def description(self) -> str:
        return "an option that starts with --"

    def allows(self, value: object) -> bool:
        return str(value).startswith("--") and self._owned(value) is None

    def problem(self, value: object) -> str:
        owned = self._owned(value)
        if owned is not None:
            return f"{shown(value)} is the launcher's own: --{owned} comes from {_SBATCH_OPTIONS[owned]}"
        return f"{shown(value)} is not {self.description}; one option per item, e.g. --mail-type=END"

    def _owned(self, value: object) -> str | None:
        """Return the option of the launcher's that this is, or None. sbatch takes abbreviations, too."""
        name = re.split(r"[=\s]", str(value).removeprefix("--"))[0]
        return next((option for option in _SBATCH_OPTIONS if len(name) > 2 and option.startswith(name)), None)


_SBATCH_OPTIONS = {
    "job-name": "name",
    "array": "sweep.as: array",
    "output": "the run directory, whose logs commands read",
    "error": "the run directory, whose logs commands read",
    "open-mode": "the run directory, whose logs commands read",
    "parsable": "submit, which reads the job's id",
    "wrap": "the template",
    "wait": "submit --follow",
    "test-only": "submit --test-only",
    "nodes": "resources.nodes",
    "ntasks": "resources.tasks_per_node",
    "ntasks-per-node": "resources.tasks_per_node",
    "cpus-per-task": "resources.cpus_per_task",
    "gpus-per-node": "resources.gpus_per_node",
    "gpus-per-task": "cluster.gpu_directive",
    "mem": "resources.memory_per_node",
    "time": "resources.time",
    "partition": "resources.partition",
    "account": "resources.account",
    "qos": "resources.qos",
    "constraint": "resources.constraint",
    "reservation": "resources.reservation",
    "nodelist": "resources.nodelist",
    "exclude": "resources.exclude",
    "exclusive": "resources.exclusive",
}
"""Options that the launcher gives itself -> where their values come from."""


ENVIRONMENT_NAME = Pattern(re.compile(r"[A-Za-z_][A-Za-z0-9_]*"), "the name of an environment variable")
SHELL_VARIABLE = Pattern(ENVIRONMENT_NAME.regex, "the name of an environment variable")
"""A variable whose value comes from the shell that submits the run, and is never stored: RunSpec.secret_names."""
_NO_TRUTH = r"(?i:(?!(true|false|yes|no|on|off|none)$).+)"
WANDB_PROJECT = Pattern(re.compile(_NO_TRUTH), "the name of a project")
"""Not a word for yes or no, which would be a project of that name."""
TRACKING_PLACE = Pattern(re.compile(_NO_TRUTH), "a tracking URI or local")
NAME_OF_RUN = Pattern(RUN_NAME, "a run name: letters, digits, '.', '_', '-', first a letter or digit, <= 128")
SET_NAME = Pattern(RUN_NAME, "a name: letters, digits, '.', '_', '-'")
REVISION = Pattern(re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]*", re.ASCII), "a branch, tag or commit")
SHARE_OF_ROWS = Pattern(
    re.compile(r"[1-9]\d*|(?![0.]*%)\d{1,2}(\.\d+)?%"),
    "a percentage above 0% and below 100% or a number of rows, e.g. 1% or 500",
)
TIME_LIMIT = Pattern(
    re.compile(r"\d+|\d+:\d{2}|\d+:\d{2}:\d{2}|\d+-\d+(:\d{2}){0,2}|UNLIMITED|INFINITE", re.IGNORECASE),
    "a time limit: minutes, HH:MM:SS or D-HH:MM:SS",
)
MEMORY = Pattern(re.compile(r"\d+[KMGT]?B?", re.IGNORECASE), "a size such as 200G")
EMAIL = Pattern(re.compile(r"[A-Za-z0-9._%+][A-Za-z0-9._%+-]*@[A-Za-z0-9.-]+"), "an address, e.g. me@example.org")
HOST = Pattern(re.compile(r"[A-Za-z0-9_.@:%\[\]][A-Za-z0-9_.@:%\[\]-]*"), "a host name, or user@host")
FUNCTION = Pattern(re.compile(r"[\w.]+:\w+"), "package.module:function")
"""A function of the user's; its code goes into the run's snapshot."""
BIND_MOUNT = Pattern(re.compile(r"[^:,]+:[^:,]+(:[^:,]+)?"), "SOURCE:TARGET[:OPTIONS]")
FROM_ROOT = Pattern(
    re.compile(r"[/~].*"), "a path from / or ~ on", "what it is relative to would depend on where a command is given"
)
SBATCH_OPTION = SbatchOption()
SRUN_OPTION = Pattern(
    re.compile(r"-.*", re.DOTALL), "an option that starts with -", "one option per item, e.g. --mpi=none"
)


def shown(value: object) -> str:
    """Return the value as messages print it: texts in quotes, numbers without trailing zeros."""
    return f"{value:.12g}" if isinstance(value, float) else repr(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _with_hint(message: str, hint: str) -> str:
    return f"{message}; {hint}" if hint else message
