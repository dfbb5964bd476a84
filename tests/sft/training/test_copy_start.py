"""Which copies in memory a start of ranks may go on from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from launcher.contract.rundir import RunPaths
from launcher.contract.topology import Topology
from sft.models.registry import read_architecture
from sft.training.copy_start import _identity
from tests.sft.hf_cases import save_config

TOPOLOGY = Topology(
    world_size=2,
    ranks_per_node=2,
    tensor_parallel=1,
    sequence_parallel=False,
    context_parallel=1,
    pipeline_parallel=1,
    virtual_pipeline=1,
    data_parallel=2,
    micro_batch_size=1,
    global_batch_size=8,
    expert_parallel=1,
    expert_tensor_parallel=1,
    layers_per_stage=(4,),
)


def test_copies_of_a_model_that_computes_something_else_are_not_gone_on_from(tmp_path: Path) -> None:
    """`config.json` may be edited while a job goes on; its `config.yaml` is the same then."""
    paths = RunPaths(tmp_path)
    paths.config.write_text("name: run\n")
    architecture = read_architecture(save_config("llama", tmp_path / "model"))
    other = dataclasses.replace(architecture, layernorm_epsilon=0.5)
    of = [_identity(paths, "7.0", TOPOLOGY, {}, model) for model in (architecture, architecture, other)]
    assert of[0] == of[1] != of[2]
