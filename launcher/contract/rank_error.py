"""The first error of an attempt, as the rank that met it recorded it (logs/<attempt>/error.json)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_LONGEST = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class RankError:
    """The first error that a rank recorded."""

    kinds: tuple[str, ...]
    """Names of the exception's classes, its own first."""
    message: str
    """Its message, in full."""
    rank: int = 0
    """The rank."""
    host: str = ""
    """Its node."""

    @property
    def sentence(self) -> str:
        """The first line of the message, after the error's class unless it is one whose messages are for users."""
        line = (self.message.strip().splitlines() or [""])[0]
        text = line if "LauncherError" in self.kinds else f"{self.kinds[0]}: {line}"
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def read_error(file: Path) -> RankError | None:
    """Return the first error that a rank recorded, or None where there is none that can be read."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        kinds = tuple(str(kind) for kind in values["kinds"])
        rank, host = int(values["rank"]), str(values["host"])
        return RankError(kinds=kinds, message=str(values["message"]), rank=rank, host=host) if kinds else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
