"""The parallel layout of a run: sizes, and the rules between them.

One object carries the same numbers from the check on the login node to the process groups of the ranks. The rules
are Megatron-core's own, plus three of ours: tensor parallel stays within a node (its all-reduces need NVLink), the
interleaved schedule needs a pipeline, and its micro-batches must be a multiple of the stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from launcher.contract.errors import TopologyError
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Checked parallel sizes of a run."""

    world_size: int
    ranks_per_node: int
    tensor_parallel: int
    pipeline_parallel: int
    virtual_pipeline: int
    context_parallel: int
    data_parallel: int
    sequence_parallel: bool
    micro_batch_size: int
    global_batch_size: int

    @property
    def micro_batches(self) -> int:
        """Forward passes of one rank in one optimizer step (gradient accumulation), where each step has as many."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def reducing_ranks(self) -> int:
        """Ranks with the same parameters: over them gradients are summed, and the distributed optimizer is spread."""
        return self.data_parallel * self.context_parallel

    @property
    def sequence_multiple(self) -> int:
        """Padded sequence lengths must be a multiple of this."""
        return sequence_multiple(self.tensor_parallel, self.context_parallel, self.sequence_parallel)

    @property
    def micro_batch_multiple(self) -> int:
        """The micro-batches of a rank in a step must be a multiple of this: the interleaved schedule's rule."""
        return self.pipeline_parallel if self.virtual_pipeline > 1 else 1

    def describe(self) -> str:
        """`tp2 x pp2 x dp2 = 8 ranks`, naming only what is larger than 1."""
        sizes = {
            "tp": self.tensor_parallel,
            "pp": self.pipeline_parallel,
            "cp": self.context_parallel,
            "dp": self.data_parallel,
        }
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["dp1"]
        extras = " + sequence parallel" if self.sequence_parallel else ""
        extras += f" + virtual pipeline {self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
        return f"{' x '.join(parts)} = {self.world_size} ranks{extras}"


def build_topology(spec: RunSpec, shape: ModelShape | None) -> Topology:
    """Check every rule and return the layout.

    `shape` is None where the model is not readable on this machine; its rules are then left to the ranks.
    Raises TopologyError with every violated rule.
    """
    problems = [*_size_problems(spec)]
    if problems:  # sizes below 1 would make the arithmetic of the other rules meaningless
        raise TopologyError(problems)
    problems += _world_problems(spec)
    problems += _pipeline_problems(spec)
    if shape is not None:
        problems += _model_problems(spec, shape)
    if problems:
        raise TopologyError(problems)
    topo = spec.topology
    return Topology(
        world_size=spec.resources.world_size,
        ranks_per_node=spec.resources.ranks_per_node,
        tensor_parallel=topo.tensor_parallel,
        pipeline_parallel=topo.pipeline_parallel,
        virtual_pipeline=topo.virtual_pipeline,
        context_parallel=topo.context_parallel,
        data_parallel=spec.resources.world_size // _model_parallel(spec),
        sequence_parallel=topo.sequence_parallel,
        micro_batch_size=spec.train.micro_batch_size,
        global_batch_size=spec.train.global_batch_size,
    )


def steps_vary(spec: RunSpec) -> bool:
    """Whether the micro-batches of a step depend on its examples; each rank then gets equally many, some empty."""
    return spec.data.packing or spec.train.global_batch_unit == "tokens"


def describe_batch(spec: RunSpec, topology: Topology) -> str:
    """What one optimizer step holds and how it is cut."""
    size, unit = spec.train.global_batch_size, spec.train.global_batch_unit
    ranks, rows = topology.data_parallel, spec.train.micro_batch_size
    if spec.data.packing:
        cut = f"packed into rows of at most {spec.data.seq_length:,} tokens over dp {ranks}"
    elif steps_vary(spec):
        cut = f"in micro-batches of {rows} over dp {ranks}"
    else:
        cut = f"= micro-batch {rows} x dp {ranks} x {topology.micro_batches} accumulated"
    most = f"; at most {size * spec.data.seq_length:,} tokens" if unit == "examples" else ""
    return f"{size:,} {unit} a step {cut}{most}"


def _model_parallel(spec: RunSpec) -> int:
    topo = spec.topology
    return topo.tensor_parallel * topo.pipeline_parallel * topo.context_parallel


def sequence_multiple(tensor: int, context: int, sequence_parallel: bool) -> int:
    """What the length of a row must be a multiple of: two chunks for each rank of cp, each split over tp."""
    return (2 * context if context > 1 else 1) * (tensor if sequence_parallel else 1)


def _size_problems(spec: RunSpec) -> list[str]:
    topo, resources, train = spec.topology, spec.resources, spec.train
    sizes = {
        "resources.nodes": resources.nodes,
        "resources.tasks_per_node": resources.ranks_per_node,
        "topology.tensor_parallel": topo.tensor_parallel,
        "topology.pipeline_parallel": topo.pipeline_parallel,
        "topology.virtual_pipeline": topo.virtual_pipeline,
        "topology.context_parallel": topo.context_parallel,
        "train.micro_batch_size": train.micro_batch_size,
        "train.global_batch_size": train.global_batch_size,
        "data.seq_length": spec.data.seq_length,
    }
    problems = [f"{key} is {value}; it must be at least 1" for key, value in sizes.items() if value < 1]
    if resources.gpus_per_node < 0:
        problems.append(f"resources.gpus_per_node is {resources.gpus_per_node}; it must be at least 0")
    if 0 < resources.gpus_per_node != resources.ranks_per_node:
        problems.append(
            f"resources.tasks_per_node is {resources.ranks_per_node} on nodes with {resources.gpus_per_node} GPUs; "
            f"each rank drives one GPU, so leave tasks_per_node out or set it to {resources.gpus_per_node}"
        )
    return problems


def _world_problems(spec: RunSpec) -> list[str]:
    topo, resources, train = spec.topology, spec.resources, spec.train
    world, model_parallel = resources.world_size, _model_parallel(spec)
    tensor = topo.tensor_parallel
    problems = []
    if resources.ranks_per_node % tensor:
        valid = _divisors(resources.ranks_per_node)
        problems.append(
            f"topology.tensor_parallel {tensor} does not divide the {resources.ranks_per_node} ranks of a node, "
            f"and tensor parallel must not cross nodes; valid here: {_some(valid)}"
        )
    if world % model_parallel:
        below, above = (world // model_parallel) * model_parallel, -(-world // model_parallel) * model_parallel
        nearest = [size for size in (below, above) if size]
        problems.append(
            f"{world} ranks ({resources.nodes} nodes x {resources.ranks_per_node}) do not divide by "
            f"tensor_parallel {tensor} x pipeline_parallel {topo.pipeline_parallel} x context_parallel "
            f"{topo.context_parallel} = {model_parallel}; nearest valid numbers of ranks: {_some(nearest)}"
        )
    elif not steps_vary(spec):
        step = train.micro_batch_size * (world // model_parallel)
        if train.global_batch_size % step:
            below = train.global_batch_size // step * step
            nearest = [size for size in (below, below + step) if size]
            problems.append(
                f"train.global_batch_size {train.global_batch_size} does not divide by micro_batch_size "
                f"{train.micro_batch_size} x data_parallel {world // model_parallel} = {step}; "
                f"nearest valid: {_some(nearest)}"
            )
    if topo.sequence_parallel and tensor == 1:
        problems.append("topology.sequence_parallel needs tensor_parallel > 1; set it to false")
    multiple = sequence_multiple(tensor, topo.context_parallel, topo.sequence_parallel)
    if spec.data.seq_length % multiple:
        problems.append(
            f"data.seq_length {spec.data.seq_length} does not divide by {multiple} (tensor_parallel with "
            f"sequence_parallel, 2 x context_parallel); nearest valid: "
            f"{_some(_neighbours(spec.data.seq_length, multiple))}"
        )
    return problems


def _pipeline_problems(spec: RunSpec) -> list[str]:
    topo, train = spec.topology, spec.train
    if topo.virtual_pipeline == 1:
        return []
    if topo.pipeline_parallel == 1:
        return [f"topology.virtual_pipeline {topo.virtual_pipeline} needs pipeline_parallel > 1; set it to 1"]
    if spec.resources.world_size % _model_parallel(spec) or steps_vary(spec):
        return []
    data_parallel = spec.resources.world_size // _model_parallel(spec)
    micro_batches = train.global_batch_size // (train.micro_batch_size * data_parallel)
    if micro_batches == 0 or micro_batches % topo.pipeline_parallel:
        step = train.micro_batch_size * data_parallel * topo.pipeline_parallel
        return [
            f"topology.virtual_pipeline {topo.virtual_pipeline} needs the micro-batches of a step to be a multiple of "
            f"pipeline_parallel {topo.pipeline_parallel}, and there are {micro_batches} "
            f"(global_batch_size {train.global_batch_size} / (micro_batch_size {train.micro_batch_size} "
            f"x data_parallel {data_parallel})); "
            f"nearest valid global_batch_size: {_some(_neighbours(train.global_batch_size, step))}"
        ]
    return []


def _model_problems(spec: RunSpec, shape: ModelShape) -> list[str]:
    topo = spec.topology
    tensor, stages = topo.tensor_parallel, topo.pipeline_parallel * topo.virtual_pipeline
    problems = []
    if not _heads_fit(shape, tensor):
        valid = [size for size in _divisors(shape.num_attention_heads) if _heads_fit(shape, size)]
        what = (
            f"{shape.num_attention_heads} attention heads do not divide by tensor_parallel {tensor}"
            if shape.num_attention_heads % tensor
            else f"{shape.num_query_groups} KV heads are neither a multiple nor a divisor of tensor_parallel {tensor}"
        )
        problems.append(f"{what}; valid here: {_some(valid)}")
    if shape.num_layers % stages:
        virtual = f" x virtual_pipeline {topo.virtual_pipeline}" if topo.virtual_pipeline > 1 else ""
        valid = [size for size in _divisors(shape.num_layers) if size % topo.virtual_pipeline == 0]
        problems.append(
            f"{shape.num_layers} layers do not divide by pipeline_parallel {topo.pipeline_parallel}{virtual}; "
            f"valid pipeline_parallel here: {_some(size // topo.virtual_pipeline for size in valid)}"
        )
    if shape.ffn_hidden_size % tensor:
        problems.append(
            f"feed-forward size {shape.ffn_hidden_size} does not divide by tensor_parallel {tensor}; "
            f"valid here: {_some(_divisors(shape.ffn_hidden_size))}"
        )
    if spec.train.precision == "fp8":
        problems += _fp8_problems(shape, tensor)
    if spec.data.seq_length > shape.max_position_embeddings:
        problems.append(
            f"data.seq_length {spec.data.seq_length} is longer than the model's "
            f"{shape.max_position_embeddings} positions; shorten it to at most that"
        )
    return problems


def _fp8_problems(shape: ModelShape, tensor: int) -> list[str]:
    """fp8 products take weights whose sides, on each rank, are multiples of 16."""
    heads = shape.num_attention_heads + 2 * max(shape.num_query_groups, tensor)
    sizes = {
        "hidden size": shape.hidden_size,
        "feed-forward size": shape.ffn_hidden_size / tensor,
        "query heads": shape.num_attention_heads * shape.head_dim / tensor,
        "heads of Q, K and V": heads * shape.head_dim / tensor,
    }
    return [
        f"train.precision fp8 needs multiples of 16, and {what} on a rank of tensor_parallel {tensor} is {size:g}; "
        "set train.precision to bf16, or another tensor_parallel"
        for what, size in sizes.items()
        if size % 16
    ]


def _heads_fit(shape: ModelShape, tensor: int) -> bool:
    groups = shape.num_query_groups
    return shape.num_attention_heads % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _neighbours(number: int, step: int) -> list[int]:
    below = number // step * step
    return [size for size in (below, below + step) if size]


def _some(values: Iterable[int], limit: int = 12) -> str:
    values = list(values)
    if not values:
        return "none"
    return ", ".join(map(str, values[:limit])) + (", ..." if len(values) > limit else "")
