"""Megatron-core's configuration of a model under a topology.

Settings under which Megatron-core gives wrong results without an error are chosen here, never by the user:
the interleaved schedule sends without batching (a two-stage pipeline would otherwise swap activations and
gradients), gloo keeps stage outputs alive until they are sent, and the fused cross-entropy that casts gradients to
bf16 stays off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from launcher.contract.spec import RunSpec
from launcher.contract.topology import Topology
from sft.megatron.core import TransformerConfig
from sft.megatron.kernel_choice import Kernels
from sft.megatron.layers.activations import ACTIVATIONS
from sft.models.architecture import Architecture, DecoderLayer, DenseMLP

T = TypeVar("T")


def transformer_config(
    spec: RunSpec, architecture: Architecture, topology: Topology, kernels: Kernels, *, on_gpu: bool
) -> TransformerConfig:
    """Return Megatron-core's configuration of this model under this topology."""
    shape, layers, attentions = architecture.shape, architecture.layers, architecture.attentions
    dtype = torch.float32 if spec.train.precision == "fp32" else torch.bfloat16
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=_dense_width(layers),
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization="LayerNorm" if architecture.norm == "layer" else "RMSNorm",
        layernorm_epsilon=architecture.layernorm_epsilon,
        gated_linear_unit=_same(layer.mlp.gated for layer in layers),
        activation_func=ACTIVATIONS[_same(layer.mlp.activation for layer in layers)],
        layernorm_zero_centered_gamma=architecture.norm == "zero_centered_rms",
        # One switch each; `drop_absent_biases` takes off what a layer does not have.
        add_bias_linear=any(
            (*(layer.mlp.bias for layer in layers), *(attention.output_bias for attention in attentions))
        ),
        add_qkv_bias=any(attention.qkv_bias for attention in attentions),
        # Of norms that each rank has whole; it adds up their gradients. Those over all heads are split.
        qk_layernorm=_same(attention.qk_norm for attention in attentions),
        attention_output_gate=_same(attention.output_gate for attention in attentions),
        attention_dropout=spec.model.attention_dropout,
        hidden_dropout=spec.model.hidden_dropout,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Every weight is filled by name afterwards. Initialisation itself has to run all the same: it is what marks
        # parameters as split over tensor parallel ranks.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        calculate_per_token_loss=True,
        cross_entropy_loss_fusion=False,
        persist_layer_norm=False,
        # Megatron-core's linears then add weight gradients to fp32 buffers by the product itself.
        gradient_accumulation_fusion=kernels.fused,
        deterministic_mode=False,
        **_parallel_settings(topology, on_gpu),
        **_recompute_settings(spec.train.recompute, spec.train.recompute_layers),
    )


def _dense_width(layers: Sequence[DecoderLayer]) -> int:
    """Return the width of dense MLPs. Where every layer has experts, whose widths are their own, nothing has it."""
    widths = [layer.mlp.width for layer in layers if isinstance(layer.mlp, DenseMLP)]
    return _same(widths or [layers[0].mlp.width])


def _same(values: Iterable[T]) -> T:
    """Return the value of all layers. Where layers differ in one, they need modules of their own (layers.spec)."""
    found = set(values)
    assert len(found) == 1, f"Megatron-core's configuration holds one value for all layers, not {found}"
    return found.pop()


def _leave_as_is(weight: Tensor) -> Tensor:
    return weight


def _parallel_settings(topology: Topology, on_gpu: bool) -> dict[str, object]:
    interleaved = topology.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": topology.tensor_parallel,
        "pipeline_model_parallel_size": topology.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": topology.virtual_pipeline if interleaved else None,
        "pipeline_model_parallel_layout": contents_of_chunks(topology) if topology.pipeline_parallel > 1 else None,
        "context_parallel_size": topology.context_parallel,
        "sequence_parallel": topology.sequence_parallel,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "deallocate_pipeline_outputs": on_gpu or not interleaved,
    }


def contents_of_chunks(topology: Topology) -> list[list[str]]:
    """Return what each model chunk holds, in Megatron-core's words and in the model's order.

    It is the one setting that all versions read in each place where they number layers.
    """
    chunks = [["decoder"] * count for count in topology.layers_per_stage]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _recompute_settings(recompute: str, layers: int | None) -> dict[str, object]:
    if layers is not None:
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}
    if recompute in ("full", "offload"):
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "norms":
        return {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    return {"recompute_granularity": "selective"} if recompute == "selective" else {}
