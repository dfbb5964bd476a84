"""explain: what a config key, an exit code or a cause means, from where each is defined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.contract.config.reference import KeyReference


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """What a word means."""

    word: str
    """The word: a config key or an exit code; of a cause the key of its budget."""
    kind: str
    """Which of these it is."""
    value: str
    """Of a config key: what its value must be."""
    default: str
    """Of a config key: its default."""
    meaning: str
    """What it means."""


def explain(word: str) -> tuple[Explained, ...]:
    """Return what a word means, of a section what each of its keys means. Raise ConfigError where it means nothing."""
    from launcher.contract.config.reference import key_reference

    rows = key_reference()
    found = tuple(_meanings(word, rows))
    if found:
        return found
    known = [*(row.key for row in rows), *(str(code.value) for code in ExitCode)]
    raise ConfigError(f"{word!r} is no config key, exit code or cause{did_you_mean(word, known)}")


def _meanings(word: str, rows: Sequence[KeyReference]) -> Iterator[Explained]:
    for code in ExitCode:
        if word in (str(code.value), code.name):
            yield Explained(word=str(code.value), kind="exit code", value="", default="", meaning=code.meaning)
    for row in rows:
        if row.key == word or row.key.startswith(f"{word}.") or row.key == f"restart.{word}":
            yield _of_key(row)


def _of_key(row: KeyReference) -> Explained:
    return Explained(word=row.key, kind="config key", value=row.value, default=row.default, meaning=row.meaning)
