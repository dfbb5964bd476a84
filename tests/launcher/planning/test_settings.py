"""Settings of a run beside its sizes that change what is predicted of it."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.contract.cost_model.assumptions import implementation_of, layout_of, workload_of
from launcher.contract.cost_model.predict import Candidate, evaluate
from launcher.contract.cost_model.workload import Recompute
from launcher.contract.hardware import gpu_kind
from launcher.contract.model_shape import named_model_shape
from launcher.contract.spec import (
    DataSpec,
    LoraSpec,
    ModelSpec,
    OptimizerSpec,
    ResourcesSpec,
    RunSpec,
    TopologySpec,
    TrainSpec,
)
from launcher.contract.topology import build_topology

H100 = gpu_kind("h100")


def predicted(
    model: str = "8b",
    lora: LoraSpec | None = None,
    recompute: Recompute = "none",
    *,
    tensor: int = 1,
    trained: float = 1.0,
    **optimizer: object,
) -> Candidate:
    """A step of 16 packed rows on 8 H100s."""
    spec = RunSpec(
        resources=ResourcesSpec(nodes=1, gpus_per_node=8),
        topology=TopologySpec(tensor_parallel=tensor, sequence_parallel=tensor > 1),
        model=ModelSpec(lora=lora or LoraSpec()),
        data=DataSpec(seq_length=4096, packing=True),
        train=TrainSpec(global_batch_size=16, max_steps=10, optimizer=OptimizerSpec(**optimizer)),  # type: ignore[arg-type]
    )
    shape = named_model_shape(model)
    workload = dataclasses.replace(workload_of(spec, shape), trained=trained)
    layout = layout_of(spec, build_topology(spec, shape), recompute)
    return evaluate(workload, layout, H100, implementation_of(spec, shape, H100))


def test_gradients_in_bf16_take_half_of_the_memory_and_traffic() -> None:
    usual, half = predicted(), predicted(grad_reduce="bf16")
    assert half.memory.gradients == usual.memory.gradients / 2
    assert half.time.data_parallel < usual.time.data_parallel
    assert half.time.elementwise < usual.time.elementwise  # of adding each micro-batch's


def test_collectives_that_nothing_hides_take_their_whole_time() -> None:
    """By hand: fp32 gradients to 8 ranks and bf16 weights from them, over rings at 337.5 GB/s."""
    hidden, exposed = predicted().time.data_parallel, predicted(overlap=False).time.data_parallel
    assert exposed == pytest.approx(8_030_261_248 * 7 / 8 * (4 + 2) / 337.5e9, rel=1e-3)
    assert 0.4 * exposed < hidden < 0.8 * exposed


def test_the_forward_pass_of_frozen_weights_is_half_of_their_products() -> None:
    """And a third where they are trained: what is recomputed of a whole layer."""
    for lora, share in ((LoraSpec(), 1 / 3), (LoraSpec(rank=8), 1 / 2)):
        none, full = predicted("70b", lora), predicted("70b", lora, "full")
        rest = none.time.attention + none.time.elementwise
        assert full.time.recompute < share * none.time.matmul + rest / 3
        assert full.time.recompute > 0.9 * share * none.time.matmul


def test_fewer_adapted_layers_move_less_memory() -> None:
    every, some = (predicted(lora=LoraSpec(rank=8, targets=targets)) for targets in ([], ["q_proj", "v_proj"]))
    assert some.time.elementwise < 0.75 * every.time.elementwise


def test_the_output_layer_counts_for_targets() -> None:
    """1B on one rank: its output layer is a fifth of the products."""
    every, half = predicted("1b"), predicted("1b", trained=0.5)
    assert half.time.matmul == pytest.approx(0.9 * every.time.matmul, rel=0.02)


def test_two_tensor_parallel_ranks_send_at_a_lower_rate() -> None:
    two, four = (predicted(tensor=ranks).time.tensor_parallel for ranks in (2, 4))
    # Twice the rows a rank and 3/4 of them sent in place of 1/2, at 1 / 0.6 of the rate
    assert four / two == pytest.approx(2 * 1.5 * 0.6, rel=0.01)
