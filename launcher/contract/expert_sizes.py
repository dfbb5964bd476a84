"""Mixtures of experts in a model's config.json: their sizes, and which layers have none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict


class ExpertSizes(TypedDict, total=False):
    """What a model's shape has of experts; nothing for a dense model."""

    num_experts: int
    experts_per_token: int
    expert_ffn_hidden_size: int
    shared_expert_size: int


def read_expert_sizes(config: Mapping[str, Any]) -> ExpertSizes:
    """Return the sizes of a mixture of experts, or nothing for a dense model."""
    count = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    chosen = config.get("num_experts_per_tok")
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    if not (isinstance(count, int) and isinstance(chosen, int) and isinstance(width, int)):
        return {}
    shared = config.get("shared_expert_intermediate_size") or width * (config.get("n_shared_experts") or 0)
    return {
        "num_experts": count,
        "experts_per_token": chosen,
        "expert_ffn_hidden_size": width,
        "shared_expert_size": shared,
    }


def read_dense_layers(config: Mapping[str, Any], *, by_kind: bool) -> tuple[int, ...]:
    """Return the layers of a mixture of experts that have none, by any of the keys that say so.

    With `by_kind` it is `mlp_layer_types` alone.
    """
    count = config["num_hidden_layers"]
    if by_kind:
        kinds = config.get("mlp_layer_types")
        kinds = kinds if isinstance(kinds, list) else ["dense"] + ["sparse"] * (count - 1)
        return tuple(layer for layer, kind in enumerate(kinds[:count]) if kind != "sparse")
    first = config.get("first_k_dense_replace")
    first = first if isinstance(first, int) else 0
    step = config.get("decoder_sparse_step")
    step = step if isinstance(step, int) and step > 0 else 1
    named = config.get("mlp_only_layers") or ()
    return tuple(layer for layer in range(count) if layer < first or layer in named or (layer + 1) % step)
