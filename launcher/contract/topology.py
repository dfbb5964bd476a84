"""The topology of a run: how it is spread over ranks, and the rules between the sizes.

One object carries the same numbers from the check on the login node to the process groups of the ranks. The rules
are Megatron-core's own, plus three of ours: tensor parallel stays within a node (its all-reduces need NVLink), the
interleaved schedule needs a pipeline, and its micro-batches must be a multiple of the stages. Each rule yields a
message with its arithmetic and the nearest valid sizes. Bounds of single sizes stand at the fields of the config, and
`launcher.contract.stages` shares layers out over stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.contract.cuda_graphs import layout_without_graphs, no_graphs
from launcher.contract.divisors import divisors, nearest_multiples, shown_numbers
from launcher.contract.errors import TopologyError
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import Fp8Spec, RunSpec, TopologySpec
from launcher.contract.spec.fields import field_problems, rule_problems
from launcher.contract.stages import balanced_split, chunk_ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """The checked parallel sizes of a run."""

    world_size: int
    """Ranks in all."""
    ranks_per_node: int
    """Ranks of one node."""
    tensor_parallel: int
    """Ranks that share each matrix."""
    pipeline_parallel: int
    """Stages that the layers are spread over."""
    virtual_pipeline: int
    """Model chunks of each stage."""
    context_parallel: int
    """Ranks that share each row's tokens."""
    data_parallel: int
    """Replicas that share a batch."""
    sequence_parallel: bool
    """Whether tensor parallel ranks share activations between the matrices, too."""
    micro_batch_size: int
    """Rows of one forward pass."""
    global_batch_size: int
    """Examples of one optimizer step."""
    expert_parallel: int
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel: int
    """Ranks that share an expert's matrices: tensor_parallel unless the run says otherwise."""
    layers_per_stage: tuple[int, ...] = ()
    """Layers of each model chunk in the model's order: the first chunk of every stage, then the second of every stage.
    Empty where the model is not known."""

    @property
    def micro_batches(self) -> int:
        """Forward passes of one rank in one optimizer step (gradient accumulation), where the number is fixed."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def reducing_ranks(self) -> int:
        """Ranks with the same parameters: over them gradients are summed, and the distributed optimizer is spread."""
        return self.data_parallel * self.context_parallel

    @property
    def expert_reducing_ranks(self) -> int:
        """Ranks with the same part of the same experts."""
        return self.world_size // (self.pipeline_parallel * self.expert_parallel * self.expert_tensor_parallel)

    @property
    def sequence_multiple(self) -> int:
        """Padded sequence lengths must be a multiple of this."""
        return sequence_multiple(self.tensor_parallel, self.context_parallel, self.sequence_parallel)

    @property
    def micro_batch_multiple(self) -> int:
        """The micro-batches of a rank in a step must be a multiple of this: the interleaved schedule's rule."""
        return self.pipeline_parallel if self.virtual_pipeline > 1 else 1

    def layers_of(self, stage: int) -> tuple[range, ...]:
        """Return the layers of each model chunk of a pipeline stage, counted from 0 in the whole model."""
        return chunk_ranges(self.layers_per_stage)[stage :: self.pipeline_parallel]

    def describe_stages(self) -> str:
        """Return `9, 9, 8, 6 layers`, by stage. Where stages have several model chunks: `4+5, 4+4 layers`."""
        stages = range(self.pipeline_parallel)
        return ", ".join("+".join(str(len(chunk)) for chunk in self.layers_of(stage)) for stage in stages) + " layers"

    def describe(self) -> str:
        """Return `tp2 x pp2 x dp2 = 8 ranks`, naming only what is larger than 1."""
        sizes = {
            "tp": self.tensor_parallel,
            "pp": self.pipeline_parallel,
            "cp": self.context_parallel,
            "dp": self.data_parallel,
        }
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["dp1"]
        extras = " + sequence parallel" if self.sequence_parallel else ""
        extras += f" + expert parallel {self.expert_parallel}" if self.expert_parallel > 1 else ""
        if self.expert_tensor_parallel != self.tensor_parallel:
            extras += f" + expert tensor parallel {self.expert_tensor_parallel}"
        extras += f" + virtual pipeline {self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
        return f"{' x '.join(parts)} = {self.world_size} ranks{extras}"


def build_topology(spec: RunSpec, shape: ModelShape | None) -> Topology:
    """Check every rule and return the topology.

    `shape` is None where the model is not readable on this machine; its rules are then left to the ranks.
    Raise TopologyError with every rule that is broken.
    """
    problems = list(_size_problems(spec))
    if not problems:
        for rule in (_rank_problems, _batch_problems, _sequence_problems, _pipeline_problems, _expert_problems):
            problems += rule(spec)
        problems += _model_problems(spec, shape) if shape is not None else []
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
        expert_parallel=topo.expert_parallel,
        expert_tensor_parallel=expert_tensor_parallel(topo),
        layers_per_stage=layers_per_stage(spec, shape),
    )


def layers_per_stage(spec: RunSpec, shape: ModelShape | None) -> tuple[int, ...]:
    """Return the layers of each model chunk, as the run says or else balanced by cost. () for an unknown model."""
    if shape is None:
        return tuple(spec.topology.layers_per_stage)
    return tuple(spec.topology.layers_per_stage) or balanced_split(spec, shape)


def expert_tensor_parallel(topo: TopologySpec) -> int:
    """Return how many ranks share each expert's matrices."""
    return topo.tensor_parallel if topo.expert_tensor_parallel is None else topo.expert_tensor_parallel


def steps_vary(spec: RunSpec) -> bool:
    """Return whether the number of micro-batches in a step depends on its examples.

    Each rank then gets equally many, and some of them are empty.
    """
    return spec.data.packing or spec.train.global_batch_unit == "tokens"


def describe_batch(spec: RunSpec, topology: Topology) -> str:
    """Return what one optimizer step holds and how it is cut, in one line."""
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


def sequence_multiple(tensor: int, context: int, sequence_parallel: bool) -> int:
    """Return what the length of a row must be a multiple of: two slices for each rank of cp, each split over tp."""
    return (2 * context if context > 1 else 1) * (tensor if sequence_parallel else 1)


def _model_parallel(spec: RunSpec) -> int:
    """Return how many ranks hold one copy of the model."""
    topo = spec.topology
    return topo.tensor_parallel * topo.pipeline_parallel * topo.context_parallel


def _size_problems(spec: RunSpec) -> Iterator[str]:
    """Yield sizes out of their bounds, with which the arithmetic of the other rules would mean nothing."""
    problems = [
        *rule_problems(spec.resources, "resources."),
        *rule_problems(spec.topology, "topology."),
        *field_problems(spec.train, "micro_batch_size", "train."),
        *field_problems(spec.train, "global_batch_size", "train."),
        *field_problems(spec.data, "seq_length", "data."),
    ]
    yield from (f"{key}: {problem}" for key, problem in problems)


def _rank_problems(spec: RunSpec) -> Iterator[str]:
    """Yield where ranks do not go with GPUs, nodes, or each other."""
    topo, resources = spec.topology, spec.resources
    if 0 < resources.gpus_per_node != resources.ranks_per_node:
        yield (
            f"resources.tasks_per_node is {resources.ranks_per_node} on nodes with {resources.gpus_per_node} GPUs; "
            f"each rank drives one GPU, so leave tasks_per_node out or set it to {resources.gpus_per_node}"
        )
    if resources.ranks_per_node % topo.tensor_parallel:
        yield (
            f"topology.tensor_parallel {topo.tensor_parallel} does not divide the {resources.ranks_per_node} ranks of "
            "a node, and tensor parallel must not cross nodes; "
            f"valid here: {shown_numbers(divisors(resources.ranks_per_node))}"
        )
    world, model_parallel = resources.world_size, _model_parallel(spec)
    if world % model_parallel:
        yield (
            f"{world} ranks ({resources.nodes} nodes x {resources.ranks_per_node}) do not divide by "
            f"tensor_parallel {topo.tensor_parallel} x pipeline_parallel {topo.pipeline_parallel} x context_parallel "
            f"{topo.context_parallel} = {model_parallel}; nearest valid numbers of ranks: "
            f"{shown_numbers(nearest_multiples(world, model_parallel))}"
        )


def _batch_problems(spec: RunSpec) -> Iterator[str]:
    """Yield a global batch that the data parallel ranks cannot share equally, where each step has to be shared so."""
    world, train = spec.resources.world_size, spec.train
    if world % _model_parallel(spec) or steps_vary(spec):
        return
    data_parallel = world // _model_parallel(spec)
    step = train.micro_batch_size * data_parallel
    if train.global_batch_size % step:
        yield (
            f"train.global_batch_size {train.global_batch_size} does not divide by micro_batch_size "
            f"{train.micro_batch_size} x data_parallel {data_parallel} = {step}; "
            f"nearest valid: {shown_numbers(nearest_multiples(train.global_batch_size, step))}"
        )


def _sequence_problems(spec: RunSpec) -> Iterator[str]:
    """Yield rows that cannot be cut over the ranks."""
    topo, length = spec.topology, spec.data.seq_length
    if topo.sequence_parallel and topo.tensor_parallel == 1:
        yield "topology.sequence_parallel needs tensor_parallel > 1; set it to false"
    multiple = sequence_multiple(topo.tensor_parallel, topo.context_parallel, topo.sequence_parallel)
    if length % multiple:
        yield (
            f"data.seq_length {length} does not divide by {multiple} (tensor_parallel with sequence_parallel, "
            f"2 x context_parallel); nearest valid: {shown_numbers(nearest_multiples(length, multiple))}"
        )


def _pipeline_problems(spec: RunSpec) -> Iterator[str]:
    """Yield numbers of layers for other stages than there are, and what the interleaved schedule lacks."""
    topo, train = spec.topology, spec.train
    if topo.layers_per_stage and len(topo.layers_per_stage) != topo.pipeline_parallel * topo.virtual_pipeline:
        yield (
            f"topology.layers_per_stage has {len(topo.layers_per_stage)} numbers; it needs one for each model chunk: "
            f"{_chunk_words(topo)}"
        )
    if topo.virtual_pipeline == 1:
        return
    if topo.pipeline_parallel == 1:
        yield f"topology.virtual_pipeline {topo.virtual_pipeline} needs pipeline_parallel > 1; set it to 1"
        return
    if spec.resources.world_size % _model_parallel(spec) or steps_vary(spec):
        return
    data_parallel = spec.resources.world_size // _model_parallel(spec)
    micro_batches = train.global_batch_size // (train.micro_batch_size * data_parallel)
    if micro_batches == 0 or micro_batches % topo.pipeline_parallel:
        step = train.micro_batch_size * data_parallel * topo.pipeline_parallel
        yield (
            f"topology.virtual_pipeline {topo.virtual_pipeline} needs the micro-batches of a step to be a multiple of "
            f"pipeline_parallel {topo.pipeline_parallel}, and there are {micro_batches} "
            f"(global_batch_size {train.global_batch_size} / (micro_batch_size {train.micro_batch_size} "
            f"x data_parallel {data_parallel})); "
            f"nearest valid global_batch_size: {shown_numbers(nearest_multiples(train.global_batch_size, step))}"
        )


def _expert_problems(spec: RunSpec) -> Iterator[str]:
    """Yield where the ranks of a pipeline stage cannot be cut into those that share experts."""
    topo, tensor = spec.topology, expert_tensor_parallel(spec.topology)
    if topo.tensor_parallel % tensor:
        yield (
            f"topology.expert_tensor_parallel {tensor} does not divide tensor_parallel {topo.tensor_parallel}; "
            f"valid here: {shown_numbers(divisors(topo.tensor_parallel))}"
        )
        return
    if tensor < topo.tensor_parallel and not topo.sequence_parallel:
        yield (
            f"topology.expert_tensor_parallel {tensor} is less than tensor_parallel {topo.tensor_parallel}, whose "
            "ranks then send different tokens to experts; set topology.sequence_parallel to true"
        )
    world = spec.resources.world_size
    if world % _model_parallel(spec):
        return  # said by another rule
    stage = world // topo.pipeline_parallel
    if stage % (topo.expert_parallel * tensor):
        yield (
            f"topology.expert_parallel {topo.expert_parallel} x expert_tensor_parallel {tensor} = "
            f"{topo.expert_parallel * tensor} does not divide the {stage} ranks of a pipeline stage ({world} / "
            f"pipeline_parallel {topo.pipeline_parallel}); valid expert_parallel here: "
            f"{shown_numbers(divisors(stage // tensor))}"
        )


def _model_problems(spec: RunSpec, shape: ModelShape) -> Iterator[str]:
    """Yield sizes of the model that the topology cannot cut."""
    yield from _head_problems(shape, spec.topology.tensor_parallel)
    yield from _linear_head_problems(shape, spec.topology)
    yield from _layer_problems(shape, spec.topology)
    yield from _feed_forward_problems(shape, spec.topology.tensor_parallel)
    yield from _expert_count_problems(spec, shape)
    if spec.train.precision == "fp8":
        yield from _fp8_problems(shape, spec.topology.tensor_parallel)
        yield from _fp8_layer_problems(shape, spec.train.fp8)
        yield from _fp8_expert_problems(shape, spec.train.fp8, spec.topology)
    if spec.train.recompute == "norms" and not shape.norms_first:
        yield (
            f"train.recompute norms: {shape.model_type} has no norms before attention and MLP, so nothing would be "
            "computed again; set it to none, selective or full"
        )
    yield from _recompute_problems(spec, shape)
    because = layout_without_graphs(spec.topology, spec.train.precision, spec.train.recompute, shape)
    if spec.train.cuda_graphs == "always" and because is not None:
        yield f"train.cuda_graphs {no_graphs(because)}"
    if spec.data.seq_length > shape.max_position_embeddings:
        yield (
            f"data.seq_length {spec.data.seq_length} is longer than the model's "
            f"{shape.max_position_embeddings} positions; shorten it to at most that"
        )


def _recompute_problems(spec: RunSpec, shape: ModelShape) -> Iterator[str]:
    """Yield a number of recomputed layers that is more than any model chunk has."""
    given, topo = spec.train.recompute_layers, spec.topology
    if given is None or topo.pipeline_parallel * topo.virtual_pipeline > shape.num_layers:
        return
    most = max(layers_per_stage(spec, shape))
    if given > most:
        part = "model chunk" if topo.virtual_pipeline > 1 else "pipeline stage"
        yield (
            f"train.recompute_layers {given}: no {part} has more than {most} layers; give at most that, or leave it "
            "out to compute all of them again"
        )


def _head_problems(shape: ModelShape, tensor: int) -> Iterator[str]:
    if _heads_fit(shape, tensor):
        return
    valid = [size for size in divisors(shape.num_attention_heads) if _heads_fit(shape, size)]
    groups = next((groups for groups in _kv_heads(shape) if not _groups_fit(groups, tensor)), shape.num_query_groups)
    what = (
        f"{shape.num_attention_heads} attention heads do not divide by tensor_parallel {tensor}"
        if shape.num_attention_heads % tensor
        else f"{groups} KV heads are neither a multiple nor a divisor of tensor_parallel {tensor}"
    )
    yield f"{what}; valid here: {shown_numbers(valid)}"


def _linear_head_problems(shape: ModelShape, topo: TopologySpec) -> Iterator[str]:
    """Yield linear attention whose key heads tensor and context parallel ranks cannot share."""
    if shape.linear is None:
        return
    heads, tensor, context = shape.linear.key_heads, topo.tensor_parallel, topo.context_parallel
    if heads % tensor:
        yield (
            f"{heads} key heads of linear attention do not divide by tensor_parallel {tensor}; "
            f"valid here: {shown_numbers(divisors(heads))}"
        )
    elif heads % (tensor * context):
        yield (
            f"{heads} key heads of linear attention do not divide by tensor_parallel {tensor} x context_parallel "
            f"{context} = {tensor * context}; valid context_parallel here: {shown_numbers(divisors(heads // tensor))}"
        )


def _layer_problems(shape: ModelShape, topo: TopologySpec) -> Iterator[str]:
    """Yield more model chunks than layers, and numbers of layers that are not those of the model."""
    layers, chunks = shape.num_layers, topo.pipeline_parallel * topo.virtual_pipeline
    if layers < chunks:
        yield (
            f"{layers} layers are fewer than the model chunks of {_chunk_words(topo)}, and each needs one: a stage "
            f"with nothing but an embedding or output layer is not supported; at most {layers} chunks here"
        )
    elif topo.layers_per_stage and sum(topo.layers_per_stage) != layers:
        yield (
            f"topology.layers_per_stage: {' + '.join(map(str, topo.layers_per_stage))} = {sum(topo.layers_per_stage)} "
            f"layers, and the model has {layers}; leave it out to have them balanced by cost"
        )


def _chunk_words(topo: TopologySpec) -> str:
    """Return `pipeline_parallel 4 x virtual_pipeline 2 = 8`, or `pipeline_parallel 4`."""
    stages, virtual = topo.pipeline_parallel, topo.virtual_pipeline
    product = f" x virtual_pipeline {virtual} = {stages * virtual}" if virtual > 1 else ""
    return f"pipeline_parallel {stages}{product}"


def _feed_forward_problems(shape: ModelShape, tensor: int) -> Iterator[str]:
    """Yield dense MLPs, and shared experts, whose width the tensor parallel ranks cannot share."""
    sizes = {"width of the shared expert,": shape.shared_expert_size}
    if not shape.num_experts or shape.dense_layers:
        sizes["feed-forward size"] = shape.ffn_hidden_size
    for what, size in sizes.items():
        if size % tensor:
            yield (
                f"{what} {size} does not divide by tensor_parallel {tensor}; "
                f"valid here: {shown_numbers(divisors(size))}"
            )


def _expert_count_problems(spec: RunSpec, shape: ModelShape) -> Iterator[str]:
    """Yield experts that the ranks cannot share, by number or by width."""
    topo, width = spec.topology, shape.expert_ffn_hidden_size
    if not shape.num_experts:
        if topo.expert_parallel > 1 or topo.expert_tensor_parallel is not None:
            yield (
                "topology.expert_parallel and expert_tensor_parallel are for models with experts, and this "
                f"{shape.model_type} model has none; leave them out"
            )
        return
    if shape.num_experts % topo.expert_parallel:
        yield (
            f"{shape.num_experts} experts do not divide by topology.expert_parallel {topo.expert_parallel}; "
            f"valid here: {shown_numbers(divisors(shape.num_experts))}"
        )
    tensor = expert_tensor_parallel(topo)
    if width % tensor:
        key = "tensor_parallel" if topo.expert_tensor_parallel is None else "topology.expert_tensor_parallel"
        valid = shown_numbers(divisors(width))
        yield f"width of an expert, {width}, does not divide by {key} {tensor}; valid here: {valid}"


def _fp8_problems(shape: ModelShape, tensor: int) -> Iterator[str]:
    """Yield weights with a side that is no multiple of 16 on each rank, which fp8 products do not take."""
    if shape.latent is not None:
        yield (
            f"train.precision fp8: a {shape.model_type} model's latent attention has no products in fp8 here; set "
            "train.precision to bf16"
        )
        return
    sizes = [("hidden size", shape.hidden_size), ("feed-forward size", shape.ffn_hidden_size / tensor)]
    for kind in shape.head_kinds:
        groups = (2 - kind.keyed_values) * max(kind.num_query_groups, tensor)
        heads = (1 + kind.output_gate) * kind.num_attention_heads + groups
        sizes.append(("query heads", kind.num_attention_heads * kind.head_dim / tensor))
        sizes.append(("heads of Q, K and V", heads * kind.head_dim / tensor))
    if shape.linear is not None:
        sizes.append(("what linear attention projects", shape.linear.projected / tensor))
        sizes.append(("values of linear attention", shape.linear.values / tensor))
    for what, size in sizes:
        if size % 16:
            yield (
                f"train.precision fp8 needs multiples of 16, and {what} on a rank of tensor_parallel {tensor} is "
                f"{size:g}; set train.precision to bf16, or another tensor_parallel"
            )


def _fp8_layer_problems(shape: ModelShape, fp8: Fp8Spec) -> Iterator[str]:
    """Yield that so many layers are to compute in bf16 that none is left."""
    in_bf16 = fp8.bf16_first_layers + fp8.bf16_last_layers
    if in_bf16 >= shape.num_layers:
        yield (
            f"train.fp8.bf16_first_layers {fp8.bf16_first_layers} + bf16_last_layers {fp8.bf16_last_layers} = "
            f"{in_bf16} leave none of the {shape.num_layers} layers in fp8; set train.precision to bf16, or fewer"
        )


def _fp8_expert_problems(shape: ModelShape, fp8: Fp8Spec, topo: TopologySpec) -> Iterator[str]:
    """Yield why products of experts cannot be in fp8, where that is asked for."""
    if not fp8.experts:
        return
    if not shape.num_experts:
        yield f"train.fp8.experts: a {shape.model_type} model has no experts; drop it"
    elif (width := shape.expert_ffn_hidden_size / expert_tensor_parallel(topo)) % 16:
        yield (
            f"train.fp8.experts needs multiples of 16, and an expert's width on a rank is {width:g}; set it to false, "
            "or another topology.expert_tensor_parallel"
        )


def _heads_fit(shape: ModelShape, tensor: int) -> bool:
    return shape.num_attention_heads % tensor == 0 and all(_groups_fit(groups, tensor) for groups in _kv_heads(shape))


def _groups_fit(groups: int, tensor: int) -> bool:
    return groups % tensor == 0 or tensor % groups == 0


def _kv_heads(shape: ModelShape) -> list[int]:
    """Return the numbers of KV heads that layers have."""
    return [kind.num_query_groups for kind in shape.head_kinds]
