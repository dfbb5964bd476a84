"""Seconds that forward and backward pass of one micro-batch take in a layer, and in the output layer.

Matrix products run at the rate that large ones reach, plus the part of their memory traffic that arithmetic does not
hide. Elementwise kernels run at the memory's rate, and collectives as rings at the rate of the slowest link they cross.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from launcher.contract.cost_model.implementation import (
    LINEAR_ATTENTION_EFFICIENCY,
    LINEAR_ATTENTION_PASSES,
    LORA_PASSES,
    LORA_PASSES_IN_PRODUCTS,
    MATMUL_EXPOSED_TRAFFIC,
    Implementation,
)
from launcher.contract.cost_model.memory import busiest_rank
from launcher.contract.cost_model.workload import Layout, Workload, layer_parameters, linear_share
from launcher.contract.flops import active_expert_parameters, linear_attention_flops, mean_attended
from launcher.contract.hardware import GpuKind
from launcher.contract.topology import Topology

FP32_RATE = 0.5
"""fp32 products run as TF32, by NVIDIA's data sheets at half the bf16 rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Seconds that forward and backward of one micro-batch take in some layers, without recomputation."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    expert_parallel: float = 0.0
    norms: float = 0.0
    """The forward pass of the norms alone, which `elementwise` includes."""

    @property
    def total(self) -> float:
        """All of it."""
        products = self.matmul + self.attention + self.elementwise
        return products + self.tensor_parallel + self.context_parallel + self.expert_parallel

    def plus(self, other: Pass, times: int = 1) -> Pass:
        """Return this and so many times the other one."""
        return Pass(
            matmul=self.matmul + times * other.matmul,
            attention=self.attention + times * other.attention,
            elementwise=self.elementwise + times * other.elementwise,
            tensor_parallel=self.tensor_parallel + times * other.tensor_parallel,
            context_parallel=self.context_parallel + times * other.context_parallel,
            expert_parallel=self.expert_parallel + times * other.expert_parallel,
            norms=self.norms + times * other.norms,
        )


def layer_pass(
    workload: Workload, topology: Topology, gpu: GpuKind, implementation: Implementation, *, dense: bool = False
) -> Pass:
    """Return the times of a decoder layer, of the mean of those with and without linear attention.

    `dense` is for one without experts in a model that has some.
    """
    shape, tensor = workload.shape, topology.tensor_parallel
    tokens = topology.micro_batch_size * workload.seq_length / topology.context_parallel
    queries, groups = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    width = shape.ffn_hidden_size if dense else shape.active_ffn_size
    up = 2 if shape.gated_mlp else 1
    linear = linear_share(shape)
    projected: float = (3 if shape.output_gate else 2) * queries + 2 * groups
    weights: float = layer_parameters(shape, tensor, active=not dense, dense=dense)
    if shape.linear is not None:
        projected += linear * (shape.linear.projected + shape.linear.values - projected)
        weights += linear * (layer_parameters(shape, tensor, active=not dense, dense=dense, linear=True) - weights)
    outer = 4 * shape.hidden_size + (projected + (up + 1) * width) / tensor
    if shape.num_experts and not dense:  # the slowest rank counts, and the others wait for it
        weights += (busiest_rank(topology) - 1) * active_expert_parameters(shape) / tensor
    # with a causal mask 6 * s operations a token and head dimension, forward and backward together
    attended = mean_attended(shape, workload.attended)
    attention = (1 - linear) * 6 * queries / tensor * tokens * attended
    sequence = tensor if topology.sequence_parallel else 1
    moved = implementation.passes_hidden * shape.hidden_size / sequence
    moved += implementation.passes_ffn * width / tensor
    if workload.adapted:
        one = tensor == 1 and implementation.adds_adapters_in_products and workload.adds_adapters_in_products
        moved += (LORA_PASSES_IN_PRODUCTS if one else LORA_PASSES) * outer
    collectives = (10 if topology.sequence_parallel else 8) * ring(tensor) * tokens * shape.hidden_size
    exposed = implementation.tensor_parallel_exposed / link_rate(gpu, crosses=False)
    attention_rate = gpu.bf16_tflops * 1e12 * implementation.attention_efficiency(shape.head_dim, attended)
    return Pass(
        matmul=_products(workload, gpu, implementation, weights, tokens, outer),
        attention=attention / attention_rate + linear * _linear_attention(workload, topology, gpu),
        elementwise=moved * workload.width * tokens / memory_rate(gpu),
        tensor_parallel=collectives * workload.width * exposed,
        context_parallel=_gathered_rows(workload, topology, gpu),
        expert_parallel=0.0 if dense else _exchanged_rows(workload, topology, gpu),
        # two norms, each reads and writes its tensor
        norms=4 * shape.hidden_size / sequence * workload.width * tokens / memory_rate(gpu),
    )


def _linear_attention(workload: Workload, topology: Topology, gpu: GpuKind) -> float:
    """Return the seconds a layer and micro-batch for convolution, rule and gated norm of linear attention."""
    shape, sizes = workload.shape, workload.shape.linear
    if sizes is None:
        return 0.0
    tokens = topology.micro_batch_size * workload.seq_length / topology.context_parallel / topology.tensor_parallel
    rule = tokens * linear_attention_flops(shape) / (gpu.bf16_tflops * 1e12 * LINEAR_ATTENTION_EFFICIENCY)
    moved = LINEAR_ATTENTION_PASSES * (sizes.convolved + 2 * sizes.values) * workload.width * tokens
    return rule + moved / memory_rate(gpu)


def _gathered_rows(workload: Workload, topology: Topology, gpu: GpuKind) -> float:
    """Return the seconds a layer and micro-batch for gathering keys and values of whole rows and returning gradients.

    Linear attention exchanges tokens for heads instead. No computation hides either.
    """
    shape, tensor, context = workload.shape, topology.tensor_parallel, topology.context_parallel
    groups = max(1, shape.num_query_groups / tensor) * shape.head_dim
    size = 2 * groups
    if shape.linear is not None:
        exchanged = (shape.linear.convolved + 2 * shape.linear.value_heads + shape.linear.values) / tensor / context
        size += linear_share(shape) * (exchanged - size)
    size *= topology.micro_batch_size * workload.seq_length * workload.width
    return 2 * ring(context) * size / link_rate(gpu, crosses=tensor * context > topology.ranks_per_node)


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
    rows = tokens * shape.experts_per_token * busiest_rank(topology) * ring(topology.expert_parallel)
    span = topology.expert_parallel * topology.expert_tensor_parallel
    rate = link_rate(gpu, crosses=span > topology.ranks_per_node)
    return 4 * rows * shape.hidden_size * workload.width / rate


def head_pass(workload: Workload, topology: Topology, gpu: GpuKind, implementation: Implementation) -> Pass:
    """Return the times of output layer and loss, which are never in fp8."""
    shape, tensor = workload.shape, topology.tensor_parallel
    tokens = topology.micro_batch_size * workload.seq_length / topology.context_parallel
    rows = shape.vocab_size / tensor
    weights = rows * shape.hidden_size
    half = dataclasses.replace(workload, precision="bf16") if workload.precision == "fp8" else workload
    return Pass(
        matmul=_products(half, gpu, implementation, weights, tokens, shape.hidden_size + rows),
        elementwise=implementation.passes_logits * rows * workload.width * tokens / memory_rate(gpu),
        tensor_parallel=4 * ring(tensor) * tokens * shape.hidden_size * workload.width / link_rate(gpu, crosses=False),
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
    products = 2 if workload.adapted else 3  # frozen weights need no product for their gradient
    traffic = products * (tokens * outer + weights) * width
    return products * 2 * weights * tokens / (rate * 1e12) + MATMUL_EXPOSED_TRAFFIC * traffic / memory_rate(gpu)


def recompute_seconds(layout: Layout, layers: Pass) -> float:
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


def ring(size: int) -> float:
    """Return the part of a tensor that each rank sends in a ring all-gather or reduce-scatter."""
    return (size - 1) / size


def memory_rate(gpu: GpuKind) -> float:
    return gpu.memory_bandwidth * gpu.memory_efficiency * 1e9


def link_rate(gpu: GpuKind, *, crosses: bool) -> float:
    return (gpu.inter_node_bandwidth if crosses else gpu.intra_node_bandwidth) * gpu.collective_efficiency * 1e9
