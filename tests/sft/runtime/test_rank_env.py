"""A rank finds its place by whichever launcher started it."""

from __future__ import annotations

import pytest

from launcher.contract.errors import ConfigError
from sft.runtime.rank_env import RankEnv
from sft.training.cluster_environment import RankClusterEnvironment

RENDEZVOUS = {"MASTER_ADDR": "node1", "MASTER_PORT": "20123"}
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_srun() -> None:
    env = RankEnv.from_environ({**SLURM, **RENDEZVOUS, "SFT_ATTEMPT": "77.0"})
    assert env == RankEnv(
        rank=5, local_rank=1, local_world_size=4, world_size=8, master_addr="node1", master_port=20123, attempt="77.0"
    )
    assert RankClusterEnvironment(env).node_rank() == 1


def test_torchrun_inside_an_allocation_wins_over_the_step_that_started_it() -> None:
    env = RankEnv.from_environ({**SLURM, **TORCHRUN, **RENDEZVOUS})
    assert (env.rank, env.local_rank, env.world_size) == (3, 1, 4)


def test_a_lone_process_is_a_world_of_one() -> None:
    assert RankEnv.from_environ({}) == RankEnv()


def test_missing_rendezvous_is_named() -> None:
    with pytest.raises(ConfigError, match="srun started 8 ranks, but MASTER_ADDR and MASTER_PORT are not set"):
        RankEnv.from_environ(SLURM)


def test_world_size_must_be_the_configs() -> None:
    environment = RankClusterEnvironment(RankEnv.from_environ({**SLURM, **RENDEZVOUS}))
    with pytest.raises(ConfigError, match=r"the config asks for 4 ranks .* and 8 were started"):
        environment.set_world_size(4)
