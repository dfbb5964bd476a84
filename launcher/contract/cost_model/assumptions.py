"""What the cost model is told of a run: its largest step, its kernels, and settings that no layout changes."""

from __future__ import annotations

from dataclasses import replace

from launcher.contract.cost_model.implementation import (
    CURRENT,
    CURRENT_WITH_FLASH2,
    CURRENT_WITH_PLAIN_LAYERS,
    CURRENT_WITH_TORCH_ATTENTION,
    PLAIN,
    Implementation,
)
from launcher.contract.cost_model.workload import Layout, Recompute, Workload
from launcher.contract.cuda_graphs import takes_graphs
from launcher.contract.hardware import GpuKind
from launcher.contract.model_shape import ModelShape
from launcher.contract.model_types import facts_of
from launcher.contract.spec import RunSpec
from launcher.contract.topology import Topology

_WITH_FLASH4 = ("h100", "h200", "gh200", "b200")
"""What names of GPUs begin with for which flash-attn-4 has kernels: Hopper and Blackwell."""


def rows_of(spec: RunSpec) -> int:
    """Return the rows of one step at its largest: each example has a row of its own."""
    train = spec.train
    rows = train.global_batch_size
    return max(1, rows // spec.data.seq_length if train.global_batch_unit == "tokens" else rows)


def workload_of(spec: RunSpec, shape: ModelShape) -> Workload:
    """Return one step of the run at its largest: every example has data.seq_length tokens and a row of its own."""
    train, length = spec.train, spec.data.seq_length
    return Workload(
        shape=shape,
        seq_length=length,
        rows=rows_of(spec),
        attended=length,
        precision=train.precision,
        fp8=train.fp8,
        lora=spec.model.lora,
    )


def layout_of(spec: RunSpec, topology: Topology, recompute: Recompute) -> Layout:
    """Return a layout with the optimizer's settings of the run, and its number of recomputed layers if it is full."""
    optimizer = spec.train.optimizer
    return Layout(
        topology=topology,
        recompute=recompute,
        recompute_layers=spec.train.recompute_layers if recompute == "full" else None,
        distributed_optimizer=optimizer.distributed,
        grad_reduce=optimizer.grad_reduce,
        overlap=optimizer.overlap is not False,
    )


def implementation_of(spec: RunSpec, shape: ModelShape, gpu: GpuKind) -> Implementation:
    """Return how the ranks will compute, if Triton and flash-attn-4 are installed there.

    The launcher cannot see what is installed. `sft.megatron.kernel_choice` decides on the ranks, by the same rules.
    """
    found = _kernels_of(spec, shape, gpu)
    fused_layers = found not in (PLAIN, CURRENT_WITH_PLAIN_LAYERS)
    return replace(found, graphs=spec.train.cuda_graphs) if fused_layers and takes_graphs(spec) else found


def _kernels_of(spec: RunSpec, shape: ModelShape, gpu: GpuKind) -> Implementation:
    if spec.train.kernels == "plain":
        return PLAIN
    if facts_of(shape.model_type).plain_layers or shape.experts_beside_mlp or spec.model.hidden_dropout:
        return CURRENT_WITH_PLAIN_LAYERS
    if not _by_offsets(spec, shape):
        return CURRENT_WITH_TORCH_ATTENTION
    sizes = [kind.core_dim for kind in shape.head_kinds]
    flash4 = gpu.name.startswith(_WITH_FLASH4) and all(size % 32 == 0 and size <= 128 for size in sizes)
    if spec.train.attention == "flash2" or spec.train.deterministic or not flash4:
        return CURRENT_WITH_FLASH2
    return CURRENT


def _by_offsets(spec: RunSpec, shape: ModelShape) -> bool:
    """Return whether attention gets sequences by their offsets, not as rows of one length."""
    hidden_positions = shape.window is not None and shape.window < spec.data.seq_length
    return (
        spec.data.packing
        or spec.topology.context_parallel > 1
        or hidden_positions
        or facts_of(shape.model_type).scores != "usual"  # which torch's own attention cannot compute
    )
