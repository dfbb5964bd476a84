"""Core attention in plain torch and by torch's own kernels: causal, in windows, with capped scores or sinks.

The same module runs on CPU and GPU and needs neither Transformer Engine nor Apex. Megatron-core's own builds the whole
score matrix.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.contract.head_sizes import LARGEST_FLASH_HEAD
from sft.data.batches.context_slice import ContextSlice
from sft.kernels import attention
from sft.kernels.masked_attention import attention_in_blocks, causal_mask, last_keys
from sft.megatron.core import (
    MegatronModule,
    ProcessGroupCollection,
    TransformerConfig,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
    tensor_parallel,
)
from sft.megatron.layers.packed_rows import PackedSequences
from sft.megatron.parallel.context import SharedRows, gather_rows
from sft.megatron.parallel.documents import Rows


class _Special(TypedDict):
    sinks: Tensor | None
    softcap: float | None


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention by torch's own kernels; KV heads are shared, not repeated.

    A row of one sequence is padded on the right: a real token never sees the padding after it, so no mask is needed.

    Packed rows go through kernels for many sequences, which need CUDA and half precision and have no dropout; so do
    rows that are longer than the layer's window. In all other cases sequences are computed one by one. Either way
    nothing is computed between sequences. Rejected: a block-diagonal mask over the row, whose memory and time grow with
    the square of the row and not of its sequences.

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
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        kernel: attention.Kernel = "flash2",
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # softmax_scale is what Megatron-core's configuration holds for all layers; `scale` is this layer's own.
        self._kernel = kernel
        self._scale = scale  # None means 1 / sqrt(head_dim), which is the default of the kernels too
        self._window = window
        self._softcap = softcap
        self.sinks: torch.nn.Parameter | None
        self.register_parameter("sinks", _sinks(config) if sinks else None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Rows | None = None,
    ) -> Tensor:
        """Return the context, [s, b, heads * dim], of query [s, b, heads, dim] and key and value [s, b, groups, dim].

        Packed rows have no dimension b. Fewer queries than keys are the last of their positions (generation).
        """
        if isinstance(packed_seq_params, SharedRows):
            return self._shared(query, key, value, packed_seq_params.slices).flatten(2)
        if not isinstance(packed_seq_params, PackedSequences):
            return self._rows(query, key, value).flatten(2)
        if self._has_kernel(query):
            return self._packed_kernel(query, key, value, packed_seq_params).flatten(1)
        lengths = packed_seq_params.seq_lengths
        with self._own_stream():
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            return self._one_by_one(query, key, value, lengths, lengths).flatten(1)

    @property
    def _special(self) -> _Special:
        """What kernels are told of this layer's softmax."""
        return {"sinks": self.sinks, "softcap": self._softcap}

    def _has_kernel(self, query: Tensor) -> bool:
        """Return whether a kernel for many sequences can be used: they need half precision and have no dropout.

        Nor do they take any size of heads.
        """
        half = query.dtype in (torch.bfloat16, torch.float16) and query.size(-1) <= LARGEST_FLASH_HEAD
        capped = self._softcap is not None and self._kernel != "flash4"
        return query.is_cuda and half and not (self.training and self._dropout) and not capped

    def _rows(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the context of rows of one sequence each, [s, b, heads, dim], from tensors of that shape."""
        windowed = self._window is not None and self._window < len(key)
        special = windowed or self.sinks is not None or self._softcap is not None
        if special and len(query) > 1 and self._has_kernel(query):
            return self._rows_by_offsets(query, key, value)
        # [b, heads, s, dim]
        with self._own_stream():
            context = self._causal(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
        return context.permute(2, 0, 1, 3)

    def _rows_by_offsets(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return what `_rows` does, by a kernel for many sequences: no other has windows, caps, or gives sums."""
        rows = query.size(1)
        offsets, key_offsets = (
            torch.arange(rows + 1, dtype=torch.int32, device=query.device) * len(tensor) for tensor in (query, key)
        )
        queries, keys, values = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
        context = attention.flash(
            queries, keys, values, offsets, len(query), self._scale, self._kernel,
            window=self._window, key_offsets=key_offsets, longest_key=len(key), **self._special,
        )  # fmt: skip
        return context.view(rows, len(query), *context.shape[1:]).transpose(0, 1)

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
            window=self._window, key_offsets=part.key_offsets, longest_key=max(part.key_lengths), **self._special,
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
        dropout = self._dropout if self.training else 0.0
        if self._softcap is not None or self.sinks is not None:
            return attention_in_blocks(
                query, key, value,
                cap=self._softcap, sinks=self.sinks, window=self._window, scale=self._scale, dropout=dropout,
            )  # fmt: skip
        key, value = (last_keys(tensor, query.size(-2), self._window) for tensor in (key, value))
        if query.is_cuda and query.size(-1) > LARGEST_FLASH_HEAD:
            # The one kernel without a matrix of scores that takes such heads shares no KV heads: with heads of 512 it
            # took 41 ms and 1.4 GiB on an H200, with its copies, where 4,096 scores a token took 77 ms and 9.2 GiB.
            key, value = (tensor.repeat_interleave(query.size(-3) // key.size(-3), dim=-3) for tensor in (key, value))
        queries, keys = query.size(-2), key.size(-2)
        # is_causal would align the first query with the first key. A single query is the last and sees all keys.
        aligned = queries == keys and (self._window is None or keys <= self._window)
        mask = None if aligned or queries == 1 else causal_mask(queries, keys, self._window, query.device)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=aligned,
            scale=self._scale,
            enable_gqa=query.size(-3) != key.size(-3),
        )

    def _packed_kernel(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Return the context of a packed row, [t, heads, dim], by one kernel. key and value [t, groups, dim]."""
        offsets, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        window = self._window if self._window is not None and self._window < longest else None
        if window is not None or self.sinks is not None:
            return attention.flash(query, key, value, offsets, longest, self._scale, window=window, sinks=self.sinks)
        kernel, options, shares_kv_heads = _packed_attention()
        if self._scale is not None:
            options = {**options, "scale": self._scale}
        if shares_kv_heads:
            options = {**options, "enable_gqa": query.size(1) != key.size(1)}
        else:
            key, value = (tensor.repeat_interleave(query.size(1) // key.size(1), dim=1) for tensor in (key, value))
        context: Tensor = kernel(query, key, value, offsets, offsets, longest, longest, **options)
        return context

    def _one_by_one(
        self, query: Tensor, key: Tensor, value: Tensor, query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]
    ) -> Tensor:
        """Return the context, [s, b, heads, dim], computed one sequence after the other, from tensors of that form."""
        lengths = (query_lengths, key_lengths, key_lengths)
        parts = [
            torch.split(tensor.permute(1, 2, 0, 3), list(cut), dim=2)
            for tensor, cut in zip((query, key, value), lengths, strict=True)
        ]
        context = torch.cat([self._causal(*sequence) for sequence in zip(*parts, strict=True)], dim=2)
        return context.permute(2, 0, 1, 3)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the sinks as a sharded checkpoint has them, split by heads."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"sinks": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return state


def _sinks(config: TransformerConfig) -> torch.nn.Parameter:
    """Return the sinks of this rank's heads."""
    heads = config.num_attention_heads // parallel_state.get_tensor_model_parallel_world_size()
    sinks = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
    tensor_parallel.set_tensor_model_parallel_attributes(sinks, True, 0, 1)
    return sinks


@functools.cache
def _packed_attention() -> tuple[Callable[..., Any], dict[str, Any], bool]:
    """Return torch's kernel for packed sequences, the options that make it causal, and whether it shares KV heads.

    It is young: in torch 2.10 `is_causal` makes it causal, in later versions a window, and from 2.13 on it takes fewer
    KV heads than query heads.
    """
    from torch.nn.attention.varlen import varlen_attn  # newer than the rest of what we use, and not needed on CPU

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    kernel: Callable[..., Any] = varlen_attn  # a pair only where more than the context is asked for
    return kernel, causal, "enable_gqa" in known
