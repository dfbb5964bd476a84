"""The configuration files of a test cluster, as text.

All nodes live on this host: Debian's build lets several slurmd share one machine when each has a port of its own.
What is unusual, and why:

* `SlurmdParameters=config_overrides`: a node may declare more CPUs than the machine has.
* GPUs are device nodes made for the test; a bare `Count=` would drain the nodes.
* `cred_expire`: Slurm holds a requeued job back for this long (120 s if unset), so that old credentials lapse.
* `AccountingStoragePass` is, with munge, the path of its socket.
* `MinJobAge=2` with accounting: squeue soon forgets a job that has ended, and only sacct still knows it.
* `FirstJobId` differs between clusters, because rendezvous ports are derived from job ids and clusters share a host.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterLayout:
    """Sizes, ports and file names of one test cluster."""

    root: Path
    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    controller_port: int
    node_ports: tuple[int, ...]
    accounting_port: int
    database_port: int
    accounting: bool
    munge_folder: Path
    """Where munged's socket and key are: another cluster's folder, if both share an slurmdbd."""

    @property
    def cluster_name(self) -> str:
        return f"test{self.controller_port}"

    @property
    def slurm_conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.munge_folder / "munge.socket"

    @property
    def munge_key(self) -> Path:
        return self.munge_folder / "munge.key"

    @property
    def devices(self) -> list[Path]:
        """The device nodes that stand for GPUs."""
        return [self.root / "dev" / f"gpu{index}" for index in range(self.gpus_per_node)]

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]


def slurm_conf(layout: ClusterLayout) -> str:
    """Return slurm.conf: one partition for every day, and `urgent`, which preempts it by requeueing."""
    root, host = layout.root, socket.gethostname()
    # Slurm takes the Nth port of the list for the Nth node; ranges are not needed.
    ports = ",".join(str(port) for port in layout.node_ports)
    return f"""\
ClusterName={layout.cluster_name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={layout.controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket},cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
MailProg=/bin/true
FirstJobId={layout.controller_port * 10}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
{_accounting_lines(layout)}
GresTypes=gpu
NodeName=node[1-{layout.nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] \
CPUs={layout.cpus_per_node} RealMemory=4000 Gres=gpu:{layout.gpus_per_node}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10
"""


def gres_conf(layout: ClusterLayout) -> str:
    """Return gres.conf: every node has the same devices."""
    files = f"{layout.root}/dev/gpu[0-{layout.gpus_per_node - 1}]"
    return f"NodeName=node[1-{layout.nodes}] Name=gpu File={files}\n"


def slurmdbd_conf(layout: ClusterLayout) -> str:
    """Return slurmdbd.conf, which Slurm wants readable by its owner only."""
    return f"""\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={layout.accounting_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={layout.database_port}
StorageUser=root
StoragePass=unused
StorageLoc=slurm_accounting
LogFile={layout.root}/slurmdbd.log
PidFile={layout.root}/slurmdbd.pid
"""


def _accounting_lines(layout: ClusterLayout) -> str:
    if not layout.accounting:
        return "AccountingStorageType=accounting_storage/none"
    return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={layout.accounting_port}
AccountingStoragePass={layout.munge_socket}
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux
MinJobAge=2"""
