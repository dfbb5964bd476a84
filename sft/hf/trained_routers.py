"""Routers that are trained beside adapters (model.lora.router): whole matrices, which have no adapters.

A PEFT adapter holds them as `modules_to_save`: all tensors of a module, in place of the base model's. Those that were
not trained are among them.
"""

from __future__ import annotations

from launcher.contract.spec import LoraSpec
from sft.models.architecture import Architecture, Experts

_TRAINED = ("mlp.router.weight", "mlp.router.logit_bias")
_BIAS = "mlp.router.bias"
_MODULES = {".block_sparse_moe.": ".mlp.", ".mlp.moe_statics.": ".mlp.gate.moe_statics."}
"""Where transformers keeps routers and experts under another name than the files of their family do."""


def trained_routers(architecture: Architecture, lora: LoraSpec) -> dict[str, str]:
    """Return, by their names in the whole model, the parameters of routers that are trained, and their tensors."""
    if not lora.router:
        return {}
    return {
        f"decoder.layers.{index}.{name}": layer[name].pieces[0].name
        for index, layer in enumerate(architecture.weights.layers)
        for name in _TRAINED
        if name in layer
    }


def frozen_parts(architecture: Architecture, lora: LoraSpec) -> list[str]:
    """Return the tensors of the same modules that are not trained: the biases by which experts are chosen."""
    if not lora.router:
        return []
    modules = modules_to_save(architecture, lora) or ()
    biases = [layer[_BIAS].pieces[0].name for layer in architecture.weights.layers if _BIAS in layer]
    # MiniMax' are those of the whole block in transformers.
    return [bias for bias in biases if name_in_memory(architecture, bias).startswith(tuple(f"{m}." for m in modules))]


def name_in_memory(architecture: Architecture, tensor: str) -> str:
    """Return what transformers and PEFT call a router's tensor of the files."""
    return module_in_memory(architecture.weights.module(tensor))


def module_in_memory(name: str) -> str:
    """Return what transformers calls a module of the files."""
    for ours, theirs in _MODULES.items():
        name = name.replace(ours, theirs)
    return name


def modules_to_save(architecture: Architecture, lora: LoraSpec) -> list[str] | None:
    """Return the names by which PEFT finds the routers. Whole ones, since other modules may be called `gate`, too."""
    tensors = trained_routers(architecture, lora).values()
    return list(dict.fromkeys(name_in_memory(architecture, tensor).rpartition(".")[0] for tensor in tensors)) or None


def router_problems(lora: LoraSpec, architecture: Architecture) -> list[str]:
    """Return why routers cannot be trained in this model."""
    if lora.router and any(isinstance(layer.mlp, Experts) and layer.mlp.scaled_router for layer in architecture.layers):
        return [
            f"model.lora.router: routers of a {architecture.shape.model_type} model have further weights, which nobody "
            "would train; leave it out"
        ]
    if not lora.router or architecture.has_experts:
        return []
    return [f"model.lora.router: a {architecture.shape.model_type} model has no routers; leave it out"]
