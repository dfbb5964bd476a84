"""Self-attention with RoPE by the architecture's own numbers, layer by layer.

Megatron-core's own has one RoPE for all layers, whose magnitude comes from a formula in the shared configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.contract.head_sizes import HeadSizes
from sft.kernels.fp8 import WithRows
from sft.kernels.rope import of_tokens, rotate
from sft.megatron.core import (
    SelfAttention,
    SelfAttentionSubmodules,
    StaticInferenceContext,
    TransformerConfig,
    tensor_parallel,
)
from sft.megatron.layers.earlier_keys import with_earlier
from sft.megatron.layers.packed_rows import PackedSequences
from sft.megatron.layers.query_scale import scaled_by_position
from sft.megatron.layers.rotated_norms import norm_rotated
from sft.megatron.parallel.documents import Rows
from sft.models.architecture import QueryScale

Norm = Callable[[TransformerConfig, int, float], nn.Module]
Heads = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Query, key, value, and the gate of the output where there is one."""


class RotarySelfAttention(SelfAttention):  # type: ignore[misc]
    """Megatron-core's self-attention with a forward pass of our own.

    Every layer says whether it rotates. Tokens of packed rows find their angles by position: the table then has as many
    rows as the longest sequence has tokens, and not as many as the packed row.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        *args: object,
        rotary: bool,
        angles: slice,
        magnitude: float = 1.0,
        query_scale: QueryScale | None = None,
        width_norms: tuple[Norm, Norm] | None = None,
        heads: HeadSizes | None = None,
        value_norm: bool = False,
        **kwargs: object,
    ) -> None:
        config = config if heads is None else _with_heads(config, heads)
        super().__init__(config, submodules, *args, **kwargs)
        self._keyed_values = heads is not None and heads.keyed_values
        if self._keyed_values:
            self.linear_qkv = self._queries_and_keys(submodules)
        self._value_norm = value_norm
        if width_norms is not None:
            # Megatron-core 0.18 and later build norms of queries and keys where its `qk_layernorm` says that each rank
            # has them whole, and then add up gradients that are not partial ones.
            of_heads = self.config, self.hidden_size_per_attention_head, self.config.layernorm_epsilon
            self.q_layernorm, self.k_layernorm = (norm(*of_heads) for norm in width_norms)
        self._rotary = rotary
        self._angles = angles
        """This layer's columns of the table of angles, which has those of every kind of layer."""
        self._magnitude = magnitude
        self._query_scale = query_scale

    def forward(
        self,
        hidden_states: Tensor | WithRows,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Rows | None = None,
        inference_context: StaticInferenceContext | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, [s, b, h], and the bias of the output projection, for hidden states of that shape."""
        begin = 0 if inference_context is None else inference_context.sequence_len_offset
        # Megatron-core's table repeats all angles for the second halves of heads, behind those of the first.
        angles = None if rotary_pos_emb is None else rotary_pos_emb[begin:, 0, 0, self._angles]
        packed = packed_seq_params
        # The angles of shared rows are those of their tokens already, one after the other (`SFTGPTModel`).
        positions = packed.positions if isinstance(packed, PackedSequences) else None
        query, key, value, gate = self._heads(hidden_states, angles, positions)
        query, key = norm_rotated(self.q_layernorm, query), norm_rotated(self.k_layernorm, key)
        if self._query_scale is not None:
            own = None if packed is None else packed.positions
            query = scaled_by_position(query, self._query_scale, own, begin)
        if inference_context is not None:
            key, value = with_earlier(key, value, inference_context, self.layer_number)
        if isinstance(packed, PackedSequences):
            query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(
                query, key, value, attention_mask, attn_mask_type=self.attn_mask_type, packed_seq_params=packed
            )
        else:
            context = self.core_attention(query, key, value, attention_mask, packed_seq_params=packed)
        context = context.reshape(context.shape[0], -1, context.shape[-1])
        if gate is not None:
            context = context * torch.sigmoid(gate.flatten(2))
        output: tuple[Tensor, Tensor | None] = self.linear_proj(context)
        return output

    def _heads(self, hidden_states: Tensor | WithRows, angles: Tensor | None, positions: Tensor | None) -> Heads:
        """Return query, key and value, [s, b, heads, dim], rotated where this layer does, and the gate if there is one.

        `angles` are [positions, pairs]; `positions` are those of the tokens, [s], or None where they lie in order.
        """
        query, key, value, gate = self._projected(hidden_states)
        if angles is None or not self._rotary:
            return query, key, value, gate
        # Rounded to the activations' type before the products, as transformers and Megatron-core do.
        tables = (angles.cos() * self._magnitude, angles.sin() * self._magnitude)
        cos, sin = (of_tokens(table, positions, *query.shape[:2]).to(query.dtype) for table in tables)
        return rotate(query, cos, sin), rotate(key, cos, sin), value, gate

    def _projected(self, hidden_states: Tensor | WithRows) -> Heads:
        """Return query, key and value, [s, b, heads, dim], and the gate of the output if there is one."""
        if self._keyed_values or self._value_norm:
            split = self._split_without_values if self._keyed_values else self.get_query_key_value_tensors
            query, key, value = split(hidden_states)
            return query, key, self._normed(value) if self._value_norm else value, None
        if not self.config.attention_output_gate:
            return *self.get_query_key_value_tensors(hidden_states), None
        query, key, value, gate = self.get_query_key_value_tensors(hidden_states, output_gate=True)
        heads = query.size(2)
        if gate.size(2) != heads:  # more ranks than KV heads: Megatron-core gives this rank its queries, but all gates
            rank = self.pg_collection.tp.rank() % (gate.size(2) // heads)
            gate = gate[:, :, rank * heads : (rank + 1) * heads]
        return query, key, value, gate

    def _normed(self, value: Tensor) -> Tensor:
        """Return the norm of each head of values, rounded at the end."""
        return F.rms_norm(value.float(), value.shape[-1:], eps=self.config.layernorm_epsilon).to(value.dtype)

    def _queries_and_keys(self, submodules: SelfAttentionSubmodules) -> nn.Module:
        """Return the projection in place of Megatron-core's, which has rows for values."""
        linear: nn.Module = submodules.linear_qkv(
            self.config.hidden_size,
            self.query_projection_size + self.kv_projection_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=self.config.add_bias_linear or self.config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.pg_collection.tp,
        )
        return linear

    def _split_without_values(self, hidden_states: Tensor | WithRows) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, where the value is the key before its norm.

        More ranks than KV heads have parts of a head's rows: all are gathered, and each takes its queries of them.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        ranks, groups, dim = self.world_size, self.config.num_query_groups, self.hidden_size_per_attention_head
        shared = max(1, ranks // groups)
        rank = self.pg_collection.tp.rank()
        if shared > 1:
            mixed = tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(mixed, self.pg_collection.tp)
            mixed = mixed.chunk(groups, dim=-1)[rank // shared]
        by_group = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1, dim))
        query, key = by_group[..., :-1, :].flatten(2, 3), by_group[..., -1, :]
        if shared > 1:
            query = query.chunk(shared, dim=2)[rank % shared]
        normed = key if self.k_layernorm is None else self.k_layernorm(key)
        return query if self.q_layernorm is None else self.q_layernorm(query), normed, key


def _with_heads(config: TransformerConfig, heads: HeadSizes) -> TransformerConfig:
    """Return the configuration of a layer with these heads: Megatron-core's has one size for all layers."""
    own = copy.copy(config)
    own.kv_channels, own.num_query_groups = heads.head_dim, heads.query_groups
    return own
