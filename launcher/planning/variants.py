"""The configs that differ from a run's in parallel sizes and micro-batch size alone: what a search tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from launcher.contract.adapters import expert_adapters
from launcher.contract.cost_model.assumptions import rows_of
from launcher.contract.cost_model.predict import Candidate
from launcher.contract.cost_model.workload import Recompute
from launcher.contract.divisors import divisors
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec
from launcher.contract.topology import expert_tensor_parallel, sequence_multiple

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Parallel sizes that are worth a check, and the rows of a micro-batch."""

    tensor: int
    pipeline: int
    virtual: int
    micro: int
    experts: int
    expert_tensor: int

    def describe(self) -> str:
        """Return `tp2 pp4`."""
        return f"tp{self.tensor} pp{self.pipeline}"


def sizes_to_try(spec: RunSpec, shape: ModelShape, kept: Collection[str]) -> Iterator[Sizes]:
    """Yield the sizes that are worth a check. Those of the config's keys in `kept` are as the config has them."""
    ranks, world = spec.resources.ranks_per_node, spec.resources.world_size
    for tensor in divisors(ranks):
        for pipeline in divisors(world // tensor):
            if pipeline > shape.num_layers:
                break
            micro_batches = _micro_batch_sizes(spec, world // (tensor * pipeline), kept)
            for virtual in _virtual_sizes(shape.num_layers, pipeline):
                for micro in micro_batches:
                    for experts, expert_tensor in _expert_sizes(spec, shape, tensor, world // pipeline, kept):
                        yield Sizes(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual=virtual,
                            micro=micro,
                            experts=experts,
                            expert_tensor=expert_tensor,
                        )


def variant(spec: RunSpec, sizes: Sizes, kept: Collection[str]) -> RunSpec:
    """Return the run with these sizes."""
    tensor, given = sizes.tensor, spec.topology
    same_stages = (sizes.pipeline, sizes.virtual) == (given.pipeline_parallel, given.virtual_pipeline)
    # It saves memory and costs nothing wherever rows divide by it.
    shares_sequence = tensor > 1 and not spec.data.seq_length % sequence_multiple(tensor, given.context_parallel, True)
    own_tensor = None if sizes.expert_tensor == tensor else sizes.expert_tensor
    topology = dataclasses.replace(
        given,
        layers_per_stage=given.layers_per_stage if same_stages else [],
        tensor_parallel=tensor,
        pipeline_parallel=sizes.pipeline,
        virtual_pipeline=sizes.virtual,
        expert_parallel=sizes.experts,
        expert_tensor_parallel=given.expert_tensor_parallel
        if "topology.expert_tensor_parallel" in kept
        else own_tensor,
        sequence_parallel=given.sequence_parallel if "topology.sequence_parallel" in kept else shares_sequence,
    )
    train = dataclasses.replace(spec.train, micro_batch_size=sizes.micro)
    return dataclasses.replace(spec, topology=topology, train=train)


def with_layout(spec: RunSpec, candidate: Candidate) -> RunSpec:
    """Return the run with this layout."""
    topology = candidate.layout.topology
    sizes = Sizes(
        tensor=topology.tensor_parallel,
        pipeline=topology.pipeline_parallel,
        virtual=topology.virtual_pipeline,
        micro=topology.micro_batch_size,
        experts=topology.expert_parallel,
        expert_tensor=topology.expert_tensor_parallel,
    )
    found = with_recompute(variant(spec, sizes, ()), candidate.layout.recompute, candidate.layout.recompute_layers)
    shared = dataclasses.replace(found.topology, sequence_parallel=topology.sequence_parallel)
    return dataclasses.replace(found, topology=shared)


def with_recompute(spec: RunSpec, recompute: Recompute, layers: int | None = None) -> RunSpec:
    """Return the run with this recomputation."""
    train = dataclasses.replace(spec.train, recompute=recompute, recompute_layers=layers)
    return dataclasses.replace(spec, train=train)


def _micro_batch_sizes(spec: RunSpec, ranks: int, kept: Collection[str]) -> list[int]:
    """Return the rows of a micro-batch: as the config says, or up to those that a rank has in a step at most.

    `ranks` are those that share the data, or its rows.
    """
    if "train.micro_batch_size" in kept:
        return [spec.train.micro_batch_size]
    own = -(-rows_of(spec) * spec.topology.context_parallel // ranks)
    return [size for size in MICRO_BATCH_SIZES if size == 1 or size <= own]


def _virtual_sizes(layers: int, pipeline: int) -> list[int]:
    """Return the numbers of model chunks a stage: of those with chunks of at most n layers the least, for each n."""
    if pipeline == 1:
        return [1]
    most = layers // pipeline
    return sorted({min(-(-layers // (pipeline * size)), most) for size in range(1, -(-layers // pipeline) + 1)})


def _expert_sizes(
    spec: RunSpec, shape: ModelShape, tensor: int, stage_ranks: int, kept: Collection[str]
) -> Iterator[tuple[int, int]]:
    """Yield expert parallel and expert tensor parallel sizes: experts whole on their ranks, or cut as all else is."""
    if not shape.num_experts:
        yield spec.topology.expert_parallel if "topology.expert_parallel" in kept else 1, tensor
        return
    given = expert_tensor_parallel(dataclasses.replace(spec.topology, tensor_parallel=tensor))
    # Adapters need whole experts on a rank.
    whole = spec.model.lora.rank is not None and expert_adapters(shape, spec.model.lora) > 0
    tried = {1} if whole else {1, tensor}
    for expert_tensor in (given,) if "topology.expert_tensor_parallel" in kept else sorted(tried):
        if "topology.expert_parallel" in kept:
            yield spec.topology.expert_parallel, expert_tensor
            continue
        for experts in divisors(max(1, stage_ranks // expert_tensor)):
            if shape.num_experts % experts == 0:
                yield experts, expert_tensor
