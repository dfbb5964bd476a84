"""Our modules in Megatron-core's layer spec: RMSNorm and core attention in plain torch.

The same modules run on CPU and GPU and need neither Transformer Engine nor Apex. Megatron-core's own local modules
do not do: its torch norm refuses sequence parallel, and its core attention builds the whole score matrix.
Column- and row-parallel linears, MLP and residual handling stay Megatron-core's.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.data.batches.context_slice import ContextSlice
from sft.kernels import attention
from sft.megatron.core import (
    MegatronModule,
    PackedSeqParams,
    ProcessGroupCollection,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_num_layers_to_build,
    tensor_parallel,
)
from sft.megatron.parallel.context import SharedRows, bottom_right, gather_rows


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor and the sequence-parallel mark that Megatron-core expects.

    Under sequence parallel each rank normalises its part of the sequence, so the weight's gradient is a partial sum;
    the mark makes `finalize_model_grads` add the parts.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Where the sequences of a packed row lie, for RoPE and attention of every layer."""

    seq_lengths: tuple[int, ...] = ()
    """The same on the host."""
    positions: Tensor | None = None
    """Place of each token in its own sequence, [t]."""


def packed_sequences(
    cu_seqlens: Tensor | None, seq_lengths: tuple[int, ...] | None, positions: Tensor | None = None
) -> PackedSequences | None:
    """What the layers must know of a packed row; None for rows of one sequence each.

    Megatron-core's RoPE reads the offsets as Python numbers in every layer, and prefers the `padded` ones: they are
    kept on the host, where that makes nobody wait. No sequence is padded by itself, so that both are the same. Its
    positions start anew at each offset as long as max_seqlen is shorter than the row, which holds here wherever there
    is more than one sequence.
    """
    if cu_seqlens is None or seq_lengths is None:
        return None
    on_host = torch.tensor([0, *itertools.accumulate(seq_lengths)], dtype=torch.int32)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=on_host,
        cu_seqlens_kv_padded=on_host,
        max_seqlen_q=max(seq_lengths),
        max_seqlen_kv=max(seq_lengths),
        seq_lengths=seq_lengths,
        positions=positions,
    )


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention by torch's own kernels; KV heads are shared, not repeated.

    A row of one sequence is padded on the right: a real token never sees padding behind it, so no mask is needed.

    A packed row goes through `varlen_attn`, which knows CUDA and half precision without dropout; everything else
    takes its sequences one by one. Either way nothing is computed between sequences. Rejected: a block-diagonal mask
    over the row, whose memory and time grow with the square of the row and not of its sequences.

    Of rows that a context parallel group shares, the queries of each slice see the keys of the whole row before them;
    rows of one sequence take the same way there as packed ones.
    """

    _kernel: attention.Kernel = "flash2"

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
        self._scale = softmax_scale  # None is 1/sqrt(head_dim), the default of the kernels too

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | SharedRows | None = None,
    ) -> Tensor:
        """query [s, b, heads, dim], key and value [s, b, groups, dim] -> [s, b, heads * dim]; packed without b."""
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
        """Whether a kernel for many sequences does: they know half precision without dropout."""
        half = query.dtype in (torch.bfloat16, torch.float16)
        return query.is_cuda and half and not (self.training and self._dropout)

    def _shared(self, query: Tensor, key: Tensor, value: Tensor, slices: tuple[ContextSlice, ...]) -> Tensor:
        """[s, b, heads, dim] of this rank's slices -> the same."""
        key, value = gather_rows(key, value)
        parts = []
        for part, queries in zip(slices, query.chunk(len(slices)), strict=True):
            seen = slice(part.first_key, part.end)
            parts.append(self._of_slice(queries, key[seen], value[seen], part))
        return torch.cat(parts)

    def _of_slice(self, query: Tensor, key: Tensor, value: Tensor, part: ContextSlice) -> Tensor:
        """[s, b, heads, dim] of one slice, and all keys that it sees -> the same."""
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
        """Where dropout is drawn: each tensor parallel rank has other heads, which need masks of their own.

        With sequence parallel the whole decoder draws from that stream already. To fork it once more would start it
        anew in a recomputed layer, which then drew other masks than the first time.
        """
        if not (self.training and self._dropout) or self.config.sequence_parallel:
            return nullcontext()
        stream: AbstractContextManager[None] = tensor_parallel.get_cuda_rng_tracker().fork()
        return stream

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[..., heads, s, dim] -> the same. Fewer queries than keys are the last of their positions."""
        queries, keys = query.size(-2), key.size(-2)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            # is_causal would put the first query beside the first key
            attn_mask=None if queries == keys else bottom_right(queries, keys, query.device),
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
