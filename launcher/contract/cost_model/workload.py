"""What a step computes (model, rows, precision) and how ranks share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from launcher.contract.adapters import expert_adapters, layer_adapters
from launcher.contract.flops import (
    expert_parameters,
    layer_matmul_parameters,
    layer_norm_parameters,
    training_flops_of,
)
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import LoraSpec
from launcher.contract.stages import chunk_ranges
from launcher.contract.topology import Topology

Recompute = Literal["none", "norms", "selective", "full", "offload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One optimizer step of a run."""

    shape: ModelShape
    seq_length: int
    """Tokens of a row, padding included."""
    rows: int
    """Rows of a step, of all data parallel ranks together."""
    attended: float
    """Mean over tokens of the length of their example, sum s_i^2 / sum s_i: seq_length if each row is one example."""
    fill: float = 1.0
    """Share of the tokens that are not padding."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    lora: LoraSpec = field(default_factory=LoraSpec)
    """If it has a rank, only adapters are trained."""

    @property
    def tokens(self) -> float:
        """Tokens of a step without padding."""
        return self.rows * self.seq_length * self.fill

    @property
    def flops(self) -> int:
        """Useful operations of a step, by the convention of `launcher.contract.flops`."""
        return training_flops_of(self.shape, round(self.tokens), round(self.tokens * self.attended), self.lora)

    @property
    def adapted(self) -> bool:
        """Whether only adapters are trained."""
        return self.lora.rank is not None

    @property
    def adds_adapters_in_products(self) -> bool:
        """Whether frozen products can add adapters themselves, where one tensor parallel rank has them whole."""
        return self.adapted and not self.lora.dora and self.lora.dropout == 0.0

    @property
    def width(self) -> int:
        """Bytes of an activation or weight."""
        return 4 if self.precision == "fp32" else 2

    def micro_batches(self, topology: Topology) -> int:
        """Return the forward passes of a rank in a step. Ranks with fewer rows get empty ones."""
        each = -(-self.rows // (topology.micro_batch_size * topology.data_parallel))
        multiple = topology.micro_batch_multiple
        return max(1, -(-each // multiple) * multiple)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A topology with the settings that trade memory for time."""

    topology: Topology
    recompute: Recompute = "none"
    distributed_optimizer: bool = True

    def describe(self) -> str:
        """Return the topology, micro-batch size and recomputation in words."""
        recompute = "" if self.recompute == "none" else f", {self.recompute} recompute"
        return f"{self.topology.describe()}, micro-batch {self.topology.micro_batch_size}{recompute}"


def expert_layer_parameters(shape: ModelShape, topology: Topology) -> int:
    """Return the weights of a decoder layer's experts on one rank."""
    return expert_parameters(shape) // (topology.expert_parallel * topology.expert_tensor_parallel)


def layer_parameters(
    shape: ModelShape, tensor_parallel: int, *, active: bool = False, dense: bool = False, linear: bool = False
) -> int:
    """Return a decoder layer's weights on one tensor parallel rank. If tp exceeds the KV heads, ranks share them.

    Of experts, `active` counts those that one token goes to, which tensor parallel ranks compute together; else none.
    `dense` is for a layer of such a model that has an MLP instead, `linear` for one with linear attention.
    """
    products = layer_matmul_parameters(shape, active=active, dense=dense, linear=linear)
    products -= 0 if active or dense else expert_parameters(shape)
    if linear:
        return products // tensor_parallel + layer_norm_parameters(shape, linear=True)
    queries = shape.num_attention_heads * shape.head_dim
    groups = max(shape.num_query_groups, tensor_parallel)
    repeated = 2 * (groups - shape.num_query_groups) * shape.head_dim * shape.hidden_size
    assert queries % tensor_parallel == 0
    return (products + repeated) // tensor_parallel + layer_norm_parameters(shape)


def linear_share(shape: ModelShape) -> float:
    """Return the share of the layers that have linear attention."""
    return len(shape.linear_layers) / shape.num_layers


def stage_parameters(shape: ModelShape, topology: Topology, stage: int) -> int:
    """Return the weights on one rank of a stage, without experts. A tied output layer has a copy on another stage."""
    tensor, stages = topology.tensor_parallel, topology.pipeline_parallel
    embedding = -(-shape.vocab_size // tensor) * shape.hidden_size
    usual, dense = layer_counts(shape, topology)[stage]
    count = usual * layer_parameters(shape, tensor) + dense * layer_parameters(shape, tensor, dense=True)
    linear = linear_counts(shape, topology)[stage]
    if linear:
        count += linear * (layer_parameters(shape, tensor, linear=True) - layer_parameters(shape, tensor))
    if stage == 0:
        count += embedding
    if stage == stages - 1:
        count += shape.hidden_size
        if stages > 1 or not shape.tied_embeddings:
            count += embedding
    return count


def stage_expert_parameters(shape: ModelShape, topology: Topology, stage: int) -> int:
    """Return the weights of experts on one rank of a pipeline stage."""
    usual, _ = layer_counts(shape, topology)[stage]
    return usual * expert_layer_parameters(shape, topology)


def layer_counts(shape: ModelShape, topology: Topology) -> tuple[tuple[int, int], ...]:
    """Return the numbers of each stage's usual layers, and of those without experts in a model that has some."""
    return _layer_counts(topology.layers_per_stage, topology.pipeline_parallel, shape.dense_layers)


def linear_counts(shape: ModelShape, topology: Topology) -> tuple[int, ...]:
    """Return how many layers of each stage have linear attention."""
    counts = _layer_counts(topology.layers_per_stage, topology.pipeline_parallel, shape.linear_layers)
    return tuple(linear for _, linear in counts)


@lru_cache(maxsize=1024)
def _layer_counts(split: tuple[int, ...], stages: int, dense_layers: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    by_chunk = chunk_layer_counts(split, dense_layers)
    by_stage = [by_chunk[stage::stages] for stage in range(stages)]
    return tuple((sum(usual for usual, _ in held), sum(dense for _, dense in held)) for held in by_stage)


@lru_cache(maxsize=1024)
def chunk_layer_counts(split: tuple[int, ...], dense_layers: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return what `layer_counts` does for each model chunk, in the model's order."""
    found = []
    for layers in chunk_ranges(split):
        dense = sum(layer in layers for layer in dense_layers)
        found.append((len(layers) - dense, dense))
    return tuple(found)


def trained_parameters(workload: Workload, topology: Topology, stage: int) -> tuple[int, int]:
    """Return the trained weights on a rank of a stage, without experts and of experts.

    Tensor parallelism shards only one of an adapter's two matrices; both are counted whole.
    """
    shape, lora = workload.shape, workload.lora
    if not workload.adapted:
        return stage_parameters(shape, topology, stage), stage_expert_parameters(shape, topology, stage)
    usual, dense = layer_counts(shape, topology)[stage]
    held = usual * shape.num_experts // topology.expert_parallel
    layers = usual * layer_adapters(shape, lora) + dense * layer_adapters(shape, lora, dense=True)
    linear = linear_counts(shape, topology)[stage]
    layers += linear * (layer_adapters(shape, lora, linear=True) - layer_adapters(shape, lora)) if linear else 0
    return layers, held * expert_adapters(shape, lora)
