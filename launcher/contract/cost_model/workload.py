"""What a step computes, apart from how it is spread: the model, the rows, the precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.contract.flops import layer_matmul_parameters, training_flops_of
from launcher.contract.model_shape import ModelShape
from launcher.contract.topology import Topology

Recompute = Literal["none", "norms", "selective", "full", "offload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One optimizer step of a run."""

    shape: ModelShape
    seq_length: int
    """Tokens of a row as it is computed."""
    rows: int
    """Rows of a step over all data parallel ranks."""
    attended: float
    """Mean over tokens of the length of their example, sum s_i^2 / sum s_i: seq_length where a row is one example."""
    fill: float = 1.0
    """Real tokens in a token that is computed."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    lora_rank: int | None = None
    """Only adapters of this rank are trained."""

    @property
    def tokens(self) -> float:
        """Real tokens of a step."""
        return self.rows * self.seq_length * self.fill

    @property
    def flops(self) -> int:
        """Useful operations of a step, by the convention of `launcher.contract.flops`."""
        return training_flops_of(self.shape, round(self.tokens), round(self.tokens * self.attended))

    @property
    def width(self) -> int:
        """Bytes of an activation or weight."""
        return 4 if self.precision == "fp32" else 2

    def micro_batches(self, topology: Topology) -> int:
        """Forward passes of a rank in a step; ranks with fewer rows get empty ones."""
        each = -(-self.rows // (topology.micro_batch_size * topology.data_parallel))
        multiple = topology.micro_batch_multiple
        return max(1, -(-each // multiple) * multiple)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A topology and what trades memory for time."""

    topology: Topology
    recompute: Recompute = "none"
    distributed_optimizer: bool = True

    def describe(self) -> str:
        """As a topology, with micro-batch and recomputation."""
        recompute = "" if self.recompute == "none" else f", {self.recompute} recompute"
        return f"{self.topology.describe()}, micro-batch {self.topology.micro_batch_size}{recompute}"


def layer_parameters(shape: ModelShape, tensor_parallel: int) -> int:
    """Weights of a decoder layer on one tensor parallel rank; KV heads below tp are held by several ranks."""
    queries = shape.num_attention_heads * shape.head_dim
    groups = max(shape.num_query_groups, tensor_parallel)
    repeated = 2 * (groups - shape.num_query_groups) * shape.head_dim * shape.hidden_size
    assert queries % tensor_parallel == 0
    return (layer_matmul_parameters(shape) + repeated) // tensor_parallel + 2 * shape.hidden_size


def stage_parameters(shape: ModelShape, topology: Topology, stage: int) -> int:
    """Weights on one rank of a pipeline stage. A tied output layer has its own copy on another stage."""
    tensor, stages = topology.tensor_parallel, topology.pipeline_parallel
    embedding = -(-shape.vocab_size // tensor) * shape.hidden_size
    count = shape.num_layers // stages * layer_parameters(shape, tensor)
    if stage == 0:
        count += embedding
    if stage == stages - 1:
        count += shape.hidden_size
        if stages > 1 or not shape.tied_embeddings:
            count += embedding
    return count


def adapter_parameters(shape: ModelShape, topology: Topology, rank: int) -> int:
    """Weights of LoRA adapters on every linear of a stage: rank * (inputs + outputs) each; the unsharded half whole."""
    queries = shape.num_attention_heads * shape.head_dim
    groups = shape.num_query_groups * shape.head_dim
    mlp = 3 if shape.gated_mlp else 2
    inputs_and_outputs = 4 * shape.hidden_size + 2 * queries + 2 * groups
    inputs_and_outputs += mlp * (shape.hidden_size + shape.ffn_hidden_size)
    return shape.num_layers // topology.pipeline_parallel * rank * inputs_and_outputs
