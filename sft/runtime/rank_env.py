"""Which rank this process is, and where rank 0 listens, as srun, torchrun or the local launcher say.

Rejected: Lightning's own SLURMEnvironment, which parses node lists, checks job names, and requeues by itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment

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


class RankClusterEnvironment(ClusterEnvironment):
    """Passes `RankEnv` on to Lightning, which starts no processes itself."""

    def __init__(self, env: RankEnv) -> None:
        super().__init__()
        self._env = env

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._env.master_addr

    @property
    def main_port(self) -> int:
        return self._env.master_port

    @staticmethod
    def detect() -> bool:
        return False  # never detected: it is always passed explicitly

    def world_size(self) -> int:
        return self._env.world_size

    def set_world_size(self, size: int) -> None:
        if size != self._env.world_size:
            raise ConfigError(
                f"the config asks for {size} ranks (resources.nodes x ranks per node) and {self._env.world_size} "
                "were started; start as many as the config says"
            )

    def global_rank(self) -> int:
        return self._env.rank

    def set_global_rank(self, rank: int) -> None:
        pass  # the launcher has numbered the ranks

    def local_rank(self) -> int:
        return self._env.local_rank

    def node_rank(self) -> int:
        return (self._env.rank - self._env.local_rank) // self._env.local_world_size
