"""The sizes of LoRA's adapters, from those of the model and the names of the adapted layers.

Plans and MFU need no architecture for them; a test compares them with the adapters of every family.
"""

from __future__ import annotations

from collections.abc import Iterable

from launcher.contract.linears import Linear, Place, expert_linears, layer_linears
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import LoraSpec


def layer_adapters(shape: ModelShape, lora: LoraSpec, *, dense: bool = False, linear: bool = False) -> int:
    """Return the number of trained parameters of a decoder layer outside its experts.

    These are the adapters of attention and of the MLP or shared expert, and the router where it is trained. `dense`
    is for a layer without experts in a model that has some, `linear` for a layer with linear attention.
    """
    routed = bool(shape.num_experts) and not dense
    router = shape.num_experts * shape.hidden_size if routed and lora.router else 0
    return _parameters(layer_linears(shape, dense=dense, linear=linear), lora) + router


def expert_adapters(shape: ModelShape, lora: LoraSpec) -> int:
    """Return the number of trained parameters of one expert."""
    return _parameters(expert_linears(shape), LoraSpec(rank=lora.rank, targets=lora.targets))


def adapted_places(shape: ModelShape, lora: LoraSpec, *, dense: bool = False, linear: bool = False) -> frozenset[Place]:
    """Return the places of a layer, outside its experts, whose linears have adapters."""
    linears = layer_linears(shape, dense=dense, linear=linear)
    return frozenset(each.place for each in linears if not lora.names or each.name in lora.names)


def active_adapters(shape: ModelShape, lora: LoraSpec) -> int:
    """Return the number of trained parameters of all layers that one token uses: of experts, those that it goes to."""
    dense, linear = len(shape.dense_layers), len(shape.linear_layers)
    more = linear * (layer_adapters(shape, lora, linear=True) - layer_adapters(shape, lora)) if linear else 0
    if shape.wide_heads is not None:
        wide = layer_adapters(shape.for_layers(windowed=False), lora) - layer_adapters(shape, lora)
        more += (shape.num_layers - len(shape.windowed_layers)) * wide
    usual = layer_adapters(shape, lora) + shape.experts_per_token * expert_adapters(shape, lora)
    return (shape.num_layers - dense) * usual + dense * layer_adapters(shape, lora, dense=True) + more


def _parameters(linears: Iterable[Linear], lora: LoraSpec) -> int:
    """Return the number of parameters of these linears' adapters: A, B and, with DoRA, a length for each row."""
    assert lora.rank is not None
    return sum(
        lora.rank * (each.inputs + each.outputs) + (each.outputs if lora.dora else 0)
        for each in linears
        if not lora.names or each.name in lora.names
    )
