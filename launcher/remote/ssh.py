"""Commands of the user's own ssh, with one connection a host that commands share until ten minutes after the last.

A second factor is thus asked for once, by ssh itself on the terminal. Options of the cluster file come before ours and
win, as ssh takes the first value that it is given.

Rejected: a Python ssh library, which knows neither the user's ssh configuration nor each site's way to log in.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.contract.private_folder import private_folder

LOST = 255
"""The exit code of ssh when the connection failed."""

_KEPT_SECONDS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A login node, and how commands run there."""

    name: str
    options: tuple[str, ...]
    """Of ssh, one word an item."""
    python: str
    directory: str
    cluster: str
    """Name of the cluster file that names the host."""

    def command(self, words: Sequence[str], *, terminal: bool = False) -> list[str]:
        """Return the ssh command that runs `words` there, each quoted for the shell that reads them."""
        kind = ["-t", "-o", "LogLevel=ERROR"] if terminal else ["-T"]  # no "Shared connection closed." at the end
        alive = ["-o", "ServerAliveInterval=30"]  # a dead link ends the command
        return ["ssh", *self.options, *self._shared(), *alive, *kind, "--", self.name, shlex.join(words)]

    def _shared(self) -> list[str]:
        folder = private_folder()
        if folder is None:
            return []
        key = hashlib.sha256(repr((self.name, self.options)).encode()).hexdigest()[:12]  # a socket's name must be short
        socket = str(folder / f"ssh-{key}").replace("%", "%%")
        return [
            *("-o", "ControlMaster=auto"),
            *("-o", f"ControlPath={socket}"),
            *("-o", f"ControlPersist={_KEPT_SECONDS}"),
        ]
