"""Predict the time of one optimizer step, and what it is spent on.

Matrix products run at the rate that large ones reach, plus the part of their memory traffic that arithmetic does not
hide. Elementwise kernels run at the memory's rate, and collectives as rings at the rate of the slowest link they cross.
The pipeline adds (pp - 1) / vpp micro-batches of idle time (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473,
section 2.2).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from launcher.contract.cost_model.implementation import LORA_PASSES, MATMUL_EXPOSED_TRAFFIC, Implementation
from launcher.contract.cost_model.memory import busiest_rank
from launcher.contract.cost_model.workload import (
    Layout,
    Workload,
    layer_parameters,
    trained_parameters,
)
from launcher.contract.flops import active_expert_parameters, mean_attended
from launcher.contract.hardware import GpuKind
from launcher.contract.topology import Topology

FP32_RATE = 0.5
"""fp32 products run as TF32, by NVIDIA's data sheets at half the bf16 rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step on the slowest stage. Communication counts only as far as no computation hides it."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    recompute: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    pipeline_bubble: float = 0.0
    pipeline_sends: float = 0.0
    data_parallel: float = 0.0
    optimizer: float = 0.0
    expert_parallel: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(seconds for _, seconds in self.parts())

    @property
    def communication(self) -> float:
        """All exposed communication, without the bubble."""
        between_stages = self.pipeline_sends + self.data_parallel
        return self.tensor_parallel + self.context_parallel + self.expert_parallel + between_stages

    def parts(self) -> list[tuple[str, float]]:
        """Return the parts of the step with their seconds, the longest first."""
        names = (field.name for field in dataclasses.fields(self))
        values: list[tuple[str, float]] = [(name, getattr(self, name)) for name in names]
        return sorted(values, key=lambda part: -part[1])

    def shares(self) -> list[tuple[str, float]]:
        """Return the parts as shares of the step."""
        total = self.total
        return [(name, seconds / total) for name, seconds in self.parts()]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """Seconds that forward and backward of one micro-batch take in some layers, without recomputation."""

    matmul: float
    attention: float
    elementwise: float
    tensor_parallel: float
    context_parallel: float = 0.0
    expert_parallel: float = 0.0
    norms: float = 0.0
    """The forward pass of the norms alone, which `elementwise` includes."""


def step_time(workload: Workload, layout: Layout, gpu: GpuKind, implementation: Implementation) -> StepTime:
    """Predict the time of one optimizer step."""
    topology = layout.topology
    count = workload.micro_batches(topology)
    layers = _layers(workload, topology, gpu, implementation)
    head = _head(workload, topology, gpu, implementation)
    gradients = sum(_trained(workload, topology)) * implementation.gradient_bytes / _memory_rate(gpu)
    recompute = _recompute(layout, layers)
    collectives = layers.tensor_parallel + layers.context_parallel + layers.expert_parallel
    compute = layers.matmul + layers.attention + layers.elementwise + collectives + recompute + gradients
    sends = _sends(workload, topology, gpu)
    idle = (topology.pipeline_parallel - 1) / topology.virtual_pipeline
    backward = (compute + head.matmul + head.elementwise) * 2 / 3
    return StepTime(
        matmul=count * (layers.matmul + head.matmul),
        attention=count * layers.attention,
        elementwise=count * (layers.elementwise + head.elementwise + gradients),
        recompute=count * recompute,
        tensor_parallel=count * (layers.tensor_parallel + head.tensor_parallel),
        context_parallel=count * layers.context_parallel,
        expert_parallel=count * layers.expert_parallel,
        pipeline_bubble=idle * (compute + (head.matmul + head.elementwise) / topology.pipeline_parallel),
        pipeline_sends=count * sends,
        data_parallel=_data_parallel(workload, layout, gpu, implementation, backward),
        optimizer=_optimizer(workload, layout, gpu, implementation),
        overhead=implementation.step_overhead,
    )


def _layers(workload: Workload, topology: Topology, gpu: GpuKind, implementation: Implementation) -> _Pass:
    """Return the times of the decoder layers of one stage."""
    shape, tensor = workload.shape, topology.tensor_parallel
    tokens = topology.micro_batch_size * workload.seq_length / topology.context_parallel
    layers = shape.num_layers // topology.pipeline_parallel
    queries, groups = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    up = 2 if shape.gated_mlp else 1
    outer = 4 * shape.hidden_size + (2 * queries + 2 * groups + (up + 1) * shape.active_ffn_size) / tensor
    weights: float = layer_parameters(shape, tensor, active=True)
    if shape.num_experts:  # the slowest rank counts, and the others wait for it
        weights += (busiest_rank(topology) - 1) * active_expert_parameters(shape) / tensor
    # with a causal mask 6 * s operations a token and head dimension, forward and backward together
    attended = mean_attended(shape, workload.attended)
    attention = 6 * queries / tensor * tokens * attended
    sequence = tensor if topology.sequence_parallel else 1
    moved = implementation.passes_hidden * shape.hidden_size / sequence
    moved += implementation.passes_ffn * shape.active_ffn_size / tensor
    moved += 0 if workload.lora_rank is None else LORA_PASSES * outer
    collectives = (10 if topology.sequence_parallel else 8) * _ring(tensor) * tokens * shape.hidden_size
    attention_rate = gpu.bf16_tflops * 1e12 * implementation.attention_efficiency(shape.head_dim, attended)
    return _Pass(
        matmul=layers * _products(workload, gpu, implementation, weights, tokens, outer),
        attention=layers * attention / attention_rate,
        elementwise=layers * moved * workload.width * tokens / _memory_rate(gpu),
        tensor_parallel=layers
        * collectives
        * workload.width
        * implementation.tensor_parallel_exposed
        / _link_rate(gpu, crosses=False),
        context_parallel=layers * _gathered_rows(workload, topology, gpu),
        expert_parallel=layers * _exchanged_rows(workload, topology, gpu),
        # two norms a layer, each reads and writes its tensor
        norms=layers * 4 * shape.hidden_size / sequence * workload.width * tokens / _memory_rate(gpu),
    )


def _gathered_rows(workload: Workload, topology: Topology, gpu: GpuKind) -> float:
    """Return the seconds a layer and micro-batch for gathering keys and values of whole rows and returning gradients.

    No computation hides them.
    """
    shape, tensor, context = workload.shape, topology.tensor_parallel, topology.context_parallel
    groups = max(1, shape.num_query_groups / tensor) * shape.head_dim
    size = 2 * groups * topology.micro_batch_size * workload.seq_length * workload.width
    return 2 * _ring(context) * size / _link_rate(gpu, crosses=tensor * context > topology.ranks_per_node)


def _exchanged_rows(workload: Workload, topology: Topology, gpu: GpuKind) -> float:
    """Return the seconds a layer for sending tokens to their experts and back, in the forward and the backward pass.

    None of it is hidden: the experts wait for their tokens.
    """
    if topology.expert_parallel == 1:
        return 0.0
    shape = workload.shape
    # Tensor parallel ranks with a part of every expert all send all tokens; others send those of their own part.
    senders = topology.tensor_parallel // topology.expert_tensor_parallel
    tokens = topology.micro_batch_size * workload.seq_length / topology.context_parallel / senders
    rows = tokens * shape.experts_per_token * busiest_rank(topology) * _ring(topology.expert_parallel)
    span = topology.expert_parallel * topology.expert_tensor_parallel
    rate = _link_rate(gpu, crosses=span > topology.ranks_per_node)
    return 4 * rows * shape.hidden_size * workload.width / rate


def _head(workload: Workload, topology: Topology, gpu: GpuKind, implementation: Implementation) -> _Pass:
    """Return the times of output layer and loss, which are never in fp8."""
    shape, tensor = workload.shape, topology.tensor_parallel
    tokens = topology.micro_batch_size * workload.seq_length / topology.context_parallel
    rows = shape.vocab_size / tensor
    weights = rows * shape.hidden_size
    half = dataclasses.replace(workload, precision="bf16") if workload.precision == "fp8" else workload
    return _Pass(
        matmul=_products(half, gpu, implementation, weights, tokens, shape.hidden_size + rows),
        attention=0.0,
        elementwise=implementation.passes_logits * rows * workload.width * tokens / _memory_rate(gpu),
        tensor_parallel=4
        * _ring(tensor)
        * tokens
        * shape.hidden_size
        * workload.width
        / _link_rate(gpu, crosses=False),
    )


def _products(
    workload: Workload, gpu: GpuKind, implementation: Implementation, weights: float, tokens: float, outer: float
) -> float:
    """Return the seconds a micro-batch for the products of linear layers.

    The layers have `weights` weights, and `outer` inputs and outputs for each of the `tokens` tokens.
    """
    rate, width = gpu.bf16_tflops * gpu.matmul_efficiency, workload.width
    if workload.precision == "fp32":
        rate *= FP32_RATE
    elif workload.precision == "fp8":
        assert gpu.fp8_tflops is not None and implementation.fp8_efficiency is not None
        rate, width = gpu.fp8_tflops * implementation.fp8_efficiency, 1
    products = 3 if workload.lora_rank is None else 2  # frozen weights need no product for their gradient
    traffic = products * (tokens * outer + weights) * width
    return products * 2 * weights * tokens / (rate * 1e12) + MATMUL_EXPOSED_TRAFFIC * traffic / _memory_rate(gpu)


def _recompute(layout: Layout, layers: _Pass) -> float:
    """Return the seconds a micro-batch for recomputation.

    The forward pass is a third of both passes together, with its collectives, and half of the gathering of rows.
    """
    if layout.recompute in ("full", "offload"):  # copies to the host run beside computation
        computed = layers.matmul + layers.attention + layers.elementwise + layers.tensor_parallel
        computed += layers.expert_parallel * 3 / 2  # half of it is in the forward pass
        return computed / 3 + layers.context_parallel / 2
    if layout.recompute == "norms":
        return layers.norms
    return layers.attention / 3 + layers.context_parallel / 2 if layout.recompute == "selective" else 0.0


def _sends(workload: Workload, topology: Topology, gpu: GpuKind) -> float:
    """Return the seconds a micro-batch for sends between stages, which the interleaved schedule hides."""
    if topology.pipeline_parallel == 1 or topology.virtual_pipeline > 1:
        return 0.0
    sequence = topology.tensor_parallel if topology.sequence_parallel else 1
    tokens = topology.micro_batch_size * workload.seq_length / topology.context_parallel
    size = tokens * workload.shape.hidden_size * workload.width / sequence
    neighbours_apart = topology.world_size // topology.pipeline_parallel
    return 2 * size / _link_rate(gpu, crosses=neighbours_apart >= topology.ranks_per_node)


def _data_parallel(
    workload: Workload, layout: Layout, gpu: GpuKind, implementation: Implementation, backward: float
) -> float:
    """Return the exposed seconds a step for reducing fp32 gradients and gathering updated weights."""
    topology = layout.topology
    dense, experts = _trained(workload, topology)
    # Each parameter, weighted by the part of it that a rank sends around its ring.
    sent = dense * _ring(topology.reducing_ranks) + experts * _ring(topology.expert_reducing_ranks)
    rate = _data_parallel_rate(topology, gpu)
    reduce = (1 if layout.distributed_optimizer else 2) * sent * 4 / rate
    exposed = max(0.0, reduce - backward)
    if layout.distributed_optimizer:
        gather = sent * workload.width / rate
        exposed += max(0.0, gather - backward / 2) if implementation.gathers_behind_forward else gather
    return exposed


def _optimizer(workload: Workload, layout: Layout, gpu: GpuKind, implementation: Implementation) -> float:
    dense, experts = _trained(workload, layout.topology)
    updated: float = dense + experts
    if layout.distributed_optimizer:
        updated = dense / layout.topology.reducing_ranks + experts / layout.topology.expert_reducing_ranks
    return updated * implementation.optimizer_bytes / _memory_rate(gpu)


def _trained(workload: Workload, topology: Topology) -> tuple[int, int]:
    """Return the numbers of trained parameters on a rank of the last stage, without experts and of experts."""
    return trained_parameters(workload, topology, topology.pipeline_parallel - 1)


def _ring(size: int) -> float:
    """Return the part of a tensor that each rank sends in a ring all-gather or reduce-scatter."""
    return (size - 1) / size


def _memory_rate(gpu: GpuKind) -> float:
    return gpu.memory_bandwidth * gpu.memory_efficiency * 1e9


def _link_rate(gpu: GpuKind, *, crosses: bool) -> float:
    return (gpu.inter_node_bandwidth if crosses else gpu.intra_node_bandwidth) * gpu.collective_efficiency * 1e9


def _data_parallel_rate(topology: Topology, gpu: GpuKind) -> float:
    """Return the bytes a second of a data parallel ring.

    Between nodes it uses the network cards of all its members on a node, up to the rate within the node.
    """
    if topology.tensor_parallel * topology.reducing_ranks <= topology.ranks_per_node:
        return _link_rate(gpu, crosses=False)
    members = max(1, topology.ranks_per_node // topology.tensor_parallel)
    return min(_link_rate(gpu, crosses=False), members * _link_rate(gpu, crosses=True))
