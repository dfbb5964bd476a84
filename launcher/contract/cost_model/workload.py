"""What a step computes (model, rows, precision) and how ranks share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from launcher.contract.adapters import expert_adapters, layer_adapters
from launcher.contract.cost_model.layer_kinds import KindCounts, LayerKind, counts_by_stage, layer_kinds
from launcher.contract.divisors import rounded_up
from launcher.contract.flops import (
    expert_parameters,
    layer_matmul_parameters,
    layer_norm_parameters,
    position_parameters,
    training_flops_of,
    whole_parameters,
)
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import Fp8Spec, LoraSpec
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
    trained: float = 1.0
    """Share of the tokens that are targets: output layer and loss are computed for those alone."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    fp8: Fp8Spec = field(default_factory=Fp8Spec)
    """What is in fp8, with that precision."""
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
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return layer_kinds(self.shape, self.fp8 if self.precision == "fp8" else None)

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
        """Return the number of a rank's micro-batches in a step. Ranks with fewer rows get empty ones."""
        each = -(-self.rows // (topology.micro_batch_size * topology.data_parallel))
        return max(1, rounded_up(each, topology.micro_batch_multiple))


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A topology with the settings that trade memory for time."""

    topology: Topology
    recompute: Recompute = "none"
    recompute_layers: int | None = None
    """Of each model chunk, with whole layers recomputed; None for all."""
    distributed_optimizer: bool = True
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    """Number type of the buffers of gradients."""
    overlap: bool = True
    """Whether gradients are reduced behind the backward pass, and weights gathered behind the forward pass."""

    @property
    def gradient_width(self) -> int:
        """Bytes of a gradient in its buffer."""
        return 4 if self.grad_reduce == "fp32" else 2

    @property
    def recompute_words(self) -> str:
        """What is computed again, as tables show it."""
        return self.recompute if self.recompute_layers is None else f"{self.recompute} {self.recompute_layers}"

    def describe(self) -> str:
        """Return the topology, micro-batch size and recomputation in words."""
        recompute = "" if self.recompute == "none" else f", {self.recompute} recompute"
        if self.recompute_layers is not None:
            part = "model chunk" if self.topology.virtual_pipeline > 1 else "stage"
            recompute += f" of {self.recompute_layers} layers a {part}"
        return f"{self.topology.describe()}, micro-batch {self.topology.micro_batch_size}{recompute}"


def expert_layer_parameters(shape: ModelShape, topology: Topology) -> int:
    """Return the number of weights in a decoder layer's experts on one rank."""
    return expert_parameters(shape) // (topology.expert_parallel * topology.expert_tensor_parallel)


def layer_parameters(shape: ModelShape, tensor_parallel: int, *, dense: bool = False, linear: bool = False) -> int:
    """Return the number of a decoder layer's weights on one tensor parallel rank, without experts.

    If tp exceeds the KV heads, ranks share them. `dense` is for a layer of a model with experts that has an MLP
    instead, `linear` for one with linear attention.
    """
    products = layer_matmul_parameters(shape, dense=dense, linear=linear)
    products -= 0 if dense else expert_parameters(shape)
    if linear:
        return products // tensor_parallel + layer_norm_parameters(shape, linear=True)
    queries = shape.num_attention_heads * shape.head_dim
    groups = max(shape.num_query_groups, tensor_parallel)
    repeated = (2 - shape.keyed_values) * (groups - shape.num_query_groups) * shape.head_dim * shape.hidden_size
    assert queries % tensor_parallel == 0
    whole = whole_parameters(shape)
    return (products - whole + repeated) // tensor_parallel + whole + layer_norm_parameters(shape)


def stage_parameters(shape: ModelShape, topology: Topology, stage: int) -> int:
    """Return the number of weights on one rank of a stage, without experts.

    A tied output layer on another stage than the embedding counts as a copy of it.
    """
    tensor, stages = topology.tensor_parallel, topology.pipeline_parallel
    embedding = -(-shape.vocab_size // tensor) * shape.hidden_size
    count = sum(
        layers
        * layer_parameters(shape.for_layers(windowed=kind.windowed), tensor, dense=kind.dense, linear=kind.linear)
        for kind, layers in _stage_kinds(shape, topology, stage).items()
    )
    if stage == 0:
        count += embedding + position_parameters(shape)
    if stage == stages - 1:
        count += shape.hidden_size
        if stages > 1 or not shape.tied_embeddings:
            count += embedding
    return count


def stage_expert_parameters(shape: ModelShape, topology: Topology, stage: int) -> int:
    """Return the number of weights of experts on one rank of a pipeline stage."""
    return _layers_with_experts(shape, topology, stage) * expert_layer_parameters(shape, topology)


def trained_parameters(workload: Workload, topology: Topology, stage: int) -> tuple[int, int]:
    """Return the numbers of trained weights on one rank of a stage: outside of experts, and in experts.

    Tensor parallelism shards only one of an adapter's two matrices; both are counted whole.
    """
    shape, lora = workload.shape, workload.lora
    if not workload.adapted:
        return stage_parameters(shape, topology, stage), stage_expert_parameters(shape, topology, stage)
    own = sum(
        layers * layer_adapters(shape.for_layers(windowed=kind.windowed), lora, dense=kind.dense, linear=kind.linear)
        for kind, layers in _stage_kinds(shape, topology, stage).items()
    )
    held = _layers_with_experts(shape, topology, stage) * shape.num_experts // topology.expert_parallel
    return own, held * expert_adapters(shape, lora)


def _stage_kinds(shape: ModelShape, topology: Topology, stage: int) -> KindCounts:
    """Return how many layers of each kind a stage has, whatever their precision."""
    return counts_by_stage(layer_kinds(shape, None), topology.layers_per_stage, topology.pipeline_parallel)[stage]


def _layers_with_experts(shape: ModelShape, topology: Topology, stage: int) -> int:
    return sum(layers for kind, layers in _stage_kinds(shape, topology, stage).items() if not kind.dense)
