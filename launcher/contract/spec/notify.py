"""notify: who is told when an attempt ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from launcher.contract.spec.rules import EMAIL, SHELL_VARIABLE

WEB_SCHEMES = ("https://", "http://")
"""How the address of a webhook begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotifySpec:
    """Who is told when an attempt ends.

    A message that cannot be sent is reported in batch.log, and changes nothing else.
    """

    on: Literal["end", "failure"] = "end"
    """end: at the end of every attempt, completed, interrupted or failed; failure: only when an attempt failed."""
    webhook_env: Annotated[str | None, SHELL_VARIABLE] = None
    """Name of a variable of the submitting shell that holds a http(s) address, to which a JSON object is posted. Like
    those of env_from, its value is neither in the script nor in the run directory."""
    email: Annotated[str | None, EMAIL] = None
    """Address to write to with the node's own sendmail."""
    command: list[str] = field(default_factory=list)
    """A program and its arguments, run without a shell on the first node; it reads the same JSON object from stdin."""

    @property
    def any(self) -> bool:
        """Whether anybody is told."""
        return bool(self.webhook_env or self.email or self.command)
