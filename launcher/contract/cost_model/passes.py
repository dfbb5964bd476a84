"""Seconds that forward and backward pass of one micro-batch take in a layer, and in the output layer.

Matrix products are in `products`. Elementwise kernels run at the memory's rate, and collectives as rings at the rate of
the slowest link they cross.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.contract.cost_model.implementation import (
    ADAPTED_PLACE_SECONDS,
    LATENT_PASSES,
    LINEAR_ATTENTION_EFFICIENCY,
    LINEAR_ATTENTION_PASSES,
    LORA_PASSES,
    LORA_PASSES_IN_PRODUCTS,
    PAIR_RATE,
    Implementation,
)
from launcher.contract.cost_model.layer_kinds import LayerKind
from launcher.contract.cost_model.memory import expert_rows, micro_batch_tokens
from launcher.contract.cost_model.products import (
    Product,
    layer_products,
    memory_rate,
    output_product,
    product_seconds,
)
from launcher.contract.cost_model.workload import Layout, Workload
from launcher.contract.flops import attended_in_window, core_width, linear_attention_flops
from launcher.contract.hardware import GpuKind
from launcher.contract.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Seconds that forward and backward of one micro-batch take in some layers, without recomputation."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    expert_parallel: float = 0.0
    matmul_forward: float = 0.0
    """The forward pass of the products alone, which `matmul` includes."""
    norms: float = 0.0
    """The forward pass of the norms alone, which `elementwise` includes."""

    @property
    def total(self) -> float:
        """All of it."""
        products = self.matmul + self.attention + self.elementwise
        return products + self.tensor_parallel + self.context_parallel + self.expert_parallel

    def plus(self, other: Pass, times: int = 1) -> Pass:
        """Return the sum of this pass and `times` the other one."""
        return Pass(
            matmul=self.matmul + times * other.matmul,
            attention=self.attention + times * other.attention,
            elementwise=self.elementwise + times * other.elementwise,
            tensor_parallel=self.tensor_parallel + times * other.tensor_parallel,
            context_parallel=self.context_parallel + times * other.context_parallel,
            expert_parallel=self.expert_parallel + times * other.expert_parallel,
            matmul_forward=self.matmul_forward + times * other.matmul_forward,
            norms=self.norms + times * other.norms,
        )


def layer_pass(
    workload: Workload, topology: Topology, gpu: GpuKind, implementation: Implementation, kind: LayerKind
) -> Pass:
    """Return the seconds that one micro-batch takes in a decoder layer."""
    shape, tensor = workload.shape, topology.tensor_parallel
    tokens = micro_batch_tokens(workload, topology)
    products = layer_products(workload, topology, kind)
    seconds = [product_seconds(workload, tokens, gpu, implementation, each, fp8=kind.fp8) for each in products]
    sequence = tensor if topology.sequence_parallel else 1
    collectives = (10 if topology.sequence_parallel else 8) * ring(tensor) * tokens * shape.hidden_size
    exposed = implementation.tensor_parallel_exposed / link_rate(gpu, tensor, crosses=False)
    moved = _moved(workload, topology, implementation, kind, products)
    return Pass(
        matmul=sum(sum(each) for each in seconds),
        matmul_forward=sum(each[0] for each in seconds),
        attention=(_linear_attention if kind.linear else _attention)(workload, topology, gpu, implementation, kind),
        elementwise=moved * workload.width * tokens / memory_rate(gpu) + _small_products(products),
        tensor_parallel=collectives * workload.width * exposed,
        context_parallel=_gathered_rows(workload, topology, gpu, kind),
        expert_parallel=0.0 if kind.dense else _exchanged_rows(workload, topology, gpu),
        # two norms, each of which reads and writes its tensor
        norms=4 * shape.hidden_size / sequence * workload.width * tokens / memory_rate(gpu),
    )


def _moved(
    workload: Workload,
    topology: Topology,
    implementation: Implementation,
    kind: LayerKind,
    products: list[Product],
) -> float:
    """Return how many numbers a layer's elementwise kernels read or write per token."""
    shape, tensor = workload.shape, topology.tensor_parallel
    width = shape.ffn_hidden_size if kind.dense else shape.active_ffn_size
    moved = implementation.passes_hidden * shape.hidden_size / (tensor if topology.sequence_parallel else 1)
    moved += implementation.passes_ffn * width / tensor
    if shape.latent is not None:
        moved += LATENT_PASSES * shape.num_attention_heads * shape.core_dim / tensor
    if shape.num_experts and not kind.dense:
        moved += implementation.passes_expert_rows * expert_rows(shape, topology) * shape.hidden_size
    if workload.adapted:
        one = tensor == 1 and implementation.adds_adapters_in_products and workload.adds_adapters_in_products
        moved += sum(
            (LORA_PASSES_IN_PRODUCTS if one and product.place is not None else LORA_PASSES) * product.outer
            for product in products
            if product.adapted
        )
    return moved


def _small_products(products: list[Product]) -> float:
    """Return the seconds that a layer's adapters, but not those of experts, take however few tokens there are."""
    return ADAPTED_PLACE_SECONDS * sum(product.adapted and product.place is not None for product in products)


def _attention(
    workload: Workload, topology: Topology, gpu: GpuKind, implementation: Implementation, kind: LayerKind
) -> float:
    """Return the seconds per layer and micro-batch of attention's core."""
    shape = workload.shape.for_layers(windowed=kind.windowed)
    attended = attended_in_window(shape, workload.attended) if kind.windowed else workload.attended
    width = core_width(shape) / topology.tensor_parallel
    # with a causal mask 6 * s operations per token and head dimension, forward and backward together
    operations = 3 * width * micro_batch_tokens(workload, topology) * attended
    return operations / (gpu.bf16_tflops * 1e12 * implementation.attention_efficiency(shape.core_dim, attended))


def _linear_attention(
    workload: Workload, topology: Topology, gpu: GpuKind, implementation: Implementation, kind: LayerKind
) -> float:
    """Return the seconds per layer and micro-batch of linear attention's convolution, rule and gated norm."""
    shape, sizes = workload.shape, workload.shape.linear
    assert sizes is not None
    tokens = micro_batch_tokens(workload, topology) / topology.tensor_parallel
    rule = tokens * linear_attention_flops(shape) / (gpu.bf16_tflops * 1e12 * LINEAR_ATTENTION_EFFICIENCY)
    moved = LINEAR_ATTENTION_PASSES * (sizes.convolved + 2 * sizes.values) * workload.width * tokens
    return rule + moved / memory_rate(gpu)


def _gathered_rows(workload: Workload, topology: Topology, gpu: GpuKind, kind: LayerKind) -> float:
    """Return the seconds per layer and micro-batch of gathering whole rows' keys and values, and of their gradients.

    Linear attention exchanges tokens for heads instead. No computation hides either.
    """
    shape = workload.shape.for_layers(windowed=kind.windowed)
    tensor, context = topology.tensor_parallel, topology.context_parallel
    size = 2 * max(1, shape.num_query_groups / tensor) * shape.core_dim
    if kind.linear:
        assert shape.linear is not None
        size = (shape.linear.convolved + 2 * shape.linear.value_heads + shape.linear.values) / tensor / context
    size *= topology.micro_batch_size * workload.seq_length * workload.width
    return 2 * ring(context) * size / link_rate(gpu, context, crosses=tensor * context > topology.ranks_per_node)


def _exchanged_rows(workload: Workload, topology: Topology, gpu: GpuKind) -> float:
    """Return the seconds per layer and micro-batch of sending tokens to their experts and back, forward and backward.

    None of it is hidden: the experts wait for their tokens.
    """
    if topology.expert_parallel == 1:
        return 0.0
    shape = workload.shape
    rows = micro_batch_tokens(workload, topology) * expert_rows(shape, topology) * ring(topology.expert_parallel)
    span = topology.expert_parallel * topology.expert_tensor_parallel
    rate = link_rate(gpu, topology.expert_parallel, crosses=span > topology.ranks_per_node)
    return 4 * rows * shape.hidden_size * workload.width / rate


def head_pass(workload: Workload, topology: Topology, gpu: GpuKind, implementation: Implementation) -> Pass:
    """Return the seconds per micro-batch of output layer and loss, which fused kernels compute for targets alone."""
    shape, tensor = workload.shape, topology.tensor_parallel
    tokens = micro_batch_tokens(workload, topology) * (workload.trained if implementation.loss_of_targets else 1)
    seconds = product_seconds(workload, tokens, gpu, implementation, output_product(shape, topology), fp8=False)
    logits = implementation.passes_logits * shape.vocab_size / tensor
    return Pass(
        matmul=sum(seconds),
        elementwise=logits * workload.width * tokens / memory_rate(gpu),
        tensor_parallel=4
        * ring(tensor)
        * tokens
        * shape.hidden_size
        * workload.width
        / link_rate(gpu, tensor, crosses=False),
    )


def recompute_seconds(layout: Layout, layers: Pass) -> float:
    """Return the seconds per micro-batch of recomputation in `layers`, those of which something is computed again.

    The forward pass of products is known. That of attention, elementwise kernels and tensor parallel collectives is
    taken for a third of both passes together, that of gathering rows and exchanging tokens for half.
    """
    if layout.recompute in ("full", "offload"):  # copies to the host run beside computation
        computed = layers.attention + layers.elementwise + layers.tensor_parallel
        gathered = layers.expert_parallel + layers.context_parallel
        return layers.matmul_forward + computed / 3 + gathered / 2
    if layout.recompute == "norms":
        return layers.norms
    return layers.attention / 3 + layers.context_parallel / 2 if layout.recompute == "selective" else 0.0


def ring(size: int) -> float:
    """Return the share of a tensor that each rank sends in a ring all-gather or reduce-scatter."""
    return (size - 1) / size


def link_rate(gpu: GpuKind, size: int, *, crosses: bool) -> float:
    """Return the bytes per second of a large collective of `size` ranks, between nodes if it `crosses` them."""
    if crosses:
        return gpu.inter_node_bandwidth * gpu.collective_efficiency * 1e9
    return gpu.intra_node_bandwidth * gpu.collective_efficiency * 1e9 * (PAIR_RATE if size == 2 else 1)
