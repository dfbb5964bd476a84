"""Tell Lightning which rank this process is.

Rejected: Lightning's own SLURMEnvironment, which parses node lists, checks job names, and requeues by itself.
"""

from __future__ import annotations

from launcher.contract.errors import ConfigError
from sft.runtime.lightning import ClusterEnvironment
from sft.runtime.rank_env import RankEnv


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
