"""A real sshd on the loopback interface, started by the tests as their own user: a login node to submit through.

Keys, configuration and the user's home are in one folder; nothing of the machine's own ssh is read or written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.session_end import mark
from tests.slurm.processes import DaemonGroup, accepts_connections, free_ports, wait_until

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_SEPARATION = Path("/run/sshd")
"""An empty folder that Debian's sshd wants when root starts it."""


def why_unavailable() -> str | None:
    """Return why no sshd can be started here, or None."""
    missing = [name for name in ("sshd", "ssh", "ssh-keygen", "setpriv") if shutil.which(name, path=_PATH) is None]
    return f"not installed: {', '.join(missing)} (Debian: openssh-server openssh-client)" if missing else None


class SshServer:
    """`login` is the name of this sshd for an ssh that is given `options`; sessions get the variables `env`."""

    def __init__(self, root: Path, env: Mapping[str, str]) -> None:
        self.root = root
        self.home = root / "home"
        self.env = {"HOME": str(self.home), **mark(), **env}
        self.port = free_ports(1)[0]
        self._daemons = DaemonGroup(root)

    @property
    def options(self) -> list[str]:
        """Options of ssh."""
        return ["-F", str(self.root / "ssh_config")]

    def __enter__(self) -> SshServer:
        self.home.mkdir(parents=True)
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.root / key)], check=True)
        shutil.copy(self.root / "user_key.pub", self.root / "authorized_keys")
        (self.root / "sshd_config").write_text(self._sshd_config())
        (self.root / "ssh_config").write_text(self._ssh_config())
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._daemons.stop_all()

    def start(self) -> None:
        """Start sshd and wait until it listens."""
        if os.geteuid() == 0:
            _SEPARATION.mkdir(mode=0o755, exist_ok=True)
        program = shutil.which("sshd", path=_PATH)
        assert program is not None
        command = [program, "-D", "-e", "-f", str(self.root / "sshd_config")]
        self._daemons.start("sshd", command, {"PATH": _PATH})
        wait_until(lambda: accepts_connections(self.port), "sshd to listen", timeout=30)

    def stop(self) -> None:
        """Take no more connections. Those that are open stay."""
        self._daemons.stop("sshd")

    def log(self) -> str:
        """Return what sshd has said."""
        return (self.root / "sshd.out").read_text(errors="replace")

    def logins(self) -> int:
        """Return how often somebody has had to authenticate."""
        return self.log().count("Accepted publickey")

    def _sshd_config(self) -> str:
        settings = " ".join(f'"{name}={value}"' for name, value in self.env.items())
        return f"""\
ListenAddress 127.0.0.1:{self.port}
HostKey {self.root}/host_key
AuthorizedKeysFile {self.root}/authorized_keys
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
LogLevel VERBOSE
SetEnv {settings}
"""

    def _ssh_config(self) -> str:
        return f"""\
Host login
  HostName 127.0.0.1
  Port {self.port}
  IdentityFile {self.root}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {self.root}/known_hosts
  StrictHostKeyChecking accept-new
"""


def close_connections(sockets: Path) -> None:
    """End the shared connections whose sockets are in a folder."""
    for socket in sockets.rglob("ssh-*"):
        with contextlib.suppress(OSError):
            subprocess.run(["ssh", "-O", "exit", "-o", f"ControlPath={socket}", "any"], capture_output=True)
