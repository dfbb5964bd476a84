"""What Megatron-core must build for a Hugging Face `config.json`; what is not covered is refused by name.

One row of `FAMILIES` a model family says what its code in transformers does that its config does not state (a QKV
bias, norms on queries and keys, which keys have a default other than Llama's). Everything else is read from the
file, with json: transformers fills in defaults without telling, takes seconds to import, and runs on every rank.

Rejected: to build whatever resembles Llama and to hope. A setting that is read over (a bias, a sliding window, a
scaled RoPE) trains without any error, on another model than the one that is exported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.errors import ModelError
from launcher.model_shape import ModelShape, read_model_shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a `model_type` implies beyond its config."""

    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["none", "by_layer", "all_layers"] = "none"
    """Whether, and how, transformers reads `sliding_window` for this family."""
    stated: tuple[str, ...] = ()
    """Keys that must be in the file, because this family's default is not what `ModelShape` assumes."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(window="all_layers", stated=("num_key_value_heads", "sliding_window")),
    "qwen2": Family(qkv_bias=True, window="by_layer", stated=("num_key_value_heads",)),
    "qwen3": Family(qk_norm=True, window="by_layer", stated=("num_key_value_heads", "head_dim")),
}
"""Families whose logits are proven equal to transformers'."""

_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Numbers of Llama 3's RoPE scaling that Megatron-core has built in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A decoder-only transformer, in full."""

    shape: ModelShape
    layernorm_epsilon: float
    rope_theta: float
    rope_scaling_factor: float | None
    """Factor of Llama 3's RoPE scaling; None is plain RoPE."""
    qkv_bias: bool
    qk_norm: bool


def read_architecture(model_dir: Path) -> Architecture:
    """The architecture in `model_dir`/config.json; ModelError lists everything that is not covered."""
    shape = read_model_shape(model_dir)
    path = model_dir / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    family = FAMILIES.get(shape.model_type)
    if family is None:
        raise ModelError(
            f"{path}: model_type {shape.model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    rope = _rope_parameters(config)
    problems = [
        *(f"no {key}, which a {shape.model_type} config must state" for key in family.stated if key not in config),
        *_module_problems(config, family),
        *_window_problems(config, family, shape),
        *_rope_problems(rope, shape),
    ]
    if problems:
        raise ModelError([f"{path}: {problem}" for problem in problems])
    return Architecture(
        shape=shape,
        layernorm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope["rope_theta"]),
        rope_scaling_factor=float(rope["factor"]) if rope["rope_type"] == "llama3" else None,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings in the form of transformers 5, with its precedence; earlier files keep them at top level."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return rope


def _module_problems(config: dict[str, Any], family: Family) -> list[str]:
    """Settings of layers that our layer spec does not build."""
    problems = []
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        problems.append(f"hidden_act {activation!r} is not supported; only 'silu'")
    # Qwen2's code has its QKV bias whatever the config says.
    biases = ("mlp_bias",) if family.qkv_bias else ("attention_bias", "mlp_bias")
    problems += [f"{key} true is not supported" for key in biases if config.get(key)]
    if config.get("quantization_config"):
        problems.append("quantization_config: quantized weights are not supported; use the unquantized model")
    return problems


def _window_problems(config: dict[str, Any], family: Family, shape: ModelShape) -> list[str]:
    """A sliding window that some layer really has."""
    window = config.get("sliding_window")
    if family.window == "none" or (family.window == "all_layers" and window is None):
        return []
    if family.window == "all_layers":
        return [f"sliding_window {window} is not supported; only null"]
    kinds = config.get("layer_types")
    if kinds is not None:
        sliding = sum(kind != "full_attention" for kind in kinds)
    elif config.get("use_sliding_window") and window is not None:
        sliding = max(0, shape.num_layers - config.get("max_window_layers", 28))
    else:
        sliding = 0
    return [f"a sliding window in {sliding} of {shape.num_layers} layers is not supported"] if sliding else []


def _rope_problems(rope: dict[str, Any], shape: ModelShape) -> list[str]:
    """RoPE variants other than plain and Llama 3's."""
    problems = []
    if rope["partial_rotary_factor"] != 1.0:
        problems.append(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported; only 1.0")
    if not isinstance(rope["rope_theta"], (int, float)) or any(isinstance(value, dict) for value in rope.values()):
        problems.append("RoPE settings that differ between layers are not supported")
    kind = rope["rope_type"]
    if kind == "default":
        return problems
    if kind != "llama3":
        return [*problems, f"rope_type {kind!r} is not supported; supported are 'default', 'llama3'"]
    if not isinstance(rope.get("factor"), (int, float)):
        problems.append("rope_type 'llama3' without a factor")
    given = {"original_max_position_embeddings": shape.max_position_embeddings, **rope}
    wrong = [f"{key} {given.get(key)}, not {fixed}" for key, fixed in _LLAMA3_FIXED.items() if given.get(key) != fixed]
    if wrong:
        problems.append(f"rope_type 'llama3' with {'; '.join(wrong)}: Megatron-core has these numbers built in")
    return problems
