"""Leaves: the values that somebody wrote, by dotted key, each with the place where it was written.

YAML files, `key=value` overrides and NeMo configs all become leaves. Scalars stay the texts that the user wrote:
OmegaConf's schema converts them later, and YAML's own guesses (`1:30:00` is 5400, `1e-5` is a string, `no` is false)
never get a say.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from launcher.contract.spec.fields import FieldType

Source = Literal["default", "cluster", "file", "override", "plan"]
NAMED_SECTIONS = ("cluster", "topology")
"""Sections that may be given by one word: a cluster's name, or the topology `auto`."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value somebody wrote."""

    value: object
    """None, a text, a list of texts or a mapping of texts; numbers and booleans only from NeMo configs."""
    source: Source
    where: str
    """`cfg.yaml:12` or `override 'a=b'`."""

    @property
    def entries(self) -> dict[str, str]:
        """The value as a mapping, empty if it is none."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def texts(self) -> list[str]:
        """Every text in the value."""
        items = self.value if isinstance(self.value, list) else self.entries.values() if self.entries else [self.value]
        return [item for item in items if isinstance(item, str)]


@dataclass(slots=True)
class Leaves:
    """What was read so far, and every problem met."""

    values: dict[str, Leaf] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    """Keys with a problem: no value is kept, and no further rule complains about them."""
    described: Mapping[str, object] | None = None
    """config.json of the model that a NeMo config spells out."""

    def reject(self, key: str, problem: str) -> None:
        """Take out the value of `key` and report the problem where it was written."""
        leaf = self.values.pop(key)
        self.bad.add(key)
        self.problems.append(f"{leaf.where}: {key}: {problem}")

    def where(self, key: str, shown: str) -> str:
        """Return where `key` was written, or `shown`.

        For a key that is missing in a section that the user named, that is where the section begins.
        """
        section = f"{key.rpartition('.')[0]}."
        beside = [name for name in self.values if name.startswith(section)] if section.count(".") > 2 else []
        written = [key, *beside] if key in self.values else beside
        return self.values[written[0]].where if written else shown


def is_list(kind: FieldType) -> bool:
    """Return whether a field of this type holds a list."""
    return typing.get_origin(kind) is list


def is_dict(kind: FieldType) -> bool:
    """Return whether a field of this type maps names to values."""
    return typing.get_origin(kind) is dict


def describe(kind: FieldType) -> str:
    """Return what a value of this type must be, in words that fit after `is not`."""
    arguments = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if is_list(kind):
        return "a list of integers" if arguments == [int] else "a list of strings"
    if is_dict(kind):
        return "a mapping of names to strings"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return describe(arguments[0])
    words: dict[FieldType, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return words[kind]
