"""Predict the memory of each pipeline stage, and what it is used for.

Activations follow Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), section 4, without the score matrix
(flash attention) and with SwiGLU in place of the MLP: each tensor that the backward pass reads is counted once.
Micro-batches in flight are those of 1F1B and of the interleaved schedule (Narayanan et al. 2021,
https://arxiv.org/abs/2104.04473).
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.contract.adapters import expert_adapters
from launcher.contract.cost_model.implementation import COMMUNICATOR_GIB, CUDA_CONTEXT_GIB, Implementation
from launcher.contract.cost_model.layer_kinds import KindCounts, LayerKind, counts_by_stage, recomputed_by_stage
from launcher.contract.cost_model.workload import (
    Layout,
    Workload,
    expert_layer_parameters,
    stage_expert_parameters,
    stage_parameters,
    trained_parameters,
)
from launcher.contract.latent_attention import LatentAttention
from launcher.contract.model_shape import ModelShape
from launcher.contract.topology import Topology

GIB = 2**30
EXPERT_IMBALANCE = 1.5
"""Assumed: the busiest expert parallel rank's tokens over the mean. Routers of published models are not balanced on the
data of fine-tuning; with a few ranks, of many experts each, they rarely exceed this."""
LINEAR_CHUNK = 64
"""Tokens of a chunk of linear attention: each head keeps what a token has to do with those of its chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """GiB on one GPU of a pipeline stage at its peak."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    overhead: float
    """CUDA context and communication buffers, which torch does not count as allocated."""

    @property
    def allocated(self) -> float:
        """GiB that torch.cuda.max_memory_allocated reports."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    @property
    def total(self) -> float:
        """GiB in all."""
        return self.allocated + self.overhead


def pipeline_memory(workload: Workload, layout: Layout, implementation: Implementation) -> tuple[StageMemory, ...]:
    """Return the memory of every stage, first to last."""
    return tuple(
        stage_memory(workload, layout, implementation, stage) for stage in range(layout.topology.pipeline_parallel)
    )


def largest_stage(workload: Workload, layout: Layout, implementation: Implementation) -> StageMemory:
    """Return the stage with the highest peak.

    It is the first one, with the embedding, the last one, with the output layer, or the first of those with the same
    layers and the same ones recomputed, as earlier stages have more micro-batches in flight.
    """
    topology = layout.topology
    stages = range(topology.pipeline_parallel)
    counts = counts_by_stage(workload.kinds, topology.layers_per_stage, len(stages))
    again = _recomputed(workload, layout)
    first_with = {
        (frozenset(counts[stage].items()), frozenset(again[stage].items())): stage for stage in reversed(stages)
    }
    return max(
        (stage_memory(workload, layout, implementation, stage) for stage in {0, *first_with.values(), stages[-1]}),
        key=lambda memory: memory.total,
    )


def stage_memory(workload: Workload, layout: Layout, implementation: Implementation, stage: int) -> StageMemory:
    """Return the memory of one stage."""
    topology = layout.topology
    shape = workload.shape
    dense, experts = trained_parameters(workload, topology, stage)
    held = trained = updated = dense + experts
    if workload.adapted:
        held += stage_parameters(shape, topology, stage) + stage_expert_parameters(shape, topology, stage)
    if layout.distributed_optimizer:
        updated = dense // topology.reducing_ranks + experts // topology.expert_reducing_ranks
    # 8 bytes of moments, and 4 of a master copy unless the weights are fp32 themselves
    state = updated * (8 if workload.precision == "fp32" else 12)
    last = stage == topology.pipeline_parallel - 1
    logits = _logit_bytes(workload, topology, implementation) if last else 0.0
    activations = _activation_bytes(workload, layout, implementation, stage)
    activations += max(0.0, _used_by_experts(workload, topology, stage) - logits)  # logits are gone by then
    return StageMemory(
        stage=stage,
        weights=held * workload.width / GIB,
        gradients=trained * layout.gradient_width / GIB,
        optimizer=state / GIB,
        activations=activations / GIB,
        logits=logits / GIB,
        overhead=CUDA_CONTEXT_GIB + COMMUNICATOR_GIB * _communicators(topology),
    )


def layer_activation_bytes(
    workload: Workload, layout: Layout, implementation: Implementation, kind: LayerKind
) -> float:
    """Return the bytes that one layer keeps of one micro-batch, unless the whole layer is recomputed."""
    shape, topology = workload.shape.for_layers(windowed=kind.windowed), layout.topology
    tensor = topology.tensor_parallel
    sequence = tensor if topology.sequence_parallel else 1
    norms = 2 if layout.recompute == "norms" else 4  # inputs and outputs of two norms
    norms += shape.layer_norms - 2  # inputs of norms behind attention and MLP, whose outputs are only added
    per_token = norms * shape.hidden_size / sequence
    per_token += (_kept_by_linear_attention if kind.linear else _kept_by_attention)(shape, layout)
    mlp = _kept_by_mlp(workload, topology, implementation, kind)
    if shape.num_experts and not kind.dense:
        rows = expert_rows(shape, topology) * _kept_by_experts(workload, topology, implementation)
        per_token += mlp * shape.shared_expert_size / tensor + rows
    else:
        per_token += mlp * shape.ffn_hidden_size / tensor
    return per_token * workload.width * micro_batch_tokens(workload, topology)


def _kept_by_mlp(workload: Workload, topology: Topology, implementation: Implementation, kind: LayerKind) -> float:
    """Return how many numbers an MLP keeps per token and unit of its width."""
    if not workload.shape.gated_mlp:
        return 2
    one = topology.tensor_parallel == 1
    whole = one and workload.adds_adapters_in_products if workload.adapted else one or kind.fp8
    return implementation.saved_mlp - (implementation.spares_mlp_output and whole)


def _kept_by_experts(workload: Workload, topology: Topology, implementation: Implementation) -> float:
    """Return how many numbers an expert keeps for a row: its input, and of the unit between its products."""
    shape = workload.shape
    adapted = workload.adapted and expert_adapters(shape, workload.lora) > 0
    unit = implementation.saved_mlp - (implementation.spares_mlp_output and not adapted)
    return shape.hidden_size + unit * shape.expert_ffn_hidden_size / topology.expert_tensor_parallel


def _kept_by_attention(shape: ModelShape, layout: Layout) -> float:
    """Return how many numbers attention keeps per token between its projections."""
    if shape.latent is not None:
        return _kept_by_latent_attention(shape, shape.latent, layout)
    tensor = layout.topology.tensor_parallel
    queries = shape.num_attention_heads * shape.head_dim / tensor
    groups = max(1, shape.num_query_groups / tensor) * shape.head_dim
    outputs = 1 if layout.recompute == "selective" else 2  # the kernel's own, and the projection's input
    outputs += 2 * shape.output_gate  # the gate, and its sigmoid
    # With context parallelism attention keeps keys and values of the whole row, unless it gathers them again.
    shared_rows = 1 if layout.recompute == "selective" else layout.topology.context_parallel
    normed = shape.qk_norm or shape.width_norm
    before_norms = 2 * (queries + groups) if normed else 0  # the projection, of which values are a part, and inputs
    return before_norms + queries + 2 * groups * shared_rows + outputs * queries


def _kept_by_latent_attention(shape: ModelShape, sizes: LatentAttention, layout: Layout) -> float:
    """Return how many numbers latent attention keeps per token: the latents and their norms, then those of heads."""
    topology = layout.topology
    again = layout.recompute == "selective"
    shared_rows = 1 if again else topology.context_parallel
    latents = (2 * sizes.normed + sizes.rotary_dim) / (topology.tensor_parallel if topology.sequence_parallel else 1)
    # queries, keys and values, then the kernel's output and what of it the output projection takes
    core = shape.core_dim * (1 + 2 * shared_rows + (0 if again else 1))
    return latents + shape.num_attention_heads * (core + sizes.value_dim) / topology.tensor_parallel


def _kept_by_linear_attention(shape: ModelShape, layout: Layout) -> float:
    """Return how many numbers linear attention keeps per token, with the kernels of flash-linear-attention.

    Convolved rows and values are also kept as the contiguous copies that kernels take: from a step of Qwen3.5 4B.
    """
    sizes = shape.linear
    assert sizes is not None
    kept = sizes.projected + sizes.values  # outputs of the one projection, inputs of the other
    if layout.recompute != "selective":
        normed = 2 * sizes.keys  # queries and keys
        kept += 2 * sizes.convolved + normed + sizes.value_heads * LINEAR_CHUNK + 3 * sizes.values
    return kept / layout.topology.tensor_parallel


def busiest_rank(topology: Topology) -> float:
    """Return how many times the mean number of tokens the busiest of the ranks that share experts gets."""
    return min(EXPERT_IMBALANCE, topology.expert_parallel)


def expert_rows(shape: ModelShape, topology: Topology) -> float:
    """Return how many rows the experts of the busiest rank get for each token of a rank's micro-batch.

    Of tensor parallel ranks that share tokens, those with whole experts send each its own part of these there; those
    that share experts send them together, and each gets all of the rows.
    """
    shares = topology.tensor_parallel / topology.expert_tensor_parallel
    return shape.experts_per_token * busiest_rank(topology) / shares


def chunks_in_flight(topology: Topology, micro_batches: int, stage: int) -> int:
    """Return how many model chunks have activations on a stage at its peak."""
    stages, virtual = topology.pipeline_parallel, topology.virtual_pipeline
    if virtual == 1:
        return min(micro_batches, stages - stage)
    return min(micro_batches * virtual, 2 * (stages - stage - 1) + (virtual - 1) * stages + 1)


def micro_batch_tokens(workload: Workload, topology: Topology) -> float:
    """Return the number of tokens of a micro-batch on one rank, padding included."""
    return topology.micro_batch_size * workload.seq_length / topology.context_parallel


def _activation_bytes(workload: Workload, layout: Layout, implementation: Implementation, stage: int) -> float:
    topology = layout.topology
    counts = counts_by_stage(workload.kinds, topology.layers_per_stage, topology.pipeline_parallel)[stage]
    # The chunks of a stage take turns, so each has about an equal share of the passes in flight.
    in_flight = chunks_in_flight(topology, workload.micro_batches(topology), stage) / topology.virtual_pipeline
    kept = {kind: layer_activation_bytes(workload, layout, implementation, kind) for kind in counts}
    if layout.recompute == "offload":
        return max(kept.values())  # the inputs of layers are in the host's memory
    if layout.recompute != "full":
        return in_flight * sum(layers * kept[kind] for kind, layers in counts.items())
    sequence = topology.tensor_parallel if topology.sequence_parallel else 1
    inputs = workload.shape.hidden_size / sequence * workload.width * micro_batch_tokens(workload, topology)
    recomputed = _recomputed(workload, layout)[stage]
    # the inputs of recomputed layers, what the others keep, and the one layer that is being recomputed
    others = sum((layers - recomputed.get(kind, 0)) * kept[kind] for kind, layers in counts.items())
    return in_flight * (sum(recomputed.values()) * inputs + others) + max(kept[kind] for kind in recomputed)


def _used_by_experts(workload: Workload, topology: Topology, stage: int) -> float:
    """Return the bytes that the backward pass of a layer's experts needs beside what the layer keeps, at its peak.

    That is where the gradient of the second products' inputs and these inputs, computed again, are both there, beside
    the gradients of both products' rows. In fp8 it is later, where the first products have their outputs' gradient and
    all of the rank's gate and up projections in fp8. Those of dense linears are small beside what a layer keeps.
    """
    kinds = counts_by_stage(workload.kinds, topology.layers_per_stage, topology.pipeline_parallel)[stage]
    shape = workload.shape
    routed = [kind for kind in kinds if shape.num_experts and not kind.dense]
    if not routed:
        return 0.0
    rows = micro_batch_tokens(workload, topology) * expert_rows(shape, topology)
    around, unit = 2 * shape.hidden_size, shape.expert_ffn_hidden_size / topology.expert_tensor_parallel
    most = rows * (around + 2 * unit) * workload.width
    if workload.fp8.experts and any(kind.fp8 for kind in routed):
        rounded = rows * 2 * unit + expert_layer_parameters(shape, topology) * 2 / 3
        most = max(most, rows * around * workload.width + rounded)
    return most


def _recomputed(workload: Workload, layout: Layout) -> tuple[KindCounts, ...]:
    """Return how many layers of each kind are recomputed in each stage, where whole layers are."""
    topology = layout.topology
    split, stages = topology.layers_per_stage, topology.pipeline_parallel
    return recomputed_by_stage(workload.kinds, split, stages, layout.recompute_layers)


def _logit_bytes(workload: Workload, topology: Topology, implementation: Implementation) -> float:
    logits = workload.shape.vocab_size / topology.tensor_parallel * micro_batch_tokens(workload, topology)
    return implementation.logit_bytes * logits + min(implementation.logit_chunk, logits * workload.width / 2)


def _communicators(topology: Topology) -> int:
    sizes = (topology.tensor_parallel, topology.pipeline_parallel, topology.context_parallel, topology.data_parallel)
    return sum(size > 1 for size in sizes)
