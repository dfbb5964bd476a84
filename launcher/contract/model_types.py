"""What a model type means beside what its config.json says: the launcher's side of a family, one entry each.

Types without an entry are like Llama in all of it. The ranks' side is in `sft.models.families`; tests hold both to the
same numbers of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
"""What files of most models call gate, up and down projection of an MLP."""
MIXTRAL_NAMES = ("w1", "w3", "w2")
"""What those of Mixtral call them of an expert."""

DenseBy = Literal["first_k_dense_replace", "mlp_only_layers", "mlp_layer_types", None]
"""The key of a config that says which layers have no experts. Beside the second one `decoder_sparse_step` does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRule:
    """Which layers have the window that `sliding_window` states."""

    layers: Literal["from_bound", "even_below_bound", "all", "all_or_none", "all_but_each"] = "from_bound"
    """"all" and "all_or_none" (by `use_sliding_window`) hold whatever `layer_types` says, the others where it is
    absent: layers from `max_window_layers` on; those of even number before it; all but each second (or so) one."""
    each: int = 0
    default: int | None = None
    """The window where none is stated."""
    last_sees_all: bool = False
    """Whether the last layer has none, whatever `layer_types` says; nor is another `sliding_window_pattern` read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelType:
    """The facts of one model type."""

    attention: Literal["usual", "hybrid", "latent", "wide_heads"] = "usual"
    """hybrid: linear in some layers; latent: keys and values of latents; wide_heads: layers without a window have
    heads of their own sizes."""
    scores: Literal["usual", "capped", "with_sinks"] = "usual"
    window: WindowRule = WindowRule()
    norms: Literal["before", "behind", "around"] = "before"
    """Where attention and MLP have norms."""
    normed_heads: bool = False
    """Whether each head of queries and keys is normed; others say so by `use_qk_norm`."""
    normed_width: bool = False
    """Whether all heads of queries are normed together, and all of keys."""
    gated_mlp: bool = True
    learned_positions: bool = False
    tied: bool = False
    """What it means that `tie_word_embeddings` is absent."""
    joined_qkv: bool = False
    """Whether files have Q, K and V in one matrix."""
    joined_gate_and_up: bool = False
    """Whether files have gate and up projection in one matrix."""
    joined_linear_attention: bool = False
    """Whether files have the projection of linear attention in two matrices; others have four."""
    joined_experts: bool = False
    """Whether published files have the matrices of all experts in one tensor."""
    experts_beside_mlp: bool = False
    """Whether its experts, where it has some, stand beside the MLP of each layer, with norms of their own."""
    mlp_names: tuple[str, str, str] = MLP_NAMES
    """What files call gate, up and down projection of an MLP. Without a gate there is no name for it."""
    expert_names: tuple[str, str, str] = MLP_NAMES
    """What files call gate, up and down projection of an expert."""
    dense_by: DenseBy = None
    """What says which layers of a mixture of experts have none; the same keys of other types' configs say nothing."""
    plain_layers: bool = False
    """Whether no fused kernel computes its layers."""


def _all_but_each(each: int) -> WindowRule:
    return WindowRule(layers="all_but_each", each=each, default=4096)


_IN_ALL = WindowRule(layers="all")
_USUAL = ModelType()


def _gemma4(window: int) -> ModelType:
    return ModelType(
        attention="wide_heads",
        window=WindowRule(layers="all_but_each", each=6, default=window, last_sees_all=True),
        norms="around",
        normed_heads=True,
        tied=True,
        joined_experts=True,
        experts_beside_mlp=True,
    )


MODEL_TYPES: dict[str, ModelType] = {
    "arcee": ModelType(gated_mlp=False, plain_layers=True),
    "deepseek_v2": ModelType(attention="latent", dense_by="first_k_dense_replace"),
    "deepseek_v3": ModelType(attention="latent", dense_by="first_k_dense_replace"),
    "dots1": ModelType(normed_heads=True, dense_by="first_k_dense_replace"),
    "ernie4_5": ModelType(tied=True),
    "ernie4_5_moe": ModelType(tied=True, dense_by="mlp_only_layers"),
    "exaone4": ModelType(window=_all_but_each(4), norms="behind", normed_heads=True, plain_layers=True),
    "gemma": ModelType(tied=True),
    "gemma2": ModelType(scores="capped", window=_all_but_each(2), norms="around", tied=True),
    "gemma3_text": ModelType(window=_all_but_each(6), norms="around", normed_heads=True, tied=True),
    "gemma4_text": _gemma4(window=512),
    "gemma4_unified_text": _gemma4(window=1024),
    "glm": ModelType(joined_gate_and_up=True),
    "glm4": ModelType(norms="around", joined_gate_and_up=True),
    "glm4_moe": ModelType(dense_by="first_k_dense_replace"),
    "glm4_moe_lite": ModelType(attention="latent", dense_by="mlp_layer_types"),
    "gpt2": ModelType(gated_mlp=False, learned_positions=True, tied=True, plain_layers=True),
    "gpt_oss": ModelType(scores="with_sinks", window=_all_but_each(2), joined_experts=True),
    "hunyuan_v1_dense": ModelType(normed_heads=True),
    "minimax_m2": ModelType(normed_width=True, expert_names=MIXTRAL_NAMES),
    "ministral3": ModelType(window=_IN_ALL),
    "mistral": ModelType(window=_IN_ALL),
    "mixtral": ModelType(window=_IN_ALL, expert_names=MIXTRAL_NAMES),
    "olmo2": ModelType(norms="behind", normed_width=True, plain_layers=True),
    "olmo3": ModelType(window=_all_but_each(4), norms="behind", normed_width=True, plain_layers=True),
    "olmoe": ModelType(normed_width=True),
    "phi3": ModelType(window=_IN_ALL, joined_qkv=True, joined_gate_and_up=True),
    "qwen2_moe": ModelType(window=WindowRule(layers="even_below_bound"), dense_by="mlp_only_layers"),
    "qwen3": ModelType(normed_heads=True),
    "qwen3_5_moe_text": ModelType(attention="hybrid", normed_heads=True, joined_experts=True),
    "qwen3_5_text": ModelType(attention="hybrid", normed_heads=True),
    "qwen3_moe": ModelType(window=WindowRule(layers="all_or_none"), normed_heads=True, dense_by="mlp_only_layers"),
    "qwen3_next": ModelType(
        attention="hybrid", normed_heads=True, joined_linear_attention=True, dense_by="mlp_only_layers"
    ),
    "smollm3": ModelType(tied=True),
    "starcoder2": ModelType(
        window=_IN_ALL, gated_mlp=False, tied=True, mlp_names=("", "c_fc", "c_proj"), plain_layers=True
    ),
}


def facts_of(model_type: str) -> ModelType:
    """Return the facts of a model type."""
    return MODEL_TYPES.get(model_type, _USUAL)
