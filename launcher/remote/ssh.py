"""The user's own ssh: one connection a host, which all commands share for ten minutes after the last.

So whoever must answer for a second factor does so once. Prompts are ssh's, on the terminal. What the options of the
cluster file say wins over ours, as ssh takes the first value that it meets.

Rejected: a Python ssh library, which knows neither the user's ssh configuration nor every site's way of asking.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.contract.private_folder import private_folder

LOST = 255
"""What ssh exits with when it failed itself."""

_KEPT_SECONDS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A login node, and what runs there."""

    name: str
    options: tuple[str, ...]
    """ssh's, one a word."""
    python: str
    directory: str
    cluster: str
    """Name of the cluster file that says so."""

    def command(self, words: Sequence[str], *, terminal: bool = False) -> list[str]:
        """The ssh command that runs `words` there: a shell gets them, so each is quoted."""
        kind = ["-t", "-o", "LogLevel=ERROR"] if terminal else ["-T"]  # no "Shared connection closed." at the end
        alive = ["-o", "ServerAliveInterval=30"]  # a dead link ends the command
        return ["ssh", *self.options, *self._shared(), *alive, *kind, "--", self.name, shlex.join(words)]

    def _shared(self) -> list[str]:
        folder = private_folder()
        if folder is None:
            return []
        key = hashlib.sha256(repr((self.name, self.options)).encode()).hexdigest()[:12]  # sockets have short names only
        socket = str(folder / f"ssh-{key}").replace("%", "%%")
        return [
            *("-o", "ControlMaster=auto"),
            *("-o", f"ControlPath={socket}"),
            *("-o", f"ControlPersist={_KEPT_SECONDS}"),
        ]
