"""Translate the architecture that a NeMo config describes into a Hugging Face config.json.

Two of NeMo's GPT models have a counterpart there: GPT-2 (LayerNorm, learned positions, biases, gelu) and Llama
(RMSNorm, rotary positions, no biases, SwiGLU). Others are refused, with the settings in which they differ.
"""

from __future__ import annotations

from launcher.contract.errors import ConfigError
from launcher.contract.nemo.entries import Entries, Entry, number_of, value_of, whole_number_of
from launcher.contract.usual_keys import HfConfig

KEYS = {
    f"model.{name}"
    for name in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "max_position_embeddings",
        "layernorm_epsilon",
        "normalization",
        "bias",
        "activation",
        "openai_gelu",
        "position_embedding_type",
        "rotary_percentage",
        "rotary_base",
        "share_embeddings_and_output_weights",
        "transformer_block_type",
        "headscale",
        "attention_type",
        "make_vocab_size_divisible_by",
        "padded_vocab_size",
        "override_vocab_size",
    )
}
"""Keys that describe the architecture."""

_GPT2_VOCABULARY = 50257
_KINDS = {
    "gpt2": {"normalization": "layernorm", "activation": "gelu", "position": "learned", "bias": True},
    "llama": {"normalization": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False},
}
_SAME = {
    "fast-swiglu": "swiglu",
    "learned_absolute": "learned",
    "rotary": "rope",
    "low_precision_layernorm": "layernorm",
}


def describes_model(entries: Entries) -> bool:
    """Return whether the file describes a model, and not only how to train one."""
    return value_of(entries, "model.num_layers") is not None


def model_config(entries: Entries) -> HfConfig:
    """Return the model's config.json, or raise ConfigError that lists what has no counterpart."""
    traits = _traits(entries)
    kind = next((kind for kind, known in _KINDS.items() if known == traits), None)
    problems = list(_unsupported(entries))
    if kind is None:
        listed = "; ".join(f"{name}: {_words(known)}" for name, known in _KINDS.items())
        problems.append(f"{_where(entries, 'model.num_layers')}: model: {_words(traits)} is none of {listed}")
    sizes = _sizes(entries, problems)
    if problems:
        raise ConfigError(problems)
    return _gpt2(entries, sizes) if kind == "gpt2" else _llama(entries, sizes)


def _traits(entries: Entries) -> dict[str, object]:
    """Return the settings that distinguish NeMo's models, with NeMo's defaults for absent keys."""

    def text(key: str, default: str) -> str:
        value = str(value_of(entries, f"model.{key}", default))
        return _SAME.get(value, value)

    return {
        "normalization": text("normalization", "layernorm"),
        "activation": text("activation", "gelu"),
        "position": text("position_embedding_type", "learned_absolute"),
        "bias": bool(value_of(entries, "model.bias", True)),
    }


def _unsupported(entries: Entries) -> list[str]:
    allowed = {
        "transformer_block_type": ("pre_ln",),
        "headscale": (False,),
        "attention_type": ("multihead",),
        "rotary_percentage": (1, 1.0),
    }
    return [
        f"{_where(entries, f'model.{key}')}: model.{key} {value!r} is not supported; only {values[0]!r} is"
        for key, values in allowed.items()
        if (value := value_of(entries, f"model.{key}", values[0])) not in values
    ]


def _sizes(entries: Entries, problems: list[str]) -> dict[str, int]:
    """Return the sizes that both kinds have, 1 for a missing one, and append what is wrong to `problems`."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
    stated = {name: value_of(entries, f"model.{name}") for name in names} | {"vocab_size": _vocabulary(entries)}
    sizes = {}
    for name, value in stated.items():
        if isinstance(value, int) and value > 0:
            sizes[name] = value
            continue
        sizes[name] = 1
        hint = "; give model.padded_vocab_size, or model.path" if name == "vocab_size" else ""
        problems.append(f"{_where(entries, 'model.num_layers')}: model.{name}: {value!r} is not a size{hint}")
    width = sizes["hidden_size"] // sizes["num_attention_heads"]
    return sizes | {"head_dim": whole_number_of(entries, "model.kv_channels", 0) or width}


def _vocabulary(entries: Entries) -> int | None:
    for key in ("model.override_vocab_size", "model.padded_vocab_size"):
        if size := whole_number_of(entries, key, 0):
            return size
    return _GPT2_VOCABULARY if value_of(entries, "model.tokenizer.type") == "GPT2BPETokenizer" else None


def _gpt2(entries: Entries, sizes: dict[str, int]) -> HfConfig:
    groups = whole_number_of(entries, "model.num_query_groups", sizes["num_attention_heads"])
    if (
        groups != sizes["num_attention_heads"]
        or sizes["head_dim"] * sizes["num_attention_heads"] != sizes["hidden_size"]
    ):
        raise ConfigError(
            f"{_where(entries, 'model.num_attention_heads')}: model: a GPT-2 has as many KV heads as heads, each of "
            f"hidden_size / heads = {sizes['hidden_size'] // sizes['num_attention_heads']}"
        )
    # NeMo's fused bias and gelu, on by default, use the tanh form.
    tanh = value_of(entries, "model.bias_activation_fusion", True) or value_of(entries, "model.openai_gelu", False)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": sizes["vocab_size"],
        "n_positions": sizes["max_position_embeddings"],
        "n_embd": sizes["hidden_size"],
        "n_layer": sizes["num_layers"],
        "n_head": sizes["num_attention_heads"],
        "n_inner": sizes["ffn_hidden_size"],
        "activation_function": "gelu_new" if tanh else "gelu",
        "layer_norm_epsilon": number_of(entries, "model.layernorm_epsilon", 1e-5),
        "tie_word_embeddings": bool(value_of(entries, "model.share_embeddings_and_output_weights", True)),
    }


def _llama(entries: Entries, sizes: dict[str, int]) -> HfConfig:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["max_position_embeddings"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["ffn_hidden_size"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_key_value_heads": whole_number_of(entries, "model.num_query_groups", sizes["num_attention_heads"]),
        "head_dim": sizes["head_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": number_of(entries, "model.layernorm_epsilon", 1e-5),
        "rope_theta": number_of(entries, "model.rotary_base", 10000.0),
        "tie_word_embeddings": bool(value_of(entries, "model.share_embeddings_and_output_weights", True)),
    }


def _words(traits: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in traits.items())


def _where(entries: Entries, key: str) -> str:
    entry: Entry | None = entries.get(key) or next(iter(entries.values()), None)
    return entry.where if entry is not None else "?"
