"""The decoder layer as Megatron-core builds it, made once and for each layer by itself.

Norms, attention, MLP, linears and kernels are chosen in one place each, from the architecture's values and a few
options; nothing is overwritten afterwards, and no two layers share an object, so that layers may differ.

Rejected: to edit the specs that Megatron-core returns (`get_gpt_layer_local_spec`). They are one object for all layers,
and from 0.18 on the MLP is a partial function, on which setting `module` is ignored without an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from launcher.contract.linear_attention import LinearAttention
from launcher.contract.spec import Fp8Spec
from sft.megatron.core import (
    MLP,
    AttnMaskType,
    IdentityOp,
    MLPSubmodules,
    ModuleSpec,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from sft.megatron.kernel_choice import Kernels
from sft.megatron.layers.attention import Norm, RotarySelfAttention
from sft.megatron.layers.core_attention import CoreAttention
from sft.megatron.layers.fused import (
    FusedCoreAttention,
    FusedGeGLUMLP,
    FusedMLP,
    FusedRMSNorm,
    FusedRotatedRMSNorm,
    FusedSelfAttention,
    FusedTransformerLayer,
)
from sft.megatron.layers.gated_delta import GatedDeltaNet
from sft.megatron.layers.latent_attention import LatentSelfAttention
from sft.megatron.layers.linears import Linears, choose_linears
from sft.megatron.layers.mixture_of_experts import ExpertMLP
from sft.megatron.layers.norms import PLAIN_NORMS
from sft.megatron.layers.post_norms import PostNormTransformerLayer
from sft.megatron.layers.residual import residual_addition
from sft.megatron.layers.rotated_norms import RotatedRMSNorm
from sft.megatron.layers.scaled_output import ScaledFusedLayer, ScaledPostNormLayer
from sft.megatron.layers.shared_expert import ExpertsBesideMLP, SharedExpertMLP
from sft.megatron.layers.width_norms import WidthRMSNorm
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP, Experts

_CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""What checkpoints call the norms: the names of Transformer Engine's linears, which hold them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """What a run decides about layers, beside the architecture."""

    kernels: Kernels
    adapted: bool = False
    """Whether linears can have adapters."""
    fp8: Fp8Spec | None = None
    """What is in fp8; None where no product is."""

    def fp8_in(self, layer_number: int, layers: int) -> bool:
        """Return whether products of this layer's linears are in fp8, counted from 1 of so many."""
        return self.fp8 is not None and layer_number - 1 in self.fp8.layers_in_fp8(layers)


def decoder_spec(
    architecture: Architecture, options: LayerOptions, layer_numbers: Iterable[int]
) -> TransformerBlockSubmodules:
    """Return the spec of a pipeline stage that has these layers, counted from 1 in the whole model."""
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(architecture, options, number) for number in layer_numbers],
        layer_norm=FusedRMSNorm if options.kernels.fused_layers else PLAIN_NORMS[architecture.norm],
    )


def layer_spec(architecture: Architecture, options: LayerOptions, layer_number: int) -> ModuleSpec:
    """Return the spec of one layer, counted from 1 in the whole model."""
    layer = architecture.layers[layer_number - 1]
    fused = options.kernels.fused_layers
    in_fp8 = options.fp8_in(layer_number, len(architecture.layers))
    own = options if in_fp8 else replace(options, fp8=None)
    linears = choose_linears(fp8=own.fp8, adapted=options.adapted)
    before_attention, before_mlp = _norms_before(architecture, layer, own)
    submodules = TransformerLayerSubmodules(
        input_layernorm=before_attention,
        self_attention=_attention_spec(architecture, layer.attention, options.kernels, linears),
        # Fused layers add residuals themselves.
        self_attn_bda=residual_addition(layer.residual_multiplier),
        pre_mlp_layernorm=before_mlp,
        mlp=_experts_spec(layer.mlp, linears, PLAIN_NORMS[architecture.norm], fused=fused)
        if isinstance(layer.mlp, Experts)
        else _mlp_spec(layer.mlp, linears, fused=fused),
        mlp_bda=residual_addition(layer.residual_multiplier),
        sharded_state_dict_keys_map=dict(_CHECKPOINT_NAMES),
    )
    module, params = _layer_class(architecture, layer, fused=fused)
    return ModuleSpec(module=module, params=params, submodules=submodules)


def _layer_class(
    architecture: Architecture, layer: DecoderLayer, *, fused: bool
) -> tuple[type[TransformerLayer], dict[str, object]]:
    """Return the class of a layer and its own arguments."""
    own: dict[str, object]
    if fused:
        own = {"residual_multiplier": layer.residual_multiplier, "norm_after": layer.norm_after}
        return ScaledFusedLayer if layer.scaled else FusedTransformerLayer, own
    assert layer.norm_after or not layer.scaled
    if layer.norm_after:
        own = {"norm": PLAIN_NORMS[architecture.norm]}
        return ScaledPostNormLayer if layer.scaled else PostNormTransformerLayer, own
    return TransformerLayer, {}


@dataclass(frozen=True, kw_only=True, slots=True)
class _MLPSpec:
    """What Megatron-core before 0.18 builds an MLP from. About a ModuleSpec with our MLP it would warn."""

    module: type[nn.Module]
    submodules: MLPSubmodules | None
    params: dict[str, object] = field(default_factory=dict)


def _norms_before(architecture: Architecture, layer: DecoderLayer, options: LayerOptions) -> tuple[object, object]:
    """Return the norms before attention and before the MLP."""
    if not layer.norm_before:
        return IdentityOp, IdentityOp
    experts = isinstance(layer.mlp, Experts)
    if isinstance(layer.mlp, Experts) and layer.mlp.beside_mlp:
        return _norm_before_product(architecture, options), IdentityOp
    return _norm_before_product(architecture, options), _norm_before_product(architecture, options, experts=experts)


def _norm_before_product(
    architecture: Architecture, options: LayerOptions, *, experts: bool = False
) -> ModuleSpec | type[nn.Module]:
    """Return the norm whose output goes into linear_qkv, linear_fc1 or to experts, whose rows are sorted first."""
    if options.kernels.fused_layers:
        rows = "never"
        if options.fp8 is not None and not experts:
            rows = "always" if options.fp8.evaluation else "in_training"
        spec: ModuleSpec = ModuleSpec(module=FusedRMSNorm, params={"in_fp8": rows})
        return spec
    return PLAIN_NORMS[architecture.norm]


def _attention_spec(
    architecture: Architecture, attention: Attention | LinearAttention, kernels: Kernels, linears: Linears
) -> ModuleSpec:
    if isinstance(attention, LinearAttention):
        own = {"sizes": attention, "linears": linears, "kernel": kernels.linear_attention}
        return ModuleSpec(module=GatedDeltaNet, params=own)
    fused = kernels.fused_layers
    rope = architecture.rope_of(attention)
    rotation = {
        "magnitude": 1.0 if rope is None else rope.attention_factor,
        "angles": _columns_of_angles(architecture, attention),
    }
    if attention.latent is not None:
        of_latents = FusedRMSNorm if fused else PLAIN_NORMS[architecture.norm]
        parts = {"attention": attention, "linears": linears, "norm": of_latents, "core": _core_spec(attention, kernels)}
        return ModuleSpec(module=LatentSelfAttention, params={**parts, **rotation})
    norm = _norm_of_heads(architecture, attention, fused=fused) if attention.qk_norm else None
    return ModuleSpec(
        module=FusedSelfAttention if fused else RotarySelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "rotary": attention.rotary,
            **rotation,
            "heads": attention.heads,
            "value_norm": attention.value_norm,
            "query_scale": attention.query_scale,
            "width_norms": _width_norms(architecture) if attention.width_norm else None,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=linears.column,
            core_attention=_core_spec(attention, kernels),
            linear_proj=linears.row,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def _norm_of_heads(architecture: Architecture, attention: Attention, *, fused: bool) -> type[nn.Module]:
    """Return the norm of each head of queries and keys."""
    if attention.norm_rotated:
        assert architecture.norm == "rms"
        return FusedRotatedRMSNorm if fused else RotatedRMSNorm
    return FusedRMSNorm if fused else PLAIN_NORMS[architecture.norm]


def _core_spec(attention: Attention, kernels: Kernels) -> ModuleSpec:
    own = {
        "scale": attention.softmax_scale,
        "window": attention.window,
        "softcap": attention.score_softcap,
        "sinks": attention.sinks,
    }
    if kernels.fused_layers:
        return ModuleSpec(module=FusedCoreAttention, params={**own, "kernel": kernels.attention})
    return ModuleSpec(module=CoreAttention, params=own)


def _width_norms(architecture: Architecture) -> tuple[Norm, Norm]:
    """Return the norms of all query heads together, and of all key heads."""
    shape, late = architecture.shape, architecture.norm == "late_rounded_rms"
    queries, keys = (
        partial(WidthRMSNorm, heads=heads, late=late) for heads in (shape.num_attention_heads, shape.num_query_groups)
    )
    return queries, keys


def _columns_of_angles(architecture: Architecture, attention: Attention) -> slice:
    """Return where the angles of a layer are in the table that has those of all kinds of layers, side by side."""
    own = architecture.rope_of(attention), architecture.head_dim_of(attention)
    begin = 0
    for rope, head_dim in architecture.rotations:
        end = begin + rope.pairs(head_dim)
        if (rope, head_dim) == own:
            return slice(begin, end)
        begin = end
    return slice(0)


def _mlp_spec(mlp: DenseMLP, linears: Linears, *, fused: bool) -> object:
    module = MLP
    if fused:
        module = FusedMLP if mlp.activation == "silu" else FusedGeGLUMLP
    submodules = MLPSubmodules(linear_fc1=linears.column, linear_fc2=linears.row)
    if hasattr(MLP, "as_mlp_submodule"):  # Megatron-core 0.18 and later call it with arguments that MLP has not
        return partial(module.as_mlp_submodule, submodules=submodules)
    return _MLPSpec(module=module, submodules=submodules)


def _experts_spec(experts: Experts, linears: Linears, norm: type[nn.Module], *, fused: bool) -> object:
    module: type[nn.Module] = ExpertMLP
    params: dict[str, object] = {"experts": experts, "linear": linears.experts, "fused": fused}
    if experts.shared is not None:
        module = SharedExpertMLP
        params |= {"mlp": FusedMLP if fused else MLP, "linears": linears}
    if experts.beside_mlp:
        assert experts.shared is not None
        assert not fused
        module = ExpertsBesideMLP
        params["norm"] = norm
    if hasattr(MLP, "as_mlp_submodule"):
        return partial(module, **params)
    return _MLPSpec(module=module, submodules=None, params=params)
