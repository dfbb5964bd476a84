"""Which rank this process is, and where rank 0 listens, as srun, torchrun or the local launcher say."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.contract.errors import ConfigError

_SOURCES: tuple[tuple[str, str, str, str, str], ...] = (
    # rank, local rank, ranks on this node, world size, who sets them. torchrun's come first: inside a Slurm
    # allocation torchrun's ranks inherit the SLURM_* variables of the step that started torchrun.
    ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "torchrun"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_NTASKS", "srun"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnv:
    """This process's place in the job."""

    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """0 in a world of one rank: any free port."""
    attempt: str = "by-hand"
    """Name of this attempt in logs and events."""

    @property
    def first_of_node(self) -> int:
        """The lowest rank on this node."""
        return self.rank - self.local_rank

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> RankEnv:
        """Read torchrun's or srun's variables. Without either, this process is the only rank."""
        attempt = environ.get("SFT_ATTEMPT", "by-hand")
        for rank, local_rank, local_size, world_size, who in _SOURCES:
            if rank not in environ or world_size not in environ:
                continue
            size = int(environ[world_size])
            if size > 1 and not ("MASTER_ADDR" in environ and "MASTER_PORT" in environ):
                raise ConfigError(
                    f"{who} started {size} ranks, but MASTER_ADDR and MASTER_PORT are not set; "
                    "the rendered job script sets them, and a script of your own has to"
                )
            return cls(
                rank=int(environ[rank]),
                local_rank=int(environ.get(local_rank, "0")),
                local_world_size=int(environ.get(local_size, str(size))),
                world_size=size,
                master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
                master_port=int(environ.get("MASTER_PORT", "0")),
                attempt=attempt,
            )
        return cls(attempt=attempt)


def node_name() -> str:
    """Return the name of this node: Slurm's, under which its commands know it, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
