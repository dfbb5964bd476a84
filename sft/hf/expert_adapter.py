"""Low-rank adapters of experts by Hugging Face names: each matrix of each expert has one of its own.

Files name them by expert (`experts.3.gate_proj`), which engines read and PEFT takes for models whose experts
transformers keeps in one tensor. A checkpoint holds those of all experts one below the other, so that it does not
depend on which rank has which expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.contract.spec import LoraSpec
from sft.hf.adapter import MARK, AdapterTensors, CheckpointTensors, initial_a
from sft.hf.trained_routers import module_in_memory
from sft.models.architecture import Architecture, Experts
from sft.models.weight_map import ParameterMap, checkpoint_key

if TYPE_CHECKING:  # settings are checked without torch
    import torch

_WEIGHT = ".weight"
_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<name>\w+)")
_GATE, _DOWN = ("gate_proj", "w1"), ("down_proj", "w2")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertTarget:
    """One matrix of every expert of a layer."""

    name: str
    """gate_proj and the like."""
    modules: tuple[str, ...]
    """The whole Hugging Face name of each expert's layer."""
    layer: int
    linear: str
    """The Megatron-core linear that holds the experts' rows, within the layer."""
    rows: int
    columns: int
    stacked: bool
    """Whether checkpoints stack the layers of this model (`WeightMap.stacked`)."""

    def parameter(self, which: str) -> str:
        """Return the name of the parameter `lora_A` or `lora_B` in the whole model."""
        return f"decoder.layers.{self.layer}.{self.linear}{MARK}{self.name}.{which}"

    def checkpoint_key(self, which: str) -> tuple[str, int | None]:
        """Return the key of that parameter in a sharded checkpoint, and its index there."""
        return checkpoint_key(self.parameter(which), stacked=self.stacked)

    def draw_a(self, expert: int, rank: int, seed: int) -> torch.Tensor:
        """Return the initial A of one expert."""
        return initial_a(self.modules[expert], rank, self.columns, seed)

    def read(self, source: CheckpointTensors) -> Iterator[tuple[str, AdapterTensors]]:
        """Yield each expert's layer with its adapter of a sharded checkpoint."""
        halves = (source.tensor(*self.checkpoint_key(which)) for which in ("lora_A", "lora_B"))
        by_expert = (half.chunk(len(self.modules)) for half in halves)
        for module, a, b in zip(self.modules, *by_expert, strict=True):
            yield module, AdapterTensors(a, b)


def expert_targets(architecture: Architecture, lora: LoraSpec, layer: int) -> list[ExpertTarget]:
    """Return the adapters of one layer's experts, in the order of the files. A dense layer has none."""
    if not isinstance(architecture.layers[layer].mlp, Experts):
        return []
    return [
        target
        for parameter, parameter_map in architecture.weights.layers[layer].items()
        if parameter_map.experts and parameter_map.pieces[0].expert is None  # a tensor for each matrix of each expert
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
    if place["name"] in _DOWN:
        down: torch.Tensor = experts.get_parameter("down_proj")[int(place["expert"])]
        return down
    gate, up = experts.get_parameter("gate_up_proj")[int(place["expert"])].chunk(2)
    return gate if place["name"] in _GATE else up


def _targets_of(
    linear: str, parameter_map: ParameterMap, layer: int, architecture: Architecture
) -> Iterator[ExpertTarget]:
    """Yield the matrices that each expert has in one linear: gate and up projection, or the down projection."""
    each = len(parameter_map.blocks) // parameter_map.experts
    assert parameter_map.columns is not None
    for first in range(each):
        blocks = parameter_map.blocks[first::each]
        modules = tuple(block[0].name.removesuffix(_WEIGHT) for block in blocks)
        yield ExpertTarget(
            name=modules[0].rpartition(".")[2],
            modules=modules,
            layer=layer,
            linear=linear,
            rows=blocks[0][0].rows,
            columns=parameter_map.columns,
            stacked=architecture.weights.stacked,
        )


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
    pair = [target.name for target in expert_targets(architecture, LoraSpec(rank=1), targets[0].layer)][:2]
    if len(set(pair) & set(names)) == 1:
        problems.append(
            f"model.lora.targets: {pair[0]} and {pair[1]} of experts are one matrix in transformers; name both or none"
        )
    return problems
