"""What a rule for a NeMo key is, and the rules that many keys share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from launcher.contract.nemo.entries import Entries, value_of


@dataclass(frozen=True, slots=True)
class Translation:
    """What one NeMo key means here."""

    settings: Mapping[str, object] = field(default_factory=dict)
    """Our keys and their values."""
    note: str = ""
    """Why it has no effect here, or what is different."""


class Refused(ValueError):
    """This value cannot be translated. The text says why and what to do."""


Rule = Callable[[object, Entries], Translation]
"""Translates the value of a key, given all the keys of its file. Raises Refused or ConfigError."""


def to(key: str) -> Rule:
    """Return the rule that gives our `key` the same value, unless that is null."""
    return lambda value, entries: Translation({} if value is None else {key: value})


def drop(why: str) -> Rule:
    """Return the rule that ignores any value, with a note that says why."""
    return lambda value, entries: Translation(note=why)


def only(*allowed: object, why: str) -> Rule:
    """Return the rule that ignores the values in `allowed` and refuses others because of `why`."""

    def rule(value: object, entries: Entries) -> Translation:
        if value not in allowed:
            raise Refused(f"{value!r} is not supported: {why}")
        return Translation(note="has no effect at this value")

    return rule


def same_as(other: str) -> Rule:
    """Return the rule that refuses a value unlike that of the key `other`, because we have one setting for both."""

    def rule(value: object, entries: Entries) -> Translation:
        if value not in (None, value_of(entries, other, value)):
            raise Refused(f"{value} is not {other} {value_of(entries, other)}; there is one such setting here")
        return Translation(note=f"the same as {other}")

    return rule


def files_to(key: str) -> Rule:
    """Return the rule that gives our `key` a file, or a list of them, as a list."""

    def rule(value: object, entries: Entries) -> Translation:
        return Translation({key: list(value) if isinstance(value, list) else [value]} if value else {})

    return rule
