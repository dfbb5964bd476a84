"""The keys of a NeMo config as they were read: values with the lines they were written on, and typed access to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.contract.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of the file."""

    value: object
    where: str
    """`nemo.yaml:12`."""


Entries = Mapping[str, Entry]
"""Dotted key -> entry."""


def value_of(entries: Entries, key: str, default: object = None) -> object:
    """Return the value of a key, or `default` where it is absent or null."""
    entry = entries.get(key)
    return default if entry is None or entry.value is None else entry.value


def whole_number_of(entries: Entries, key: str, default: int) -> int:
    """Return the value of a key as a whole number, or raise ConfigError."""
    number = number_of(entries, key, default)
    if not number.is_integer():
        raise ConfigError(f"{entries[key].where}: {key}: {number} is not a whole number")
    return int(number)


def number_of(entries: Entries, key: str, default: float) -> float:
    """Return the value of a key as a number, or raise ConfigError."""
    value = value_of(entries, key, default)
    try:
        return float(str(value))  # YAML 1.1 reads 1e-5 as text
    except ValueError:
        raise ConfigError(f"{entries[key].where}: {key}: {value!r} is not a number") from None
