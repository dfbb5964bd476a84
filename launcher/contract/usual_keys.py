"""Configs that name or imply sizes in their own way, in the words that Llama's has."""

from __future__ import annotations

from typing import Any

from launcher.contract.model_types import facts_of

HfConfig = dict[str, Any]
"""A config.json as it was read. Its values are whatever the file holds: check them where they are used."""

GPT2_KEYS = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""The names of the sizes in GPT-2's config."""
ERNIE_KEYS = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
"""The names of the numbers of experts in ERNIE's config."""

_LANGUAGE_MODELS: dict[str, HfConfig] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
    "gemma4": {
        "model_type": "gemma4_text",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262144,
        "max_position_embeddings": 131072,
    },
    "gemma4_unified": {
        "model_type": "gemma4_unified_text",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262144,
        "max_position_embeddings": 262144,
    },
    "mistral3": {"model_type": "mistral"},
    "qwen3_5": {"model_type": "qwen3_5_text"},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text"},
}
"""Multimodal model types, and what their `text_config` means where it leaves out the language model's type or sizes."""


def language_model_config(config: HfConfig) -> HfConfig:
    """Return the config of the language model: `config` itself, or what a multimodal one has in `text_config`."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    above = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
    return {**_LANGUAGE_MODELS.get(str(config.get("model_type")), {}), **text, **above}


def with_usual_keys(config: HfConfig, model_type: str) -> HfConfig:
    """Return a language model's config with its sizes by their usual names."""
    if model_type == "gpt2":
        return config | _of_gpt2(config)
    if model_type == "ernie4_5_moe":
        return config | _of_ernie(config)
    if facts_of(model_type).experts_beside_mlp:
        return config | _experts_beside_mlp(config)
    if model_type == "qwen3_5_moe_text":  # none of its layers is dense
        return {"intermediate_size": config.get("moe_intermediate_size"), **config}
    return config


def _of_gpt2(config: HfConfig) -> HfConfig:
    found = {ours: config.get(theirs, config.get(ours)) for ours, theirs in GPT2_KEYS.items()}
    width = found["intermediate_size"] or 4 * (found["hidden_size"] or 0)
    return found | {"intermediate_size": width, "num_key_value_heads": None, "head_dim": None}  # it reads neither


def _of_ernie(config: HfConfig) -> HfConfig:
    """Return what the config of an ERNIE with experts means, by the names that others have."""
    named = {ours: config.get(theirs) for ours, theirs in ERNIE_KEYS.items()}
    shared = config.get("moe_num_shared_experts", 2)
    keys = {"num_hidden_layers": 0, "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}
    stated = [config.get(key, default) for key, default in keys.items()]
    layers, start, end, interval = (number if isinstance(number, int) else 0 for number in stated)
    last = layers - 1 if end == -1 else end
    dense = [layer for layer in range(layers) if (layer + 1) % (interval or 1) or not start <= layer <= last]
    return {**named, "n_shared_experts": shared, "mlp_only_layers": dense, "decoder_sparse_step": 1}


def _experts_beside_mlp(config: HfConfig) -> HfConfig:
    """Return the experts of Gemma 4, where it has some."""
    if not config.get("enable_moe_block"):
        return {"num_experts": None}
    return {
        "num_experts_per_tok": config.get("top_k_experts"),
        "shared_expert_intermediate_size": config.get("intermediate_size"),
    }
