"""Self-attention: RoPE by the architecture's own numbers, and core attention in plain torch.

The same modules run on CPU and GPU and need neither Transformer Engine nor Apex. Megatron-core's own do not do: its
core attention builds the whole score matrix, and its self-attention has one RoPE for all layers, whose magnitude comes
from a formula in the shared configuration.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.data.batches.context_slice import ContextSlice
from sft.kernels import attention
from sft.kernels.fp8 import WithRows
from sft.kernels.rope import rotate
from sft.megatron.core import (
    MegatronModule,
    ProcessGroupCollection,
    SelfAttention,
    StaticInferenceContext,
    TransformerConfig,
    tensor_parallel,
)
from sft.megatron.layers.packed_rows import PackedSequences
from sft.megatron.layers.query_scale import scaled_by_position
from sft.megatron.parallel.context import SharedRows, bottom_right, gather_rows
from sft.models.architecture import QueryScale


class RotarySelfAttention(SelfAttention):  # type: ignore[misc]
    """Megatron-core's self-attention with a forward pass of our own.

    Every layer says whether it rotates. Tokens of packed rows find their angles by position: the table then has as many
    rows as the longest sequence has tokens, and not as many as the packed row.
    """

    def __init__(
        self,
        *args: object,
        rotary: bool,
        magnitude: float = 1.0,
        query_scale: QueryScale | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._rotary = rotary
        self._magnitude = magnitude
        self._query_scale = query_scale

    def forward(
        self,
        hidden_states: Tensor | WithRows,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSequences | SharedRows | None = None,
        inference_context: StaticInferenceContext | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, [s, b, h], and the bias of the output projection, for hidden states of that shape."""
        begin = 0 if inference_context is None else inference_context.sequence_len_offset
        # Megatron-core's table repeats the angles for both halves of a head.
        angles = None if rotary_pos_emb is None else rotary_pos_emb[begin:, 0, 0, : rotary_pos_emb.shape[-1] // 2]
        packed = packed_seq_params
        # The angles of shared rows are those of their tokens already, one after the other (`SFTGPTModel`).
        positions = packed.positions if isinstance(packed, PackedSequences) else None
        query, key, value = self._heads(hidden_states, angles, positions)
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
        output: tuple[Tensor, Tensor | None] = self.linear_proj(
            context.reshape(context.shape[0], -1, context.shape[-1])
        )
        return output

    def _heads(
        self, hidden_states: Tensor | WithRows, angles: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, [s, b, heads, dim], rotated where this layer does.

        `angles` are [positions, pairs]; `positions` are those of the tokens, [s], or None where they lie in order.
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if angles is None or not self._rotary:
            return query, key, value
        # Rounded to the activations' type before the products, as transformers and Megatron-core do.
        cos, sin = self._tables(angles, positions, query.shape[0])
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def _tables(self, angles: Tensor, positions: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of the tokens, [s, 1, 1, pairs], times the magnitude."""
        rows = slice(length) if positions is None else positions
        cos, sin = (table[rows, None, None] * self._magnitude for table in (angles.cos(), angles.sin()))
        return cos, sin

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


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention by torch's own kernels; KV heads are shared, not repeated.

    A row of one sequence is padded on the right: a real token never sees the padding after it, so no mask is needed.

    A packed row goes through `varlen_attn`, which needs CUDA and half precision and has no dropout; in all other cases
    its sequences are computed one by one. Either way nothing is computed between sequences. Rejected: a block-diagonal
    mask over the row, whose memory and time grow with the square of the row and not of its sequences.

    Where a context parallel group shares rows, the queries of each slice see the keys of the whole row before them;
    rows of one sequence are treated like packed ones there.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        scale: float | None = None,
        kernel: attention.Kernel = "flash2",
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # softmax_scale is what Megatron-core's configuration holds for all layers; `scale` is this layer's own.
        self._kernel = kernel
        self._scale = scale  # None means 1 / sqrt(head_dim), which is the default of the kernels too

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | SharedRows | None = None,
    ) -> Tensor:
        """Return the context, [s, b, heads * dim], of query [s, b, heads, dim] and key and value [s, b, groups, dim].

        Packed rows have no dimension b. Fewer queries than keys are the last of their positions (generation).
        """
        if isinstance(packed_seq_params, SharedRows):
            return self._shared(query, key, value, packed_seq_params.slices).flatten(2)
        if packed_seq_params is None:
            # [b, heads, s, dim]
            with self._own_stream():
                context = self._causal(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
            return context.permute(2, 0, 1, 3).flatten(2)
        if self._has_kernel(query):
            return self._packed_kernel(query, key, value, packed_seq_params).flatten(1)
        lengths = packed_seq_params.seq_lengths
        with self._own_stream():
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            return self._one_by_one(query, key, value, lengths, lengths).flatten(1)

    def _has_kernel(self, query: Tensor) -> bool:
        """Return whether a kernel for many sequences can be used: they need half precision and have no dropout."""
        half = query.dtype in (torch.bfloat16, torch.float16)
        return query.is_cuda and half and not (self.training and self._dropout)

    def _shared(self, query: Tensor, key: Tensor, value: Tensor, slices: tuple[ContextSlice, ...]) -> Tensor:
        """Return the context of this rank's slices, [s, b, heads, dim], from tensors of that shape."""
        key, value = gather_rows(key, value)
        parts = []
        for part, queries in zip(slices, query.chunk(len(slices)), strict=True):
            seen = slice(part.first_key, part.end)
            parts.append(self._of_slice(queries, key[seen], value[seen], part))
        return torch.cat(parts)

    def _of_slice(self, query: Tensor, key: Tensor, value: Tensor, part: ContextSlice) -> Tensor:
        """Return the context of one slice, [s, b, heads, dim], from its queries and all keys that it sees."""
        if not self._has_kernel(query):
            with self._own_stream():
                return self._one_by_one(query, key, value, part.query_lengths, part.key_lengths)
        rows, length = query.size(1), query.size(0)
        queries, keys, values = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
        context = attention.flash(
            queries, keys, values, part.query_offsets, max(part.query_lengths), self._scale, self._kernel,
            key_offsets=part.key_offsets, longest_key=max(part.key_lengths),
        )  # fmt: skip
        return context.view(rows, length, *context.shape[1:]).transpose(0, 1)

    def _own_stream(self) -> AbstractContextManager[None]:
        """Return the random stream of dropout: each tensor parallel rank has other heads, which need other masks.

        With sequence parallel the whole decoder uses that stream already. To fork it once more would restart it in a
        recomputed layer, which would then get other masks than the first time.
        """
        if not (self.training and self._dropout) or self.config.sequence_parallel:
            return nullcontext()
        stream: AbstractContextManager[None] = tensor_parallel.get_cuda_rng_tracker().fork()
        return stream

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the context of query, key and value, each [..., heads, s, dim], in the shape of the query."""
        queries, keys = query.size(-2), key.size(-2)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            # is_causal would align the first query with the first key. A single query is the last and sees all keys.
            attn_mask=None if queries in (1, keys) else bottom_right(queries, keys, query.device),
            dropout_p=self._dropout if self.training else 0.0,
            is_causal=queries == keys,
            scale=self._scale,
            enable_gqa=query.size(-3) != key.size(-3),
        )

    def _packed_kernel(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """[t, heads, dim] -> the same, in one kernel."""
        kernel, options, shares_kv_heads = _packed_attention()
        if self._scale is not None:
            options = {**options, "scale": self._scale}
        if shares_kv_heads:
            options = {**options, "enable_gqa": query.size(1) != key.size(1)}
        else:
            key, value = (tensor.repeat_interleave(query.size(1) // key.size(1), dim=1) for tensor in (key, value))
        offsets, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        context: Tensor = kernel(query, key, value, offsets, offsets, longest, longest, **options)
        return context

    def _one_by_one(
        self, query: Tensor, key: Tensor, value: Tensor, query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]
    ) -> Tensor:
        """[s, b, heads, dim] -> the same, sequence after sequence."""
        lengths = (query_lengths, key_lengths, key_lengths)
        parts = [
            torch.split(tensor.permute(1, 2, 0, 3), list(cut), dim=2)
            for tensor, cut in zip((query, key, value), lengths, strict=True)
        ]
        context = torch.cat([self._causal(*sequence) for sequence in zip(*parts, strict=True)], dim=2)
        return context.permute(2, 0, 1, 3)


@functools.cache
def _packed_attention() -> tuple[Callable[..., Any], dict[str, Any], bool]:
    """torch's kernel for packed sequences, the options that make it causal, and whether it shares KV heads by itself.

    It is young: torch 2.10 says causal by `is_causal`, later ones by a window, and from 2.13 on it shares KV heads.
    """
    from torch.nn.attention.varlen import varlen_attn  # newer than the rest of what we use, and not needed on CPU

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    kernel: Callable[..., Any] = varlen_attn  # a pair only where more than the context is asked for
    return kernel, causal, "enable_gqa" in known
