"""Mixtures of experts in a model's config.json: their sizes, and which layers have none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from launcher.contract.model_types import DenseBy


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


def read_dense_layers(config: Mapping[str, Any], by: DenseBy) -> tuple[int, ...]:
    """Return the layers of a mixture of experts that have none, by the key that says so."""
    layers = range(config["num_hidden_layers"])
    stated = config.get(by) if by else None
    if by == "mlp_layer_types":
        kinds = stated if isinstance(stated, list) else ["dense"] + ["sparse"] * (len(layers) - 1)
        return tuple(layer for layer, kind in zip(layers, kinds, strict=False) if kind != "sparse")
    if by == "first_k_dense_replace":
        return tuple(layers[: max(0, stated) if isinstance(stated, int) else 0])
    if by == "mlp_only_layers":
        step = config.get("decoder_sparse_step")
        step = step if isinstance(step, int) and step > 0 else 1
        return tuple(layer for layer in layers if layer in (stated or ()) or (layer + 1) % step)
    return ()
