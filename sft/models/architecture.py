"""What Megatron-core must build for a Hugging Face `config.json`; what is not covered is refused by name.

One row of `FAMILIES` a model family says what its code in transformers does that its config does not state (a QKV
bias, norms on queries and keys, scaled embeddings, which keys have a default other than Llama's). Everything else is
read from the file, with json: transformers fills in defaults without telling, takes seconds to import, and runs on
every rank.

Rejected: to build whatever resembles Llama and to hope. A setting that is read over (a bias, a sliding window, a
scaled RoPE) trains without any error, on another model than the one that is exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher.contract.errors import ModelError
from launcher.contract.model_shape import ModelShape, read_model_shape
from sft.models.rope import Rope, read_rope

Activation = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a `model_type` implies beyond its config."""

    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    """Query, key and value are one tensor in the files, and so are gate and up."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the hidden size."""
    activation_key: str = "hidden_act"
    """What the config calls its activation."""
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "silu"})
    """Values of it that are covered, and what each means; the first is the family's default."""
    epsilon_key: str = "rms_norm_eps"
    """What the config calls the norms' epsilon."""
    epsilon: float = 1e-6
    """The epsilon of a config that states none."""
    gpt2: bool = False
    """GPT-2's blocks: LayerNorm, learned positions, an MLP without a gate, a bias in each linear."""
    partial_rotary: bool = False
    """Whether transformers reads `partial_rotary_factor` for this family."""
    window: Literal["none", "by_layer", "all_layers"] = "none"
    """Whether, and how, transformers reads `sliding_window` for this family."""
    stated: tuple[str, ...] = ()
    """Keys that must be in the file, because this family's default is not what we assume."""


FAMILIES: dict[str, Family] = {
    "gemma": Family(
        zero_centered_norm=True,
        scaled_embedding=True,
        # Gemma's first files say "gelu" and mean its tanh form; transformers reads them so too.
        activations={"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"},
        stated=("num_key_value_heads", "head_dim"),
    ),
    "gpt2": Family(
        gpt2=True,
        activation_key="activation_function",
        activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        epsilon_key="layer_norm_epsilon",
        epsilon=1e-5,
    ),
    "llama": Family(),
    "mistral": Family(window="all_layers", stated=("num_key_value_heads", "sliding_window")),
    "phi3": Family(fused=True, partial_rotary=True, window="all_layers", stated=("rms_norm_eps",)),
    "qwen2": Family(qkv_bias=True, window="by_layer", stated=("num_key_value_heads",)),
    "qwen3": Family(qk_norm=True, window="by_layer", stated=("num_key_value_heads", "head_dim")),
}
"""Families whose logits are proven equal to transformers'."""

_KNOWN_GAPS = {
    "gemma2": "it caps attention scores and logits by tanh and norms each sublayer's output",
    "gemma3": "it norms each sublayer's output and has another RoPE in its sliding layers",
    "gemma3_text": "it norms each sublayer's output and has another RoPE in its sliding layers",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
}
"""Families that look covered and are not, and what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A decoder-only transformer, in full."""

    shape: ModelShape
    layernorm_epsilon: float
    rope: Rope | None
    """Rotary positions; None: learned ones."""
    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    """Query, key and value are one tensor in the files, and so are gate and up."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight."""
    gpt2: bool = False
    """GPT-2's blocks: LayerNorm, learned positions, an MLP without a gate, a bias in each linear."""
    activation: Activation = "silu"
    embedding_scale: float | None = None
    """Embeddings are multiplied by it."""
    attention_window: int | None = None
    """Longest sequence in which every token still sees all before it; None is without bound."""


def read_architecture(model_dir: Path) -> Architecture:
    """The architecture in `model_dir`/config.json; ModelError lists everything that is not covered."""
    shape = read_model_shape(model_dir)
    path = model_dir / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    family = FAMILIES.get(shape.model_type)
    if family is None:
        gap = _KNOWN_GAPS.get(shape.model_type)
        raise ModelError(
            f"{path}: model_type {shape.model_type!r} is not supported{f' ({gap})' if gap else ''}; supported are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    rope, rope_problems = _positions(config, family, shape)
    window, window_problems = _attention_window(config, family, shape)
    problems = [
        *(f"no {key}, which a {shape.model_type} config must state" for key in family.stated if key not in config),
        *_module_problems(config, family),
        *window_problems,
        *rope_problems,
    ]
    if problems:
        raise ModelError([f"{path}: {problem}" for problem in problems])
    return Architecture(
        shape=shape,
        layernorm_epsilon=float(config.get(family.epsilon_key, family.epsilon)),
        rope=rope,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        fused=family.fused,
        zero_centered_norm=family.zero_centered_norm,
        gpt2=family.gpt2,
        activation=family.activations[config.get(family.activation_key, next(iter(family.activations)))],
        embedding_scale=shape.hidden_size**0.5 if family.scaled_embedding else None,
        attention_window=window,
    )


def _positions(config: dict[str, Any], family: Family, shape: ModelShape) -> tuple[Rope | None, list[str]]:
    """The rotary positions, where the family has them, and what is wrong with them."""
    if family.gpt2:
        return None, []
    return read_rope(config, max_position_embeddings=shape.max_position_embeddings, partial=family.partial_rotary)


def _module_problems(config: dict[str, Any], family: Family) -> list[str]:
    """Settings of layers that our layer spec does not build."""
    problems = []
    activation = config.get(family.activation_key, next(iter(family.activations)))
    if activation not in family.activations:
        covered = " or ".join(map(repr, family.activations))
        problems.append(f"{family.activation_key} {activation!r} is not supported; only {covered}")
    # Qwen2's code has its QKV bias whatever the config says.
    biases = ("mlp_bias",) if family.qkv_bias else ("attention_bias", "mlp_bias")
    unbuilt = (*biases, "use_bidirectional_attention", "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    problems += [f"{key} true is not supported" for key in unbuilt if config.get(key)]
    if not config.get("scale_attn_weights", True):
        problems.append("scale_attn_weights false is not supported")
    if config.get("quantization_config"):
        problems.append("quantization_config: quantized weights are not supported; use the unquantized model")
    return problems


def _attention_window(config: dict[str, Any], family: Family, shape: ModelShape) -> tuple[int | None, list[str]]:
    """The sliding window that some layer really has, and what is wrong with it.

    In sequences no longer than the window it hides nothing, so such a model is covered up to that length.
    """
    window = config.get("sliding_window")
    if family.window == "none" or (family.window == "all_layers" and window is None):
        return None, []
    sliding = shape.num_layers
    if family.window == "by_layer":
        kinds = config.get("layer_types")
        if kinds is not None:
            sliding = sum(kind != "full_attention" for kind in kinds)
        elif config.get("use_sliding_window") and window is not None:
            sliding = max(0, shape.num_layers - config.get("max_window_layers", 28))
        else:
            sliding = 0
    if sliding and not isinstance(window, int):
        return None, [f"{sliding} of {shape.num_layers} layers have a sliding window, and sliding_window is {window}"]
    return (window if sliding else None), []
