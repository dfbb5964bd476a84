"""Our modules in Megatron-core's layer spec: RMSNorm and core attention in plain torch.

The same modules run on CPU and GPU and need neither Transformer Engine nor Apex. Megatron-core's own local modules
do not do: its torch norm refuses sequence parallel, and its core attention builds the whole score matrix.
Column- and row-parallel linears, MLP and residual handling stay Megatron-core's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.megatron.mcore import (
    MegatronModule,
    ProcessGroupCollection,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_num_layers_to_build,
)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor and the sequence-parallel mark that Megatron-core expects.

    Under sequence parallel each rank normalises its part of the sequence, so the weight's gradient is a partial sum;
    the mark makes `finalize_model_grads` add the parts.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention by torch's scaled_dot_product_attention; KV heads are shared, not repeated.

    Batches are padded on the right: a real token never sees padding behind it, so no mask is needed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._scale = softmax_scale  # None is 1/sqrt(head_dim), the default of the kernel too

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, heads, dim], key and value [s, b, groups, dim] -> [s, b, heads * dim]."""
        query_heads, kv_heads = query.size(2), key.size(2)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, s, dim]
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self._dropout if self.training else 0.0,
            is_causal=True,
            scale=self._scale,
            enable_gqa=query_heads != kv_heads,
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def decoder_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The decoder layers that this pipeline stage (and virtual stage) builds."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
