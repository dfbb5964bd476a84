"""Translate the model of a NeMo 2 checkpoint (context/model.yaml) into a Hugging Face config.json.

The file is a YAML dump of the model object: its class, and every field of its configuration, defaults included. The
other files of `context/` (io.json and the pickles it names) describe Python objects and are never read.

The fields decide which model it is, not the class's name: classes such as Llama3Config8B only have other defaults. The
name has to be one whose code adds nothing to the fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.contract.errors import ModelError
from launcher.contract.usual_keys import HfConfig

CONTEXT = Path("context", "model.yaml")

_Fields = Mapping[str, Any]  # YAML: each value is checked where it is used

_MODELS = ("GPTModel", "LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Classes that build what their fields say. Others, such as Gemma's, do more."""

_TRAITS = {
    "gpt2": {
        "normalization": "LayerNorm",
        "activation_func": "gelu",
        "gated_linear_unit": False,
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
    },
    "llama": {
        "normalization": "RMSNorm",
        "activation_func": "silu",
        "gated_linear_unit": True,
        "position_embedding_type": "rope",
        "add_bias_linear": False,
    },
}
"""GPT-2, and what Llama, Mistral and Qwen have in common."""

_PLAIN: dict[str, tuple[object, ...]] = {
    "num_moe_experts": (None, 0),
    "multi_latent_attention": (None, False),
    "mtp_num_layers": (None, 0),
    "rotary_percent": (None, 1, 1.0),
    "rotary_interleaved": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "heterogeneous_block_specs": (None, False),
    "qk_l2_norm": (None, False),
    "no_rope_freq": (None,),
    "nope_layer_interval": (None,),
    "softmax_scale": (None,),
    "softmax_type": (None, "vanilla"),
    "window_attn_skip_freq": (None,),
    "glu_linear_offset": (None, 0, 0.0),
    "activation_func_clamp_value": (None,),
}
"""Fields that change the architecture, with the values that leave it as it is."""


def context_config(checkpoint: Path) -> HfConfig:
    """Return a NeMo 2 checkpoint's config.json, or raise ModelError that lists everything without a counterpart."""
    path = checkpoint / CONTEXT
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"model.path: {path} cannot be read ({error})") from None
    fields = model.get("config") if isinstance(model, dict) else None
    if not isinstance(fields, dict):
        raise ModelError(f"model.path: {path}: no section `config`; it does not describe a NeMo 2 model")
    kind = _kind(fields)
    problems = [*_problems(model, fields, kind), *_size_problems(fields)]
    vocabulary = _vocabulary(model, fields, path.parent)
    if vocabulary is None:
        problems.append("config.vocab_size is not set, and there is no tokenizer.json to count; write the number there")
    if problems or vocabulary is None:
        raise ModelError([f"model.path: {path}: {problem}" for problem in problems])
    return _gpt2(fields, vocabulary) if kind == "gpt2" else _llama(fields, vocabulary)


def _kind(fields: _Fields) -> str | None:
    traits_here = {name: _plain(fields.get(name)) for name in _TRAITS["llama"]}
    return next((kind for kind, traits in _TRAITS.items() if traits == traits_here), None)


def _plain(value: object) -> object:
    """Return the name of a function or class without its module, and any other value as it is."""
    return str(value.get("_target_", "")).rpartition(".")[2] if isinstance(value, dict) else value


def _problems(model: _Fields, fields: _Fields, kind: str | None) -> Iterator[str]:
    name = _plain(model)
    if name not in _MODELS:
        yield f"{name or 'a model without a class'} is not supported; supported are {', '.join(_MODELS)}"
    if kind is None:
        for known, traits in _TRAITS.items():
            differ = [f"{key} {_plain(fields.get(key))!r}" for key in traits if _plain(fields.get(key)) != traits[key]]
            yield f"it is not a {known}-like model: {', '.join(differ)}"
    for key, plain in _PLAIN.items():
        if fields.get(key) not in plain:
            yield f"config.{key} {fields[key]!r} is not supported; only {plain[0]!r} is"
    if fields.get("qk_layernorm") and (kind != "llama" or fields.get("add_qkv_bias")):
        yield "config.qk_layernorm with biases is not supported"
    if model.get("model_transform") is not None:
        yield "it holds adapters (model_transform); merge them with the NeMo that wrote it"


def _size_problems(fields: _Fields) -> Iterator[str]:
    for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length"):
        if not isinstance(fields.get(key), int) or fields[key] < 1:
            yield f"config.{key} {fields.get(key)!r} is not a size"


def _vocabulary(model: _Fields, fields: _Fields, context: Path) -> int | None:
    """Return the vocabulary's size as stated, or else that of the tokenizer beside it, which NeMo then pads."""
    if isinstance(fields.get("vocab_size"), int):
        return int(fields["vocab_size"])
    path = tokenizer_dir(model, context) / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        own = tokenizer["model"]["vocab"]
        ids = list(own.values()) if isinstance(own, dict) else list(range(len(own)))
        return 1 + max(ids + [token["id"] for token in tokenizer.get("added_tokens", [])])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tokenizer_dir(model: _Fields, context: Path) -> Path:
    """Return the folder of the tokenizer's files.

    NeMo copies them to `nemo_tokenizer`, whatever name outside of `context` they had.
    """
    named = Path(str((model.get("tokenizer") or {}).get("pretrained_model_name") or "nemo_tokenizer"))
    inside = not named.is_absolute() and ".." not in named.parts and (context / named).is_dir()
    return context / (named if inside else "nemo_tokenizer")


def _gpt2(fields: _Fields, vocabulary: int) -> HfConfig:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    if (fields.get("num_query_groups") or heads) != heads or (
        fields.get("kv_channels") or hidden // heads
    ) * heads != hidden:
        raise ModelError("model.path: a GPT-2 has as many KV heads as heads, each of hidden_size / heads")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocabulary,
        "n_positions": fields["seq_length"],
        "n_embd": hidden,
        "n_layer": fields["num_layers"],
        "n_head": heads,
        "n_inner": fields["ffn_hidden_size"],
        # Megatron-core's fused bias and gelu use the tanh form.
        "activation_function": "gelu_new" if fields.get("bias_activation_fusion") else "gelu",
        "layer_norm_epsilon": float(fields.get("layernorm_epsilon", 1e-5)),
        "tie_word_embeddings": bool(fields.get("share_embeddings_and_output_weights", True)),
    }


def _llama(fields: _Fields, vocabulary: int) -> HfConfig:
    heads = fields["num_attention_heads"]
    config = {
        "vocab_size": vocabulary,
        "max_position_embeddings": fields["seq_length"],
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["ffn_hidden_size"],
        "num_hidden_layers": fields["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_query_groups") or heads,
        "head_dim": fields.get("kv_channels") or fields["hidden_size"] // heads,
        "hidden_act": "silu",
        "rms_norm_eps": float(fields.get("layernorm_epsilon", 1e-5)),
        "rope_theta": float(fields.get("rotary_base", 10000.0)),
        "tie_word_embeddings": bool(fields.get("share_embeddings_and_output_weights", True)),
        **_scaling(fields),
    }
    window = fields.get("window_size")
    if fields.get("qk_layernorm"):
        family = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    elif fields.get("add_qkv_bias"):
        family = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    elif window:
        family = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window[0]}
    else:
        family = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return family | config


def _scaling(fields: _Fields) -> HfConfig:
    """Return the RoPE scaling: Llama 3.1's, Megatron-core's linear one, or none."""
    if fields.get("scale_factor"):
        return {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": float(fields["scale_factor"]),
                "low_freq_factor": float(fields["low_freq_factor"]),
                "high_freq_factor": float(fields["high_freq_factor"]),
                "original_max_position_embeddings": fields["old_context_len"],
            }
        }
    if fields.get("seq_len_interpolation_factor"):
        return {"rope_scaling": {"rope_type": "linear", "factor": float(fields["seq_len_interpolation_factor"])}}
    return {}
