"""Find the family of a Hugging Face directory and read its architecture."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launcher.contract.errors import ModelError
from launcher.contract.model_shape import read_model_shape
from launcher.contract.usual_keys import language_model_config
from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.multimodal import find_language_model, inside, with_nested_names
from sft.models.stored_names import with_stored_names

SUPPORTED = (
    "arcee",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt2",
    "gpt_oss",
    "granite",
    "hunyuan_v1_dense",
    "llama",
    "minimax_m2",
    "ministral3",
    "mistral",
    "mistral3",
    "mixtral",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "starcoder2",
)
"""The model types that are covered; each is a module of `sft.models.families`."""

_KNOWN_GAPS = {
    "deepseek_v32": "each token sees few of those before it, which a part of its attention chooses",
}
"""Families that look covered and are not, and what is missing."""

_NEVER_BUILT = (
    "add_cross_attention",
    "lm_head_bias",
    "scale_attn_by_inverse_layer_idx",
)
"""Settings that change every layer and that no family here builds."""

_ALWAYS_BUILT = ("is_causal", "scale_attn_weights")
"""Settings that are true where they are left out, and that every layer here follows."""

_OF_SINGLE_FAMILIES = (
    "attention_chunk_size",
    "attention_k_eq_v",
    "attn_logit_softcapping",
    "clip_qkv",
    "enable_moe_block",
    "final_logit_softcapping",
    "hidden_size_per_layer_input",
    "num_kv_shared_layers",
    "qk_layernorm",
    "per_layer_config",
    "router_jitter_noise",
    "use_bidirectional_attention",
    "use_double_wide_mlp",
    "use_qk_norm",
)
"""Settings that change numbers in the families that know them. Where the family does not ask for one, it is refused."""


@functools.cache
def family(model_type: str) -> Family:
    """Return a supported family."""
    found = importlib.import_module(f"sft.models.families.{model_type}").FAMILY
    assert isinstance(found, Family)
    return found


def read_architecture(model_dir: Path) -> Architecture:
    """Return the architecture in `model_dir`/config.json, or raise ModelError that lists what is not covered.

    The file is read with json: transformers fills in defaults without telling, takes seconds to import, and this runs
    on every rank.
    """
    shape = read_model_shape(model_dir)
    path = model_dir / "config.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    values = language_model_config(whole)
    model_type = shape.model_type if values is whole else str(whole.get("model_type"))
    if model_type not in SUPPORTED:
        gap = _KNOWN_GAPS.get(model_type)
        raise ModelError(
            f"{path}: model_type {model_type!r} is not supported{f' ({gap})' if gap else ''}; supported are "
            f"{', '.join(SUPPORTED)}"
        )
    found = family(model_type)
    if values is whole:
        architecture = _read_checked(path, ConfigReader(values, shape), found)
        if found.nested_names:
            return with_nested_names(architecture, model_dir)
        return with_stored_names(architecture, model_dir, found.base_prefix) if found.base_prefix else architecture
    if not found.multimodal:
        raise ModelError(f"{path}: text_config is not supported in a {model_type} config")
    place = find_language_model(model_dir, ties=bool(whole.get("tie_word_embeddings", found.tied_by_default)))
    values = {**values, "tie_word_embeddings": place.tied}
    config = ConfigReader(values, replace(shape, tied_embeddings=place.tied))
    _refuse_false(config, whole)  # some take it from there, too
    return inside(_read_checked(path, config, found), place)


def _read_checked(path: Path, config: ConfigReader, found: Family) -> Architecture:
    """Return the architecture, or raise ModelError with everything that is not covered."""
    architecture = found.read(config)
    config.refuse_true(*_NEVER_BUILT)
    for key in _OF_SINGLE_FAMILIES:
        if config.values.get(key) and key not in config.asked:
            config.refuse(f"{key} {config.values[key]} is not supported for model type {config.shape.model_type}")
    _refuse_false(config, config.values)
    for key in ("quantization_config", "compression_config"):
        if config.values.get(key) and key not in config.asked:
            config.refuse(f"{key}: quantized weights are not supported; use the unquantized model")
    if config.problems:
        raise ModelError([f"{path}: {problem}" for problem in config.problems])
    return architecture


def _refuse_false(config: ConfigReader, values: Mapping[str, object]) -> None:
    for key in _ALWAYS_BUILT:
        if not values.get(key, True):
            config.refuse(f"{key} false is not supported")
