"""Parameters that learn at a multiple of the schedule's learning rate, as groups of Megatron-core's optimizer.

Megatron-core finds a group again in a checkpoint by its `lr_mult`. That is a number of ours here, so that a run may
resume with other rates; the rate itself is the group's `multiplier`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch.nn import Parameter

from sft.hf.learning_rates import Rate
from sft.megatron.core import (
    DistributedDataParallel,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    ParamWithNamePredicate,
    TransformerConfig,
    get_standard_config_overrides,
    get_transformer_layer_offset,
)
from sft.models.weight_map import canonical_name

Multipliers = Mapping[int, Rate]
"""id of a parameter -> its rate, where it has one of its own."""

_FIRST_GROUP = 2.0
"""Above 1, which Megatron-core has for parameters without one."""


def of_parameters(
    by_name: Mapping[str, Rate], model_chunks: Sequence[DistributedDataParallel], config: TransformerConfig
) -> Multipliers:
    """Return the rates of this rank's parameters, from those by the names of the whole model."""
    found = {}
    for chunk in model_chunks if by_name else ():
        offset = get_transformer_layer_offset(config, getattr(chunk.module, "vp_stage", None))
        for name, parameter in chunk.named_parameters():
            rate = by_name.get(canonical_name(name, offset))
            if rate is not None:
                found[id(parameter)] = rate
    return found


def overrides_of(config: OptimizerConfig, multipliers: Multipliers) -> dict[ParamKey, ParamGroupOverride]:
    """Return Megatron-core's own overrides, and one for each rate."""
    overrides: dict[ParamKey, ParamGroupOverride] = get_standard_config_overrides(config)
    for rate in set(multipliers.values()):
        chosen = ParamWithNamePredicate(name=f"rate {rate.group}", fn=partial(_has, multipliers, rate))
        own = {"lr_mult": _FIRST_GROUP + rate.group, "multiplier": rate.multiplier}
        overrides[ParamKey(with_name_predicate=chosen)] = own
    return overrides


def _has(multipliers: Multipliers, rate: Rate, parameter: Parameter, name: str) -> bool:
    return multipliers.get(id(parameter)) == rate
