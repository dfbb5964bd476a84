"""Low-rank adapters of experts by Hugging Face names: each matrix of each expert has one of its own.

Files name them by expert (`experts.3.gate_proj`), which engines read and PEFT takes for models whose experts
transformers keeps in one tensor. Where the model's own files hold all experts in one tensor, gate and up projection
are one matrix of it with one adapter, and an adapter's files hold those of all experts (sft.hf.joined_experts).
A checkpoint holds those of all experts one below the other, so that it does not depend on which rank has which expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.contract.model_types import MIXTRAL_NAMES, MLP_NAMES
from launcher.contract.spec import LoraSpec
from sft.hf.adapter import MARK, AdapterTensors, CheckpointTensors, initial_a
from sft.hf.joined_experts import JOINED
from sft.hf.trained_routers import module_in_memory
from sft.models.architecture import Architecture, Experts
from sft.models.weight_map import ParameterMap, Piece, checkpoint_key

if TYPE_CHECKING:  # settings are checked without torch
    import torch

_WEIGHT = ".weight"
_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<name>\w+)")
_GATES, _UPS, _DOWNS = zip(MLP_NAMES, MIXTRAL_NAMES, strict=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertTarget:
    """One matrix of every expert of a layer."""

    name: str
    """What model.lora.targets calls it: gate_proj and the like, or experts.gate_up_proj, a tensor of all experts."""
    modules: tuple[str, ...]
    """The whole Hugging Face name of each expert's layer. In a tensor of all experts they have none: what it would
    be."""
    layer: int
    linear: str
    """The Megatron-core linear that holds the experts' rows, within the layer."""
    order: tuple[int, ...]
    """For each row of an expert's matrix there its row in the files."""
    columns: int
    tensor: str | None
    """The tensor of the files that holds the matrices of all experts; None where each has a tensor of its own."""
    transposed: bool
    """Whether that tensor holds matrices [input, output]."""
    stacked: bool
    """Whether checkpoints stack the layers of this model (`WeightMap.stacked`)."""

    @property
    def rows(self) -> int:
        """The number of rows of an expert's matrix."""
        return len(self.order)

    @property
    def key(self) -> str:
        """Its name among the adapters of its linear."""
        return self.name.rpartition(".")[2]

    @property
    def adapted(self) -> tuple[str, ...]:
        """The Hugging Face names of what has the adapters: each expert's layer, or the tensor of all experts."""
        return self.modules if self.tensor is None else (self.tensor,)

    @property
    def tensor_in_memory(self) -> str:
        """The tensor in which transformers keeps this matrix of every expert, gate and up projection being one."""
        block, _, _ = self.modules[0].rpartition(".experts.")
        return f"{block}.experts.{'down_proj' if self.key in _DOWNS else 'gate_up_proj'}"

    def parameter(self, which: str) -> str:
        """Return the name of the parameter `lora_A` or `lora_B` in the whole model."""
        return f"decoder.layers.{self.layer}.{self.linear}{MARK}{self.key}.{which}"

    def checkpoint_key(self, which: str) -> tuple[str, int | None]:
        """Return the key of that parameter in a sharded checkpoint, and its index there."""
        return checkpoint_key(self.parameter(which), stacked=self.stacked)

    def draw_a(self, expert: int, rank: int, seed: int) -> torch.Tensor:
        """Return the initial A of one expert."""
        return initial_a(self.modules[expert], rank, self.columns, seed)

    def read(self, source: CheckpointTensors) -> Iterator[tuple[str, AdapterTensors]]:
        """Yield each expert's layer with its adapter of a sharded checkpoint, rows in the order of the files."""
        import torch

        halves = (source.tensor(*self.checkpoint_key(which)) for which in ("lora_A", "lora_B"))
        by_expert = (half.chunk(len(self.modules)) for half in halves)
        places = torch.tensor(self.order)
        for module, a, b in zip(self.modules, *by_expert, strict=True):
            yield module, AdapterTensors(a, torch.empty_like(b).index_copy_(0, places, b))


def expert_targets(architecture: Architecture, lora: LoraSpec, layer: int) -> list[ExpertTarget]:
    """Return the adapters of one layer's experts, in the order of the files. A dense layer has none."""
    if not isinstance(architecture.layers[layer].mlp, Experts):
        return []
    return [
        target
        for parameter, parameter_map in architecture.weights.layers[layer].items()
        if parameter_map.experts and parameter_map.columns is not None
        for target in _targets_of(parameter.removesuffix(_WEIGHT), parameter_map, layer, architecture)
        if not lora.names or target.name in lora.names
    ]


def expert_target_names(architecture: Architecture, lora: LoraSpec) -> list[str]:
    """Return the names of the layers of experts that have adapters, each once, in the order of the files."""
    return list(dict.fromkeys(target.name for target in all_expert_targets(architecture, lora)))


def all_expert_targets(architecture: Architecture, lora: LoraSpec) -> list[ExpertTarget]:
    """Return the adapters of all experts of the model."""
    layers = range(architecture.shape.num_layers)
    return [target for layer in layers for target in expert_targets(architecture, lora, layer)]


def weight_in_memory(model: torch.nn.Module, module: str) -> torch.Tensor:
    """Return the weight of a layer of the files in transformers' model, which keeps all experts in two tensors."""
    place = _EXPERT.fullmatch(module)
    if place is None:
        return model.get_parameter(f"{module}{_WEIGHT}")
    experts = model.get_submodule(module_in_memory(f"{place['block']}.experts"))
    if place["name"] in _DOWNS:
        down: torch.Tensor = experts.get_parameter("down_proj")[int(place["expert"])]
        return down
    gate, up = experts.get_parameter("gate_up_proj")[int(place["expert"])].chunk(2)
    return gate if place["name"] in _GATES else up


def _targets_of(
    linear: str, parameter_map: ParameterMap, layer: int, architecture: Architecture
) -> Iterator[ExpertTarget]:
    """Yield the matrices that each expert has in one linear: gate and up projection, one of both, or the down one."""
    assert parameter_map.columns is not None
    tensor = parameter_map.pieces[0].name if parameter_map.pieces[0].expert is not None else None
    blocks = len(parameter_map.blocks) // parameter_map.experts
    together = 1 if tensor is None else blocks
    for first in range(0, blocks, together):
        by_expert = [
            [piece for block in parameter_map.blocks[begin : begin + together] for piece in block]
            for begin in range(first, len(parameter_map.blocks), blocks)
        ]
        modules = tuple(_module_of(pieces[0]) for pieces in by_expert)
        own = modules[0].rpartition(".")[2]
        yield ExpertTarget(
            name=own if tensor is None else f"{JOINED}{own}",
            modules=modules,
            layer=layer,
            linear=linear,
            order=tuple(row for piece in by_expert[0] for row in range(piece.start, piece.stop, piece.step)),
            columns=parameter_map.columns,
            tensor=tensor,
            transposed=parameter_map.transposed,
            stacked=architecture.weights.stacked,
        )


def _module_of(piece: Piece) -> str:
    """Return the name of an expert's layer, also where it is a part of a tensor."""
    if piece.expert is None:
        return piece.name.removesuffix(_WEIGHT)
    experts, _, own = piece.name.rpartition(".")
    return f"{experts}.{piece.expert}.{own}"


def expert_lora_problems(lora: LoraSpec, architecture: Architecture, expert_tensor_parallel: int) -> list[str]:
    """Return what adapters of experts cannot do of these settings."""
    targets = all_expert_targets(architecture, lora)
    if lora.rank is None or not targets:
        return []
    names = expert_target_names(architecture, lora)
    shown = ", ".join(names)
    problems = []
    if expert_tensor_parallel > 1:
        problems.append(
            f"model.lora.targets: adapters of experts ({shown}) need whole experts on each rank, and "
            f"{expert_tensor_parallel} share one; set topology.expert_tensor_parallel to 1"
        )
    if lora.dora:
        problems.append(
            f"model.lora.dora: adapters of experts ({shown}) have no magnitudes, nor do they in PEFT; unset it"
        )
    if lora.dropout:
        problems.append(
            f"model.lora.dropout {lora.dropout:g}: adapters of experts ({shown}) take none, nor do they in PEFT; set "
            "it to 0"
        )
    every = expert_targets(architecture, LoraSpec(rank=1), targets[0].layer)
    pair = [target.name for target in every if target.linear == every[0].linear]
    if len(pair) == 2 and len(set(pair) & set(names)) == 1:
        problems.append(
            f"model.lora.targets: {pair[0]} and {pair[1]} of experts are one matrix in transformers; name both or none"
        )
    return problems
