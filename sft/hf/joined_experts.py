"""Adapters of tensors that hold all experts of a layer, in the form that PEFT has for them (`target_parameters`).

A is [experts * rank, input], an expert's rows below those of the one before it. In B, [output, rank * experts], the
expert is the index that changes fastest.

PEFT wraps the module that holds the tensors, once for each of them that is adapted. The wrapper of the last is in the
module's place and has its name; each earlier one is the `base_layer` of the one after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft.hf.adapter import AdapterTensors, merged_weight

if TYPE_CHECKING:  # settings are checked without torch
    import torch

JOINED = "experts."
"""What names of such tensors begin with in `model.lora.targets`. Without it those of shared experts are meant."""

_WRAPPED = ".base_layer"


def joined(by_expert: Sequence[AdapterTensors]) -> AdapterTensors:
    """Return the adapters of a tensor's experts as PEFT's files have them."""
    import torch

    return AdapterTensors(
        torch.cat([adapter.a for adapter in by_expert]),
        torch.stack([adapter.b for adapter in by_expert], dim=-1).flatten(1),
    )


def of_both(gate: AdapterTensors, up: AdapterTensors) -> AdapterTensors:
    """Return the adapter of twice the rank that does to one matrix, gate rows above up rows, what these do to two."""
    import torch

    blocks: torch.Tensor = torch.block_diag(gate.b, up.b)  # type: ignore[no-untyped-call]
    return AdapterTensors(torch.cat([gate.a, up.a]), blocks)


def separated(adapter: AdapterTensors, experts: int) -> list[AdapterTensors]:
    """Return the adapter of each expert: the reverse of `joined`."""
    b = adapter.b.view(len(adapter.b), -1, experts)
    return [AdapterTensors(a, b[..., expert]) for expert, a in enumerate(adapter.a.chunk(experts))]


def wrappers(tensors: Sequence[str]) -> dict[str, str]:
    """Return what PEFT calls the wrapper of each of a model's adapted tensors, which are in the model's order."""
    of_module: dict[str, list[str]] = {}
    for tensor in tensors:
        of_module.setdefault(tensor.rpartition(".")[0], []).append(tensor)
    return {
        tensor: f"{module}{_WRAPPED * (len(own) - 1 - place)}"
        for module, own in of_module.items()
        for place, tensor in enumerate(own)
    }


def merged_tensor(
    weights: torch.Tensor, by_expert: Sequence[AdapterTensors], scale: float, *, transposed: bool
) -> torch.Tensor:
    """Return the tensor of all experts with their adapters in it, in its own number type.

    `transposed` says that it holds matrices [input, output].
    """
    import torch

    merged = torch.empty_like(weights)
    for own, matrix, adapter in zip(merged, weights, by_expert, strict=True):  # in fp32 one at a time: they are large
        if transposed:
            own.copy_(merged_weight(matrix.T, adapter, scale).T)
        else:
            own.copy_(merged_weight(matrix, adapter, scale))
    return merged


def is_wrapper(module: str, parameters: Sequence[str]) -> bool:
    """Return whether a module of an adapter's files is a wrapper for a tensor of experts in its `target_parameters`."""
    owners = {parameter.rpartition(".")[0] for parameter in parameters}
    of_experts = tuple(f".{owner}" for owner in owners if owner.rpartition(".")[2] == "experts")
    return module.partition(_WRAPPED)[0].endswith(of_experts)


def add_joined(
    model: torch.nn.Module, wrapper: str, adapter: AdapterTensors, scale: float, parameters: Sequence[str]
) -> None:
    """Add the adapter of a wrapper to the tensor of a transformers model that it is for, one of `target_parameters`."""
    name = wrapper.partition(_WRAPPED)[0]
    module = model.get_submodule(name)
    adapted = {parameter.rpartition(".")[2] for parameter in parameters}
    own = [f"{name}.{tensor}" for tensor, _ in module.named_parameters(recurse=False) if tensor in adapted]
    tensors = {place: tensor for tensor, place in wrappers(own).items()}
    weights = model.get_parameter(tensors[wrapper])
    transposed = bool(getattr(module, "is_transposed", False))  # an attribute of gpt-oss' experts in transformers
    weights.copy_(merged_tensor(weights, separated(adapter, len(weights)), scale, transposed=transposed))
