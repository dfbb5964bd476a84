"""The launcher's layout rules against Megatron-core itself: its checks are run, not restated.

One process stands for the whole world through torch's fake process group, so that worlds of any size cost nothing.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from launcher.contract.errors import TopologyError
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import DataSpec, ResourcesSpec, RunSpec, TopologySpec, TrainSpec
from launcher.contract.topology import build_topology
from sft.megatron.config import contents_of_chunks
from sft.megatron.core import TransformerConfig, get_num_layers_to_build, parallel_state
from tests.launcher.contract.test_topology import SMOLLM

OURS = ("must not cross nodes", "data.seq_length ", "needs the micro-batches")
"""Parts of the messages of rules that are not Megatron-core's, or that it checks only in the first step."""


sizes = st.sampled_from([1, 2, 3, 4])
shapes = st.builds(
    lambda heads, groups, layers, ffn: dataclasses.replace(
        SMOLLM, num_attention_heads=heads, num_query_groups=groups, num_layers=layers, ffn_hidden_size=ffn
    ),
    st.sampled_from([12, 12, 10]),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from([12, 24, 10]),
    st.sampled_from([24, 24, 10]),
)


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    """Runs that keep the rules of machines and batches, or miss one of them by a little; sizes are any."""
    tensor, pipeline, data, micro, rounds = (draw(sizes) for _ in range(5))
    context, virtual = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 2, 3]))
    off = draw(st.sampled_from([0, 0, 0, 1]))
    return RunSpec(
        resources=ResourcesSpec(nodes=1, tasks_per_node=tensor * pipeline * context * data),
        topology=TopologySpec(
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            virtual_pipeline=virtual,
            context_parallel=context,
            sequence_parallel=tensor > 1 and draw(st.booleans()),
        ),
        train=TrainSpec(global_batch_size=micro * data * pipeline * rounds + off, micro_batch_size=micro),
        data=DataSpec(seq_length=16 if tensor == 1 else 4 * tensor),
    )


def megatron_problem(spec: RunSpec, shape: ModelShape, layout: list[list[str]] | None) -> str | None:
    """What Megatron-core says against this topology while it builds groups, configuration, stages and batches.

    `layout` is what each stage holds; None for stages of equal numbers of layers.
    """
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
    from megatron.core.utils import divide

    topo, world = spec.topology, spec.resources.world_size
    virtual = topo.virtual_pipeline if topo.virtual_pipeline > 1 else None
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topo.tensor_parallel,
            pipeline_model_parallel_size=topo.pipeline_parallel,
            virtual_pipeline_model_parallel_size=virtual,
            context_parallel_size=topo.context_parallel,
            create_gloo_process_groups=False,
        )
        config = TransformerConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.ffn_hidden_size,
            num_attention_heads=shape.num_attention_heads,
            num_query_groups=shape.num_query_groups,
            tensor_model_parallel_size=topo.tensor_parallel,
            pipeline_model_parallel_size=topo.pipeline_parallel,
            virtual_pipeline_model_parallel_size=virtual,
            context_parallel_size=topo.context_parallel,
            sequence_parallel=topo.sequence_parallel,
            pipeline_dtype=torch.float32,
            pipeline_model_parallel_layout=layout,
        )
        get_num_layers_to_build(config, vp_stage=None if virtual is None else 0)
        divide(shape.ffn_hidden_size, topo.tensor_parallel)  # what its column parallel linear does
        ConstantNumMicroBatchesCalculator(
            spec.train.global_batch_size,
            spec.train.micro_batch_size,
            parallel_state.get_data_parallel_world_size(),
            False,
            0,
        )
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return None


@settings(max_examples=100)
@given(specs(), shapes)
def test_megatron_core_agrees(spec: RunSpec, shape: ModelShape) -> None:
    try:
        topology = build_topology(spec, shape)
    except TopologyError as error:
        problem = megatron_problem(spec, shape, None)
        theirs = [rule for rule in error.problems if not any(part in rule for part in OURS)]
        assert problem is not None or not theirs, error
    else:
        layout = contents_of_chunks(topology) if topology.pipeline_parallel > 1 else None
        assert megatron_problem(spec, shape, layout) is None
