"""Self-attention with RoPE by the architecture's own numbers, layer by layer.

Megatron-core's own has one RoPE for all layers, whose magnitude comes from a formula in the shared configuration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sft.kernels.fp8 import WithRows
from sft.kernels.rope import of_tokens, rotate
from sft.megatron.core import SelfAttention, StaticInferenceContext, TransformerConfig
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
        *args: object,
        rotary: bool,
        angles: slice,
        magnitude: float = 1.0,
        query_scale: QueryScale | None = None,
        width_norms: tuple[Norm, Norm] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
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
            key, value = self._with_earlier(key, value, inference_context)
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
        if not self.config.attention_output_gate:
            return *self.get_query_key_value_tensors(hidden_states), None
        query, key, value, gate = self.get_query_key_value_tensors(hidden_states, output_gate=True)
        heads = query.size(2)
        if gate.size(2) != heads:  # more ranks than KV heads: Megatron-core gives this rank its queries, but all gates
            rank = self.pg_collection.tp.rank() % (gate.size(2) // heads)
            gate = gate[:, :, rank * heads : (rank + 1) * heads]
        return query, key, value, gate

    def _with_earlier(self, key: Tensor, value: Tensor, context: StaticInferenceContext) -> tuple[Tensor, Tensor]:
        """Put keys and values of new positions into the cache, and return those of all positions so far."""
        memory = context.key_value_memory_dict
        if self.layer_number not in memory:
            size = (context.max_sequence_length, *key.shape[1:])
            memory[self.layer_number] = key.new_empty(size), value.new_empty(size)
        begin = context.sequence_len_offset
        end = begin + key.shape[0]
        keys, values = memory[self.layer_number]
        keys[begin:end], values[begin:end] = key, value
        return keys[:end], values[:end]
