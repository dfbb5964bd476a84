"""A real Slurm of several virtual nodes on this machine, for the length of a test session.

    with SlurmCluster(tmp_path) as cluster:
        cluster.run(["srun", "-N2", "hostname"])

munged, slurmctld and one slurmd a node run on loopback ports of their own, out of one scratch folder: nothing
system-wide is read or written, and several clusters run side by side. Rejected: a container image (CI machines
have no container engine) and a fake Slurm (it would agree with our misunderstandings).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.slurm.processes import DaemonGroup, accepts_connections, free_ports, kill_all_with, wait_until
from tests.slurm.slurm_conf import ClusterLayout, gres_conf, slurm_conf, slurmdbd_conf

_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "sinfo", "scancel", "scontrol", "setpriv")
_ACCOUNTING_PROGRAMS = ("mariadbd", "slurmdbd", "sacct")
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"

# A socket's path may have 108 bytes; the longest name in the scratch folder is munge's lock file.
_LONGEST_ROOT = 80

_PATIENCE = 180.0
"""Seconds for what takes one or two on an idle machine; it is only waited for so long where something is broken."""

_UP = frozenset({"idle", "mixed", "allocated", "completing", "reserved"})
"""States of a node that answers; one that was down may get its next job at once."""


def why_unavailable(*, accounting: bool = False) -> str | None:
    """Return why no cluster can be started here, or None."""
    if sys.platform != "linux":
        return "Slurm's daemons need Linux"
    if os.geteuid() != 0:
        return "the test cluster is started by root (it makes device nodes)"
    wanted = _PROGRAMS + (_ACCOUNTING_PROGRAMS if accounting else ())
    missing = [program for program in wanted if shutil.which(program, path=_PATH) is None]
    if missing:
        return (
            f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge; accounting: slurmdbd mariadb-server-core)"
        )
    return None


class SlurmCluster:
    """Partitions: `main` (default) and `urgent`, whose jobs preempt those of `main` by requeueing them."""

    def __init__(
        self,
        root: Path,
        *,
        nodes: int = 4,
        gpus_per_node: int = 8,
        cpus_per_node: int = 16,
        accounting: bool = False,
        beside: SlurmCluster | None = None,
    ) -> None:
        """`beside` is a cluster with accounting whose slurmdbd and munge this one uses: --clusters reaches both."""
        if len(str(root)) > _LONGEST_ROOT:
            raise ValueError(f"{root} is too long for a socket's path: {len(str(root))} > {_LONGEST_ROOT} characters")
        controller, dbd, database, *node_ports = free_ports(3 + nodes)
        self.layout: ClusterLayout = ClusterLayout(
            root=root,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            cpus_per_node=cpus_per_node,
            controller_port=controller,
            node_ports=tuple(node_ports),
            accounting_port=beside.layout.accounting_port if beside else dbd,
            database_port=database,
            accounting=accounting or beside is not None,
            munge_folder=beside.root if beside else root,
        )
        self._beside = beside
        self._daemons = DaemonGroup(root)

    def __enter__(self) -> SlurmCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def root(self) -> Path:
        """The scratch folder; daemons log to NAME.log and NAME.out in it."""
        return self.layout.root

    @property
    def node_names(self) -> list[str]:
        return self.layout.node_names

    @property
    def env(self) -> dict[str, str]:
        """Environment in which Slurm's commands speak to this cluster, free of any other allocation's variables."""
        foreign = ("SLURM", "SBATCH", "SALLOC", "SQUEUE", "SACCT", "SINFO", "SCANCEL", "PMI")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        ours = {"SLURM_CONF": str(self.layout.slurm_conf), "XDG_STATE_HOME": str(self.root / "home")}
        return {**kept, "PATH": _PATH, **ours}  # what the launcher remembers of nodes is this cluster's, too

    def start(self) -> None:
        """Write the configuration, start everything, return when every node is idle."""
        _write_files(self.layout)
        if self._beside is None:
            self._start_munge()
        if self.layout.accounting and self._beside is None:
            self._start_accounting()
        self.start_controller()
        for name in self.node_names:
            self._start_slurmd(name)
        self.wait_for_nodes({"idle"})

    def stop(self) -> None:
        """End all daemons, then whatever is left of their jobs."""
        self._daemons.stop_all()
        kill_all_with({"SLURM_CONF": str(self.layout.slurm_conf)})

    def run(
        self,
        command: Sequence[str],
        *,
        check: bool = True,
        timeout: float = _PATIENCE,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster, with more in `env`; with `check`, a failure shows what it printed."""
        result = subprocess.run(
            command,
            env={**self.env, **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and result.returncode != 0:
            raise RuntimeError(f"{list(command)} exited {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    def node_states(self) -> dict[str, str]:
        """Return each node's state as sinfo has it, by name. A trailing * means that the node does not answer."""
        lines = self.run(["sinfo", "-h", "-N", "-o", "%N %T"]).stdout.splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    def wait_for_nodes(self, states: Collection[str], names: Collection[str] = (), timeout: float = _PATIENCE) -> None:
        """Wait until the named nodes (default all) are in one of `states`."""
        wanted = names or self.node_names

        def reached() -> bool:
            now = self.node_states()
            return all(now.get(name) in states for name in wanted)

        self._wait(reached, f"{', '.join(wanted)} to be {' or '.join(states)}", timeout)

    def job_state(self, job_id: str) -> str:
        """Return a job's state as squeue has it (PENDING, RUNNING, ...), empty for a job that it does not know."""
        lines = self.run(["squeue", "-h", "-t", "all", "-o", "%A %T"]).stdout.splitlines()
        return dict(line.split() for line in lines).get(job_id, "")

    def wait_for_job(self, job_id: str, states: Collection[str], timeout: float = _PATIENCE) -> str:
        """Wait until a job is in one of `states`; returns the one it reached."""
        self._wait(lambda: self.job_state(job_id) in states, f"job {job_id} to be {' or '.join(states)}", timeout)
        return self.job_state(job_id)

    def nodes_of(self, job_id: str) -> list[str]:
        """Return the names of the nodes that a job runs on."""
        nodes = self.run(["squeue", "-h", "-j", job_id, "-o", "%N"]).stdout.strip()
        return self.run(["scontrol", "show", "hostnames", nodes]).stdout.split()

    def cancel_all(self) -> None:
        """Cancel every job and wait until the nodes are free: tests share a cluster, not its queue."""
        self.run(["scancel", "--user=root"])
        self.wait_for_nodes({"idle"})

    def kill_node(self, name: str) -> None:
        """Cut a node's power: slurmd and all that ran on it are gone. The controller finds out by itself."""
        self._daemons.stop(f"slurmd-{name}", how=signal.SIGKILL)
        kill_all_with(self._node_env(name))

    def kill_slurmd(self, name: str) -> None:
        """Take the node's slurmd away, while what runs on the node goes on: nobody can end it now."""
        self._daemons.stop(f"slurmd-{name}", how=signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Switch a killed node on again and wait until it answers.

        The controller may still have to deliver the end of what ran there before: a requeued job that starts on a node
        which is back at once can be hit by it. Let such a job finish elsewhere first.
        """
        self._start_slurmd(name)
        self.wait_for_nodes(_UP, [name])

    def stop_controller(self) -> None:
        """Take the controller away: from here on Slurm's commands cannot reach it."""
        self._daemons.stop("slurmctld")

    def start_controller(self) -> None:
        """Start the controller; it goes on from its saved state where there is one."""
        fresh = not any((self.root / "state").iterdir())
        self._daemons.start("slurmctld", ["slurmctld", "-D", *(["-c"] if fresh else [])], self._daemon_env())
        self._wait(lambda: accepts_connections(self.layout.controller_port), "slurmctld to listen")

    def restart_controller(self) -> None:
        """Stop and start the controller; jobs and nodes go on."""
        self.stop_controller()
        self.start_controller()
        self._wait(lambda: self.run(["scontrol", "ping"], check=False).returncode == 0, "slurmctld to answer")

    def _start_munge(self) -> None:
        root, layout = self.root, self.layout
        command = ["munged", "--foreground", "--force", f"--socket={layout.munge_socket}"]
        command += [f"--key-file={layout.munge_key}", f"--pid-file={root}/munged.pid"]
        command += [f"--log-file={root}/munged.log", f"--seed-file={root}/munged.seed"]
        self._daemons.start("munged", [*command, "--num-threads=4"], self._daemon_env())
        self._wait(layout.munge_socket.exists, "munged's socket")

    def _start_accounting(self) -> None:
        """Start MariaDB and slurmdbd. Without grant tables MariaDB needs no system database: an empty folder does."""
        root, layout = self.root, self.layout
        command = ["mariadbd", "--no-defaults", "--user=root", "--skip-grant-tables", "--bind-address=127.0.0.1"]
        command += [f"--port={layout.database_port}", f"--datadir={root}/database", f"--socket={root}/mariadb.socket"]
        command += [f"--pid-file={root}/mariadbd.pid", "--innodb-buffer-pool-size=32M"]
        self._daemons.start("mariadbd", [*command, "--innodb-flush-log-at-trx-commit=0"], self._daemon_env())
        self._wait(lambda: accepts_connections(layout.database_port), "mariadbd to listen")
        self._daemons.start("slurmdbd", ["slurmdbd", "-D"], self._daemon_env())
        self._wait(lambda: accepts_connections(layout.accounting_port), "slurmdbd to listen")

    def _start_slurmd(self, name: str) -> None:
        self._daemons.start(f"slurmd-{name}", ["slurmd", "-D", "-N", name], self._daemon_env() | self._node_env(name))

    def _daemon_env(self) -> dict[str, str]:
        return {"PATH": _PATH, "SLURM_CONF": str(self.layout.slurm_conf)}

    def _node_env(self, name: str) -> dict[str, str]:
        """Return the variables that mark a node's processes. Slurm itself sets the same for the tasks it starts."""
        return {"SLURM_CONF": str(self.layout.slurm_conf), "SLURMD_NODENAME": name}

    def _wait(self, done: Callable[[], bool], what: str, timeout: float = _PATIENCE) -> None:
        """Call `wait_until`, and give up at once, with its log, when a daemon has died."""

        def done_or_dead() -> bool:
            dead = self._daemons.ended()
            if dead:
                raise RuntimeError(f"while waiting for {what}: {dead[0]} ended\n{self._log_tail(dead[0])}")
            return done()

        wait_until(done_or_dead, what, timeout=timeout)

    def _log_tail(self, daemon: str) -> str:
        return "\n".join((self.root / f"{daemon}.out").read_text(errors="replace").splitlines()[-20:])


def _write_files(layout: ClusterLayout) -> None:
    """Fill the scratch folder: configuration, munge key and device nodes."""
    for folder in ("dev", "state", "spool", "database"):
        (layout.root / folder).mkdir(parents=True, exist_ok=True)
    if layout.munge_folder == layout.root:
        layout.munge_key.touch(mode=0o600)
        layout.munge_key.write_bytes(secrets.token_bytes(128))
    for device in layout.devices:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null: slurmd only looks that it is there
    layout.slurm_conf.write_text(slurm_conf(layout))
    (layout.root / "gres.conf").write_text(gres_conf(layout))
    dbd_conf = layout.root / "slurmdbd.conf"
    dbd_conf.touch(mode=0o600)
    dbd_conf.write_text(slurmdbd_conf(layout))
