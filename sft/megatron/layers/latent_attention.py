"""Multi-head latent attention (arXiv:2405.04434): keys and values of all heads are made of one small vector a token.

linear_down makes the latents, of queries too where these have one, and the part of the keys that is rotated, which is
one for all heads. It is whole on every tensor parallel rank: with sequence parallel each rank makes and norms the
latents of its part of the sequence, and what the ranks then gather are latents and not hidden states. linear_q and
linear_kv make this rank's heads of them.

Heads of queries and values have different sizes, which neither the kernels nor the gathering of shared rows take: the
smaller ones are filled up with zeros, which add nothing to a score and to nothing but columns that are cut off.

Rejected: Megatron-core's own (MLASelfAttention). Its frequencies and its softmax scale come from formulas in a shared
configuration, which cannot say all that a model's config can, and packed and shared rows are rotated by segments of its
own. Rejected as well, for now: a cache of latents. Answers in training are short, and heads are what the core takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels.fp8 import WithRows, unquantized
from sft.kernels.rope import of_tokens, rotate
from sft.megatron.core import (
    AttnMaskType,
    MegatronModule,
    ModuleSpec,
    ProcessGroupCollection,
    StaticInferenceContext,
    TransformerConfig,
    tensor_parallel,
)
from sft.megatron.layers.attention import Norm
from sft.megatron.layers.earlier_keys import with_earlier
from sft.megatron.layers.linears import Linears
from sft.megatron.layers.packed_rows import PackedSequences
from sft.megatron.parallel.documents import Rows
from sft.models.architecture import Attention

_EPSILON = 1e-6
"""Of the norms of latents: transformers gives them this one, whatever the model's others have."""


class LatentSelfAttention(MegatronModule):  # type: ignore[misc]
    """Latent attention of one layer."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        attention: Attention,
        angles: slice,
        magnitude: float,
        linears: Linears,
        norm: Norm,
        core: ModuleSpec,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        sizes = attention.latent
        assert sizes is not None
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self._sizes = sizes
        self._angles = angles
        """This layer's columns of the table of angles, which has those of every kind of layer."""
        self._magnitude = magnitude
        self._heads = config.num_attention_heads // self.tp_group.size()
        self._recomputed = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        hidden, heads = config.hidden_size, config.num_attention_heads
        whole = {"config": config, "bias": attention.qkv_bias, "tp_group": self.tp_group}
        self.linear_down = linears.whole(hidden, sizes.normed + sizes.rotary_dim, **whole)
        self.q_norm = None if sizes.query_rank is None else norm(config, sizes.query_rank, _EPSILON)
        self.kv_norm = norm(config, sizes.key_rank, _EPSILON)
        split = {"config": config, "init_method": config.init_method, "skip_bias_add": False, "tp_group": self.tp_group}
        up = {**split, "bias": False, "gather_output": False}
        self.linear_q = linears.column(sizes.query_rank or hidden, heads * sizes.query_dim, **up)
        self.linear_kv = linears.column(sizes.key_rank, heads * (sizes.plain_dim + sizes.value_dim), **up)
        self.core_attention = core.module(config, layer_number, AttnMaskType.causal, "self", **core.params)
        self.linear_proj = linears.row(
            heads * sizes.value_dim, hidden, **split, bias=attention.output_bias, input_is_parallel=True
        )

    def forward(
        self,
        hidden_states: Tensor | WithRows,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: Rows | None = None,
        inference_context: StaticInferenceContext | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, [s, b, h], and no bias, for hidden states of that shape."""
        begin = 0 if inference_context is None else inference_context.sequence_len_offset
        packed = packed_seq_params
        positions = packed.positions if isinstance(packed, PackedSequences) else None
        query, key, value = self._projected(
            unquantized(hidden_states), rotary_pos_emb[begin:, 0, 0, self._angles], positions
        )
        if inference_context is not None:
            key, value = with_earlier(key, value, inference_context, self.layer_number)
        rows = query.shape[:2]
        if isinstance(packed, PackedSequences):
            query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
        context = self._context(query, key, value, packed).reshape(*rows, self._heads, -1)
        output: tuple[Tensor, Tensor | None] = self.linear_proj(context[..., : self._sizes.value_dim].flatten(2))
        return output

    def _projected(
        self, hidden_states: Tensor, angles: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, [s, b, heads, size of the core's heads].

        `angles` are [positions, pairs]; `positions` are those of the tokens, [s], or None where they lie in order.
        """
        sizes = self._sizes
        latents, _ = self.linear_down(hidden_states)
        of_queries, of_keys, turned = torch.split(
            latents, [sizes.query_rank or 0, sizes.key_rank, sizes.rotary_dim], dim=-1
        )
        query, _ = self.linear_q(hidden_states if self.q_norm is None else self.q_norm(of_queries))
        made, _ = self.linear_kv(self.kv_norm(of_keys))
        query = query.unflatten(-1, (self._heads, -1))
        plain, value = made.unflatten(-1, (self._heads, -1)).split([sizes.plain_dim, sizes.value_dim], dim=-1)
        tables = (angles.cos() * self._magnitude, angles.sin() * self._magnitude)
        # Rounded to the activations' type before the products, as transformers does.
        cos, sin = (of_tokens(table, positions, *query.shape[:2]).to(query.dtype) for table in tables)
        turned = rotate(self._of_all_tokens(turned).unsqueeze(2), cos, sin)
        unturned, of_query = query.split([sizes.plain_dim, sizes.rotary_dim], dim=-1)
        query = torch.cat([unturned, rotate(of_query, cos, sin)], dim=-1)
        key = torch.cat([plain, turned.expand(-1, -1, self._heads, -1)], dim=-1)
        return self._filled(query), self._filled(key), self._filled(value)

    def _filled(self, heads: Tensor) -> Tensor:
        """Return heads with zeros behind them, up to the size of the core's."""
        missing = self._sizes.core_dim - heads.size(-1)
        return F.pad(heads, (0, missing)) if missing else heads

    def _of_all_tokens(self, turned: Tensor) -> Tensor:
        """Return the part of the keys that all heads share, [s, b, dim]. Its gradient is the sum over ranks' heads."""
        if self.config.sequence_parallel:
            whole: Tensor = tensor_parallel.gather_from_sequence_parallel_region(turned, group=self.tp_group)
            return whole
        copied: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(turned, group=self.tp_group)
        return copied

    def _context(self, query: Tensor, key: Tensor, value: Tensor, rows: Rows | None) -> Tensor:
        def attend(*heads: Tensor) -> Tensor:
            context: Tensor = self.core_attention(*heads, None, packed_seq_params=rows)
            return context

        if self._recomputed and self.training:
            again: Tensor = tensor_parallel.checkpoint(attend, False, query, key, value)
            return again
        return attend(query, key, value)
