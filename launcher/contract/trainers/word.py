"""A word of another trainer: what to tell who writes it in our config, and how `launcher import` translates it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.contract.nemo.entries import Entries, number_of
from launcher.contract.nemo.rule import Refused, Rule, Translation, drop, to

GPUS = "--gpus"
"""Key of the number of GPUs among the entries, which the command line gives."""


@dataclass(frozen=True, slots=True)
class Word:
    """One key of another trainer."""

    hint: str
    """What it is here, or why there is nothing like it, in words that fit behind `unknown key 'x'; `."""
    rule: Rule


@dataclass(frozen=True, slots=True)
class Absent:
    """What it means to a trainer where none of these keys is in a file, and something else to us."""

    keys: tuple[str, ...]
    settings: dict[str, object]
    """Ours for it."""
    meaning: str
    """The trainer's default in words."""


def at(key: str) -> Word:
    """Return the word for our `key` with the same values."""
    return Word(f"here it is {key}", to(key))


def number_at(key: str) -> Word:
    """Return the word for our `key`, whose value is a number. YAML 1.1 reads 1e-5 as a text."""

    def rule(value: object, entries: Entries) -> Translation:
        return Translation({} if value is None else {key: as_number(value)})

    return Word(f"here it is {key}", rule)


def becomes(keys: str, rule: Rule) -> Word:
    """Return the word that `rule` translates into `keys`."""
    return Word(f"here it is {keys}", rule)


def beside(place: str, key: str) -> Word:
    """Return the word for our `place`, whose value is part of the translation of their `key`."""
    return Word(f"here it is {place}", drop(f"read with {key}"))


def needless(why: str) -> Word:
    """Return the word without any effect on what is trained, because of `why`."""
    return Word(why, drop(why))


def missing(why: str, *allowed: object) -> Word:
    """Return the word for what does not exist here. Values that turn it off, and those `allowed`, are right."""

    def rule(value: object, entries: Entries) -> Translation:
        if value in (None, False, 0, "", "none", *allowed) or value in ([], {}):
            return Translation(note="off, or as it is here anyway")
        raise Refused(f"{value!r}: {why}")

    return Word(why, rule)


def as_number(value: object) -> float | int:
    """Return the value as an int where it is a whole number (0 aside), else as a float. Raise Refused for no number."""
    try:
        number = float(str(value))
    except ValueError:
        raise Refused(f"{value!r} is not a number") from None
    return int(number) if number.is_integer() and abs(number) >= 1 else number


def whole(value: object) -> int:
    """Return the value as a whole number above 0, or raise Refused."""
    number = as_number(value)
    if not isinstance(number, int) or number < 1:
        raise Refused(f"{value!r} is not a whole number of steps, at least 1")
    return number


def gpus_of(entries: Entries) -> int:
    """Return the number of GPUs that the command line gives."""
    return int(number_of(entries, GPUS, 1))


def choices(key: str, found: dict[object, dict[str, object]], what: str) -> Callable[[object, Entries], Translation]:
    """Return the rule that looks the value up in `found`. `what` says what other values are."""

    def rule(value: object, entries: Entries) -> Translation:
        word = str(value).lower() if isinstance(value, str) else value
        if word not in found:
            known = ", ".join(str(name) for name in found if name is not None)
            raise Refused(f"{value!r} is not {what} that exists here; these do: {known}")
        return Translation(found[word])

    return rule
