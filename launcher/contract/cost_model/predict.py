"""Predict memory and speed of one layout by the cost model."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.contract.cost_model.implementation import Implementation
from launcher.contract.cost_model.memory import StageMemory, largest_stage
from launcher.contract.cost_model.step_time import StepTime, step_time
from launcher.contract.cost_model.workload import Layout, Workload
from launcher.contract.flops import mfu
from launcher.contract.hardware import GpuKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout with its largest stage and its predicted speed."""

    layout: Layout
    memory: StageMemory
    missing: float
    """GiB by which the largest stage is too large. It fits at 0 or less."""
    time: StepTime
    tokens_per_second: float
    """Real tokens over all GPUs."""
    mfu: float
    has_experts: bool = False

    @property
    def overrides(self) -> dict[str, int | bool | str]:
        """The config keys that give a run this layout."""
        topology = self.layout.topology
        experts: dict[str, int | bool | str] = {
            "topology.expert_parallel": topology.expert_parallel,
            "topology.expert_tensor_parallel": topology.expert_tensor_parallel,
        }
        layers = self.layout.recompute_layers
        return {
            "topology.tensor_parallel": topology.tensor_parallel,
            "topology.pipeline_parallel": topology.pipeline_parallel,
            "topology.virtual_pipeline": topology.virtual_pipeline,
            "topology.sequence_parallel": topology.sequence_parallel,
            **(experts if self.has_experts else {}),
            "train.micro_batch_size": topology.micro_batch_size,
            "train.recompute": self.layout.recompute,
            **({} if layers is None else {"train.recompute_layers": layers}),
        }


def evaluate(workload: Workload, layout: Layout, gpu: GpuKind, implementation: Implementation) -> Candidate:
    """Predict memory and speed of one layout."""
    memory = largest_stage(workload, layout, implementation)
    time = step_time(workload, layout, gpu, implementation)
    seconds, ranks = time.total, layout.topology.world_size
    return Candidate(
        layout=layout,
        memory=memory,
        missing=memory.total - gpu.memory_gib,
        time=time,
        tokens_per_second=workload.tokens / seconds,
        mfu=mfu(workload.flops, seconds, gpu.bf16_tflops, ranks),
        has_experts=bool(workload.shape.num_experts),
    )
