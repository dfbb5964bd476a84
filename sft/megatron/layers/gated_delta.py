"""A gated delta net in place of self-attention: the linear attention of Qwen3-Next and Qwen3.5.

The projection's rows lie by key head, as those of linear_qkv lie by KV group: its query, its key, the values that it
serves, their gates, and two numbers for each of these value heads. So tensor parallel ranks hold whole heads, a rank's
part of a checkpoint is one range of rows, and ranks that share rows can exchange tokens for heads.

Documents do not meet: state and convolution begin anew with each. Ranks that share rows compute whole rows of some of
the heads each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.contract.linear_attention import LinearAttention
from sft.kernels.fp8 import WithRows
from sft.kernels.gated_delta import Documents, Kernel, documents_of, gated_convolution, gated_delta_rule
from sft.megatron.core import (
    MegatronModule,
    ProcessGroupCollection,
    StaticInferenceContext,
    TransformerConfig,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
    sharded_state_dict_default,
    tensor_parallel,
)
from sft.megatron.layers.linears import Linears
from sft.megatron.layers.packed_rows import PackedSequences
from sft.megatron.parallel.context import SharedRows
from sft.megatron.parallel.documents import Rows
from sft.megatron.parallel.heads import to_all_heads, to_whole_rows

_ALL = slice(None)


class GatedDeltaNet(MegatronModule):  # type: ignore[misc]
    """Linear attention of one layer."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        sizes: LinearAttention,
        linears: Linears,
        kernel: Kernel,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self._sizes = sizes
        self._kernel = kernel
        self._served = sizes.value_heads // sizes.key_heads
        self._recomputed = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        common = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False}
        common["tp_group"] = self.tp_group
        self.in_proj = linears.column(config.hidden_size, sizes.projected, gather_output=False, **common)
        self.out_proj = linears.row(sizes.values, config.hidden_size, input_is_parallel=True, **common)
        ranks = self.tp_group.size()
        self.conv = _Convolution(sizes, config.params_dtype, ranks, kernel)
        self.norm = _GatedNorm(sizes.value_dim, config, self.tp_group)
        self.A_log, self.dt_bias = (_split(sizes.value_heads // ranks, dtype=config.params_dtype) for _ in range(2))

    def forward(
        self,
        hidden_states: Tensor | WithRows,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Rows | None = None,
        inference_context: StaticInferenceContext | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, [s, b, h], and no bias, for hidden states of that shape."""
        mixed, _ = self.in_proj(hidden_states)
        if inference_context is not None:
            context = self._continued(mixed, inference_context)
        elif self._recomputed and self.training:
            context = tensor_parallel.checkpoint(partial(self._context, rows=packed_seq_params), False, mixed)
        else:
            context = self._context(mixed, packed_seq_params)
        output: tuple[Tensor, Tensor | None] = self.out_proj(context)
        return output

    def _context(self, mixed: Tensor, rows: Rows | None) -> Tensor:
        """Return the gated outputs of this rank's heads, [s, b, heads * dim], from the projection, [s, b, ...]."""
        inputs, gate, beta, decay = self._parts(mixed)
        if isinstance(rows, SharedRows):
            output = self._of_whole_rows(inputs, beta, decay, rows)
        else:
            lengths = rows.seq_lengths if isinstance(rows, PackedSequences) else (len(mixed),) * mixed.size(1)
            documents = documents_of(lengths, mixed.device)
            output, _ = self._rule(self.conv(inputs, documents), beta, decay, documents)
        gated: Tensor = self.norm(output, gate)
        return gated

    def _of_whole_rows(self, inputs: Tensor, beta: Tensor, decay: Tensor, rows: SharedRows) -> Tensor:
        """Return the outputs of all heads of a part of the rows: each rank computes whole rows of some heads."""
        group, heads = parallel_state.get_context_parallel_group(), inputs.size(2)
        widths = [part.size(-1) for part in (inputs, beta, decay)]
        whole = to_whole_rows(torch.cat([inputs, beta, decay], dim=-1), group)
        inputs, beta, decay = torch.split(whole, widths, dim=-1)
        own = slice(group.rank() * inputs.size(2), (group.rank() + 1) * inputs.size(2))
        lengths = rows.seq_lengths or (len(inputs),) * inputs.size(1)
        documents = documents_of(lengths, inputs.device)
        output, _ = self._rule(self.conv(inputs, documents, own, heads), beta, decay, documents, own=own)
        return to_all_heads(output, group)

    def _continued(self, mixed: Tensor, context: StaticInferenceContext) -> Tensor:
        """Return what `_context` does for tokens behind those that the context has seen, and let it see these."""
        inputs, gate, beta, decay = self._parts(mixed)
        length, rows = mixed.shape[:2]
        memory, earlier = context.key_value_memory_dict, self._sizes.kernel - 1
        if context.sequence_len_offset == 0:
            memory[self.layer_number] = inputs.new_zeros(earlier, *inputs.shape[1:]), None
        tail, state = memory[self.layer_number]
        inputs = torch.cat([tail, inputs])
        convolved = self.conv(inputs, documents_of((len(inputs),) * rows, mixed.device))[earlier:]
        output, state = self._rule(convolved, beta, decay, documents_of((length,) * rows, mixed.device), state=state)
        memory[self.layer_number] = inputs[-earlier:], state
        gated: Tensor = self.norm(output, gate)
        return gated

    def _parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what is convolved, and gates, betas and decays of the values, each [s, b, key heads, ...]."""
        sizes, served = self._sizes, self._served
        values = served * sizes.value_dim
        by_head = mixed.view(*mixed.shape[:2], sizes.key_heads // self.tp_group.size(), -1)
        inputs, gate, beta, decay = torch.split(by_head, [2 * sizes.key_dim + values, values, served, served], dim=-1)
        return inputs, gate, beta, decay

    def _rule(
        self,
        convolved: Tensor,
        beta: Tensor,
        decay: Tensor,
        documents: Documents,
        *,
        own: slice = _ALL,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs, [s, b, key heads, values], and the last states of documents, from [s, b, key heads, ...].

        `own` says which of this rank's key heads these are.
        """
        sizes, served = self._sizes, self._served
        widths = [sizes.key_dim, sizes.key_dim, served * sizes.value_dim]
        query, key, value = (_one_by_one(part) for part in torch.split(convolved, widths, dim=-1))
        log_speed, bias = (vector.view(-1, served)[own].float() for vector in (self.A_log, self.dt_bias))
        decay = -log_speed.exp() * F.softplus(decay.float() + bias)
        output, last = gated_delta_rule(
            query,
            key,
            value.reshape(len(value), -1, sizes.value_dim),
            _one_by_one(decay).flatten(1),
            _one_by_one(beta.float().sigmoid()).flatten(1),
            documents,
            state,
            kernel=self._kernel,
        )
        return _as_rows(output.reshape(value.shape), convolved.size(1)), last

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: Mapping[str, object] | None = None,
    ) -> dict[str, object]:
        """Return the weights for a sharded checkpoint."""
        assert metadata is not None  # it names the group that holds copies
        own = {name: value for name, value in self.state_dict(keep_vars=True).items() if "_proj." not in name}
        state: dict[str, object] = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {"conv.weight": 0, "A_log": 0, "dt_bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, linear in (("in_proj", self.in_proj), ("out_proj", self.out_proj)):
            state |= sharded_state_dict_default(linear, f"{prefix}{name}.", sharded_offsets, metadata)
        return state


class _Convolution(nn.Module):
    """The causal convolution of queries, keys and values, channel by channel, with silu behind it."""

    def __init__(self, sizes: LinearAttention, dtype: torch.dtype, ranks: int, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel
        self.weight = _split(sizes.convolved // ranks, sizes.kernel, dtype=dtype)

    def forward(self, inputs: Tensor, documents: Documents, own: slice = _ALL, heads: int | None = None) -> Tensor:
        """Return the convolved inputs, [s, b, key heads, ...]. `own` says which of the rank's `heads` these are."""
        taps = self.weight.view(heads or inputs.size(2), -1, self.weight.size(1))[own].flatten(0, 1)
        rows = _one_by_one(inputs)
        convolved = gated_convolution(rows.flatten(1), taps, documents, kernel=self._kernel)
        return _as_rows(convolved.view(rows.shape), inputs.size(1))


class _GatedNorm(nn.Module):
    """RMSNorm of each value head, times silu of its gate; in fp32, and rounded at the end."""

    def __init__(self, width: int, config: TransformerConfig, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self._epsilon: float = config.layernorm_epsilon
        self._group = group
        self.weight = nn.Parameter(torch.ones(width, dtype=config.params_dtype))

    def forward(self, output: Tensor, gate: Tensor) -> Tensor:
        """Return [s, b, heads * dim] from outputs and gates, both [s, b, key heads, values]."""
        # Each rank norms its own heads. The sum over ranks of the gradients that these give to the one weight is taken
        # here: Megatron-core takes it for norms of parts of the sequence and of queries and keys alone.
        weight = tensor_parallel.copy_to_tensor_model_parallel_region(self.weight.float(), group=self._group)
        heads = output.float().reshape(*output.shape[:3], -1, len(weight))
        normed = F.rms_norm(heads, weight.shape, weight, self._epsilon).flatten(-2) * F.silu(gate.float())
        return normed.to(output.dtype).flatten(2)


def _split(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Return a parameter whose first axis tensor parallel ranks share."""
    parameter = nn.Parameter(torch.empty(*shape, dtype=dtype))
    tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter


def _one_by_one(rows: Tensor) -> Tensor:
    """Return rows [s, b, ...] as tokens [b * s, ...]: those of the first row, then those of the next one."""
    return rows.transpose(0, 1).flatten(0, 1)


def _as_rows(tokens: Tensor, count: int) -> Tensor:
    """Return tokens [count * s, ...] as rows [s, count, ...]: the reverse of `_one_by_one`."""
    return tokens.view(count, -1, *tokens.shape[1:]).transpose(0, 1)
