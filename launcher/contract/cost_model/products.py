"""Seconds of the matrix products of a decoder layer's linears and of the output layer, forward and backward.

Products run at the rate that large ones reach, plus the part of their memory traffic that arithmetic does not hide.
Each place has three products: forward, for the gradient of the input, and for the gradient of the weight, which frozen
weights do not need. Those that the training code computes in fp8 are counted in fp8.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from launcher.contract.adapters import adapted_places, expert_adapters
from launcher.contract.cost_model.implementation import (
    EXPERT_PRODUCTS_RATE,
    EXPERT_ROWS_FOR_HALF_RATE,
    MATMUL_EXPOSED_TRAFFIC,
    Implementation,
)
from launcher.contract.cost_model.layer_kinds import LayerKind
from launcher.contract.cost_model.memory import busiest_rank, expert_rows, micro_batch_tokens
from launcher.contract.cost_model.workload import Workload, expert_layer_parameters
from launcher.contract.flops import active_expert_parameters, router_parameters
from launcher.contract.hardware import GpuKind
from launcher.contract.linears import Linear, Place, layer_linears
from launcher.contract.model_shape import ModelShape
from launcher.contract.topology import Topology

FP32_RATE = 0.5
"""fp32 products run as TF32, by NVIDIA's data sheets at half the bf16 rate."""
ROUNDING_BYTES = 3
"""Read and written for each number that is rounded from bf16 to fp8. For dense linears the rate of products has it."""
PEAKS_BYTES = 2
"""Read of each weight for the largest value of its column, by which gradients of inputs round it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """The linears of one place of a layer, as far as one rank computes them."""

    weights: float
    """Number of weights that a token is multiplied by."""
    read: float
    """Number of weights that are read: with experts, more than a single token uses."""
    outer: float
    """Number of inputs and outputs per token."""
    place: Place | None = None
    """None for experts and output layer."""
    experts: bool = False
    """Whether these are the products of experts."""
    rate: float = 1.0
    """Share of the rate of large products that it reaches."""
    adapted: bool = False
    """Whether it has adapters."""


def layer_products(workload: Workload, topology: Topology, kind: LayerKind) -> list[Product]:
    """Return the products of a layer of this kind on one rank."""
    shape = workload.shape.for_layers(windowed=kind.windowed)
    routed = bool(shape.num_experts) and not kind.dense
    heads = 0 if kind.linear else (2 - shape.keyed_values) * max(0, topology.tensor_parallel - shape.num_query_groups)
    repeated = heads * shape.head_dim
    linears = layer_linears(shape, dense=kind.dense, linear=kind.linear)
    adapted = adapted_places(shape, workload.lora, dense=kind.dense, linear=kind.linear) if workload.adapted else ()
    found = [
        _dense(topology, place, tuple(group), repeated=repeated, adapted=place in adapted)
        for place, group in groupby(linears, key=lambda each: each.place)
    ]
    return [*found, _experts(workload, topology)] if routed else found


def output_product(shape: ModelShape, topology: Topology) -> Product:
    """Return the output layer's product on one rank."""
    rows = shape.vocab_size / topology.tensor_parallel
    weights = rows * shape.hidden_size
    return Product(weights=weights, read=weights, outer=shape.hidden_size + rows)


def product_seconds(
    workload: Workload, tokens: float, gpu: GpuKind, implementation: Implementation, product: Product, *, fp8: bool
) -> list[float]:
    """Return the seconds of a place's products for `tokens`: forward, gradient of the input, gradient of the weight.

    Frozen weights have no third one. `fp8` says whether the layer has products in fp8.
    """
    numbers, operations = tokens * product.outer + product.read, 2 * product.weights * tokens
    fp8 = fp8 and (workload.fp8.experts if product.experts else product.place is not None)
    found = []
    for index, low in enumerate(_forms(workload, implementation, product, fp8=fp8)):
        traffic = MATMUL_EXPOSED_TRAFFIC * numbers * (1 if low else workload.width)
        if low and product.experts:  # a token meets few of the matrices, and all of them are rounded
            rows = tokens * product.outer / 2  # forward of inputs, then of outputs
            traffic += ROUNDING_BYTES * (product.read + rows) + (PEAKS_BYTES * product.read if index else 0)
        rate = product.rate * _rate(workload, gpu, implementation, fp8=low)
        found.append(operations / rate + traffic / memory_rate(gpu))
    return found


def memory_rate(gpu: GpuKind) -> float:
    """Return the bytes per second at which elementwise kernels read and write."""
    return gpu.memory_bandwidth * gpu.memory_efficiency * 1e9


def _forms(workload: Workload, implementation: Implementation, product: Product, *, fp8: bool) -> list[bool]:
    """Return whether each of a place's products is in fp8, in the order of `product_seconds`."""
    in_bf16 = workload.fp8.bf16_gradients
    places = ("fc1", "fc2") if product.experts else (product.place,)
    forms = [fp8, fp8 and not any(place in in_bf16 for place in places)]
    return forms if workload.adapted else [*forms, fp8 and implementation.fp8_weight_gradients]


def _rate(workload: Workload, gpu: GpuKind, implementation: Implementation, *, fp8: bool) -> float:
    """Return the operations per second of large products."""
    if fp8:
        assert gpu.fp8_tflops is not None  # a config that asks for fp8 elsewhere is refused
        return gpu.fp8_tflops * implementation.fp8_efficiency * 1e12
    return gpu.bf16_tflops * gpu.matmul_efficiency * 1e12 * (FP32_RATE if workload.precision == "fp32" else 1)


def _dense(topology: Topology, place: Place, linears: tuple[Linear, ...], *, repeated: int, adapted: bool) -> Product:
    """Return the product of a place whose linears all have the same inputs.

    Where tensor parallel exceeds the number of KV heads, ranks share heads, so that all ranks together compute
    `repeated` outputs more.
    """
    tensor = topology.tensor_parallel
    inputs, outputs = linears[0].inputs, sum(each.outputs for each in linears)
    if place == "latents":  # every rank has these weights, and with sequence parallelism its own part of the tokens
        read, sequence = inputs * outputs, tensor if topology.sequence_parallel else 1
        numbers = (inputs + outputs) / sequence
        return Product(weights=read / sequence, read=read, outer=numbers, place=place, adapted=adapted)
    if place == "qkv":
        outputs += repeated
    weights = inputs * outputs / tensor
    outer = inputs / tensor + outputs if place in ("proj", "fc2") else inputs + outputs / tensor
    return Product(weights=weights, read=weights, outer=outer, place=place, adapted=adapted)


def _experts(workload: Workload, topology: Topology) -> Product:
    """Return the products of the busiest rank's experts, for which the others wait, and of the router."""
    shape, tensor, cut = workload.shape, topology.tensor_parallel, topology.expert_tensor_parallel
    rows = expert_rows(shape, topology)
    numbers = 2 * shape.hidden_size + (3 if shape.gated_mlp else 2) * shape.expert_ffn_hidden_size / cut
    met = micro_batch_tokens(workload, topology) * rows * topology.expert_parallel / shape.num_experts
    return Product(
        weights=busiest_rank(topology) * active_expert_parameters(shape) / tensor + router_parameters(shape) / tensor,
        read=expert_layer_parameters(shape, topology),
        outer=rows * numbers,
        experts=True,
        rate=EXPERT_PRODUCTS_RATE * met / (met + EXPERT_ROWS_FOR_HALF_RATE),
        adapted=workload.adapted and expert_adapters(shape, workload.lora) > 0,
    )
