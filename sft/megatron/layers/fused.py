"""Decoder layers whose small operations are fused (sft.kernels), in place of Megatron-core's own forward passes.

Parameters, their names, and the linears (with tensor and sequence parallelism, and adapters) stay Megatron-core's, so
that checkpoints and everything else do not know the difference. On a CPU the same modules compute with torch's own
operations, which is how their wiring is compared with the plain layers under every topology.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sft.kernels import attention, norm
from sft.kernels.adapted import adapted_gated_mlp
from sft.kernels.fp8 import WithRows, unquantized
from sft.kernels.gated import Gate, gated
from sft.kernels.linear import gated_mlp
from sft.kernels.rope import rotate_heads, split_and_rotate
from sft.megatron.core import MLP, IdentityOp, TransformerConfig, TransformerLayer, tensor_parallel
from sft.megatron.layers.attention import Heads, RotarySelfAttention
from sft.megatron.layers.core_attention import CoreAttention
from sft.megatron.layers.fp8 import Fp8ColumnParallelLinear, fp8_gradients
from sft.megatron.layers.lora import AdaptedColumn
from sft.megatron.layers.norms import RMSNorm
from sft.megatron.layers.packed_rows import PackedSequences
from sft.megatron.layers.rotated_norms import AfterRotation
from sft.megatron.layers.weights_in_use import await_weights

_LINEARS_ALONE = (tensor_parallel.ColumnParallelLinear, Fp8ColumnParallelLinear)
_DENSE_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,  # 1.5 times as fast as FlashAttention-2 on an H200
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class FusedRMSNorm(RMSNorm):
    """RMSNorm that also carries the residual stream."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        in_fp8: Literal["always", "in_training", "never"] = "never",
        **others: object,
    ) -> None:
        super().__init__(config, hidden_size, eps, **others)
        # With sequence parallel the output is gathered before the product, in bf16: rows in fp8 would be made in vain.
        self._when_in_fp8 = "never" if config.sequence_parallel else in_fp8
        self._centered: bool = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm over the last dimension."""
        return norm.rms_norm(x, self.weight, self._epsilon, centered=self._centered)

    def fork(self, x: Tensor) -> tuple[Tensor | WithRows, Tensor]:
        """Return (norm of x, x)."""
        await_weights(self)  # the layer calls this method and not the module
        return norm.fork(x, self.weight, self._epsilon, centered=self._centered, in_fp8=self._makes_rows)

    def add_and_fork(self, branch: Tensor, residual: Tensor) -> tuple[Tensor | WithRows, Tensor]:
        """Return the `fork` of branch + residual."""
        await_weights(self)
        return norm.add_and_fork(
            branch, residual, self.weight, self._epsilon, centered=self._centered, in_fp8=self._makes_rows
        )

    def forget(self, normed: Tensor | WithRows, residual: Tensor, branch: Tensor) -> None:
        """Free `normed` of a fork until the gradient of `branch`, which was made of it, is there."""
        if branch.requires_grad:
            values = unquantized(normed)
            norm.forget(values, residual, self.weight, self._epsilon, branch, centered=self._centered)

    @property
    def _makes_rows(self) -> bool:
        """Whether the product that takes this norm is in fp8 now."""
        return self._when_in_fp8 == "always" or (self._when_in_fp8 == "in_training" and self.training)

    @property
    def _epsilon(self) -> float:
        assert self.eps is not None
        return self.eps


class FusedRotatedRMSNorm(AfterRotation, FusedRMSNorm):
    """The same norm, of rotated heads."""


class FusedMLP(MLP):  # type: ignore[misc]
    """SwiGLU MLP without biases.

    One operation where nothing comes between its products: in fp8, and in bf16 on one tensor parallel rank. Otherwise
    the linears themselves, which send gradients while they compute those of weights, or what adapters have computed.
    """

    gate: Gate = "silu"

    def forward(self, hidden_states: Tensor | WithRows, *_: object, **__: object) -> tuple[Tensor, Tensor | None]:
        """Return the output and no bias."""
        up, down = self.linear_fc1, self.linear_fc2
        forms = fp8_gradients(up, down)
        if isinstance(up, AdaptedColumn) and up.adds_adapters and down.adds_adapters:
            parts = up.weight, down.weight, up.as_one(), down.as_one()
            return adapted_gated_mlp(hidden_states, *parts, self.gate, fp8_gradients=forms), None
        # The exact types: adapters subclass these linears.
        if type(up) is Fp8ColumnParallelLinear and forms is not None:
            await_weights(up)
            await_weights(down)
            inputs = up.whole_input(hidden_states)
            return down.reduced(gated_mlp(inputs, up.weight, down.weight, self.gate, fp8_gradients=forms)), None
        if type(up) in _LINEARS_ALONE and up.tp_group.size() == 1:
            await_weights(up)
            await_weights(down)
            return gated_mlp(hidden_states, up.weight, down.weight, self.gate), None
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(gated(self.linear_fc1(hidden_states)[0], self.gate))
        return output


class FusedGeGLUMLP(FusedMLP):
    """GeGLU MLP without biases."""

    gate = "gelu_tanh"


class FusedCoreAttention(CoreAttention):
    """Core attention by the fastest kernel for what the row holds."""

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not query.is_cuda:
            return super()._causal(query, key, value)
        with sdpa_kernel(_DENSE_KERNELS, set_priority=True):
            return super()._causal(query, key, value)

    def _packed_kernel(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Return the context, [t, heads, dim], of tensors of that shape."""
        lengths, longest = packed.seq_lengths, packed.max_seqlen_q
        window = self._window if self._window is not None and self._window < longest else None
        dense = self._kernel == "flash2" and window is None and self.sinks is None
        if dense and lengths.count(lengths[0]) == len(lengths):
            # Sequences of equal length are rows of a dense batch, for which cuDNN's kernel is the fastest.
            rows = [tensor.view(len(lengths), -1, *tensor.shape[1:]).transpose(1, 2) for tensor in (query, key, value)]
            return self._causal(*rows).transpose(1, 2).flatten(0, 1)
        return attention.flash(
            query, key, value, packed.cu_seqlens_q, longest, self._scale, self._kernel,
            window=window, **self._special,
        )  # fmt: skip


class FusedSelfAttention(RotarySelfAttention):
    """Self-attention that splits and rotates its QKV projection in one pass."""

    def _heads(self, hidden_states: Tensor | WithRows, angles: Tensor | None, positions: Tensor | None) -> Heads:
        assert angles is not None  # fused layers belong to models with RoPE in some layers
        if not self._rotary:
            # A rotation by 0 changes no bit, and the one pass that splits the heads stays.
            angles = torch.zeros_like(angles)
        magnitude = self._magnitude if self._rotary else 1.0
        groups = self.num_query_groups_per_partition
        normed = not isinstance(self.q_layernorm, IdentityOp | None) or self._value_norm or self._keyed_values
        plain = not normed and not self.config.attention_output_gate
        if plain and self.config.num_query_groups >= self.world_size:
            mixed, _ = self.linear_qkv(hidden_states)
            queries = self.num_attention_heads_per_partition // groups
            return *split_and_rotate(mixed, groups, queries, angles, positions, magnitude), None
        # Norms between projection and RoPE, a gate, or a projection that is gathered first: Megatron-core splits.
        query, key, value, gate = self._projected(hidden_states)
        if not self._rotary:
            return query, key, value, gate
        cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
        query, key = (rotate_heads(heads, cos, sin, positions) for heads in (query, key))
        return query, key, value, gate


class FusedTransformerLayer(TransformerLayer):  # type: ignore[misc]
    """A pre-norm layer in which each residual addition happens inside the norm after it, and backward likewise.

    With `norm_after` attention and MLP are followed by norms of their own.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: object,
        residual_multiplier: float = 1.0,
        norm_after: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self._multiplier = residual_multiplier
        self.post_attention_layernorm, self.post_mlp_layernorm = (
            FusedRMSNorm(config, config.hidden_size, config.layernorm_epsilon) if norm_after else None for _ in range(2)
        )

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the output, [s, b, h], and no context."""
        normed, residual = self.input_layernorm.fork(hidden_states)
        branch, bias = self.self_attention(
            normed,
            kwargs.get("attention_mask"),
            rotary_pos_emb=kwargs["rotary_pos_emb"],
            packed_seq_params=kwargs.get("packed_seq_params"),
            inference_context=kwargs.get("inference_context"),
        )
        if self.recompute_input_layernorm:
            self.input_layernorm.forget(normed, residual, branch)
        branch = branch if bias is None else branch + bias
        normed, residual = self.pre_mlp_layernorm.add_and_fork(
            self._before_addition(branch, self.post_attention_layernorm), residual
        )
        branch, _ = self.mlp(normed)
        if self.recompute_pre_mlp_layernorm:
            self.pre_mlp_layernorm.forget(normed, residual, branch)
        return residual + self._before_addition(branch, self.post_mlp_layernorm), None

    def _before_addition(self, branch: Tensor, after: FusedRMSNorm | None) -> Tensor:
        if after is not None:
            branch = after(branch)
        return branch if self._multiplier == 1.0 else branch * self._multiplier
