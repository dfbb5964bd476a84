"""Decoder layers whose small operations are fused (sft.kernels), in place of Megatron-core's own forward passes.

Parameters, their names, and the linears (with tensor and sequence parallelism, and adapters) stay Megatron-core's, so
that checkpoints and everything else do not know the difference. On a CPU the same modules compute with torch's own
operations, which is how their wiring is held to the plain layers under every layout.

Inference, which has a cache of keys and values, goes through Megatron-core's own passes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel

from sft.kernels import attention, norm
from sft.kernels.linear import swiglu_mlp
from sft.kernels.rope import rotate, split_and_rotate
from sft.kernels.swiglu import swiglu
from sft.megatron.core import (
    MLP,
    IdentityOp,
    ModuleSpec,
    SelfAttention,
    TransformerBlockSubmodules,
    TransformerLayer,
    rotary_magnitude,
    tensor_parallel,
)
from sft.megatron.layers.attention import CoreAttention, PackedSequences, RMSNorm
from sft.megatron.layers.fp8 import Fp8ColumnParallelLinear
from sft.megatron.parallel.context import SharedRows

_DENSE_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,  # 1.5 times as fast as FlashAttention-2 on an H200
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def await_weights(module: Module) -> None:
    """Run what waits for a module's weights before its forward pass, for who uses them without calling that.

    With overlapped gathering of updated weights Megatron-core waits in hooks of the forward pass.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


class FusedRMSNorm(RMSNorm):
    """RMSNorm that takes the residual stream along."""

    before_fp8 = False
    """Whether what it gives goes as it is into a product in fp8."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension."""
        return norm.rms_norm(x, self.weight, self._epsilon)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x, x)."""
        await_weights(self)
        return norm.fork(x, self.weight, self._epsilon, in_fp8=self.before_fp8)

    def add_and_fork(self, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`fork` of branch + residual."""
        await_weights(self)
        return norm.add_and_fork(branch, residual, self.weight, self._epsilon, in_fp8=self.before_fp8)

    def forget(self, normed: Tensor, residual: Tensor, branch: Tensor) -> None:
        """Free `normed` of a fork until the gradient of the branch that it went into is there."""
        if branch.requires_grad:
            norm.forget(normed, residual, self.weight, self._epsilon, branch)

    @property
    def _epsilon(self) -> float:
        assert self.eps is not None
        return self.eps


class FusedMLP(MLP):  # type: ignore[misc]
    """SwiGLU MLP without biases.

    One operation where nothing comes between its products: in fp8, and in bf16 on one tensor parallel rank. Otherwise
    Megatron-core's linears, which send gradients while they compute those of weights, or take adapters.
    """

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """Output and no bias."""
        up, down = self.linear_fc1, self.linear_fc2
        if isinstance(up, Fp8ColumnParallelLinear):
            await_weights(up)
            await_weights(down)
            inputs = up.whole_input(hidden_states)
            return down.reduced(swiglu_mlp(inputs, up.weight, down.weight, in_fp8=True)), None
        if type(up) is tensor_parallel.ColumnParallelLinear and up.tp_group.size() == 1:
            await_weights(up)
            await_weights(down)
            return swiglu_mlp(hidden_states, up.weight, down.weight), None
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(swiglu(self.linear_fc1(hidden_states)[0]))
        return output


class FusedCoreAttention(CoreAttention):
    """Core attention by the fastest kernel for what the row holds."""

    def __init__(self, *args: Any, kernel: attention.Kernel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kernel = kernel

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not query.is_cuda:
            return super()._causal(query, key, value)
        with sdpa_kernel(_DENSE_KERNELS, set_priority=True):
            return super()._causal(query, key, value)

    def _packed_kernel(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """[t, heads, dim] -> the same."""
        lengths = packed.seq_lengths
        if self._kernel == "flash2" and lengths.count(lengths[0]) == len(lengths):
            # [sequences, heads, length, dim]
            rows = [tensor.view(len(lengths), -1, *tensor.shape[1:]).transpose(1, 2) for tensor in (query, key, value)]
            return self._causal(*rows).transpose(1, 2).flatten(0, 1)
        return attention.flash(query, key, value, packed.cu_seqlens_q, packed.max_seqlen_q, self._scale, self._kernel)


class FusedSelfAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention that splits and turns its QKV projection in one pass, by positions and not by segments."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSequences | SharedRows | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> the same, and no bias."""
        if others.get("inference_context") is not None:
            plain: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **others
            )
            return plain
        angles = rotary_pos_emb[:, 0, 0, : rotary_pos_emb.shape[-1] // 2]
        packed = packed_seq_params
        # Angles of shared rows are those of their tokens already, one after the other.
        positions = packed.positions if isinstance(packed, PackedSequences) else None
        query, key, value = self._heads(hidden_states, angles, positions)
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

    def _heads(self, hidden_states: Tensor, angles: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [s, b, heads, dim], turned."""
        groups, magnitude = self.num_query_groups_per_partition, rotary_magnitude(self.config)
        normed = not isinstance(self.q_layernorm, IdentityOp | None)
        if not normed and self.config.num_query_groups >= self.world_size:
            mixed, _ = self.linear_qkv(hidden_states)
            return split_and_rotate(
                mixed, groups, self.num_attention_heads_per_partition // groups, angles, positions, magnitude
            )
        # Norms between projection and RoPE, or a projection that is gathered first: Megatron-core splits.
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        s = query.shape[0]
        cos, sin = (table[:s] if positions is None else table[positions] for table in (angles.cos(), angles.sin()))
        cos, sin = (magnitude * table.view(s, -1, 1, table.shape[-1]) for table in (cos, sin))
        return rotate(query, cos, sin), rotate(key, cos, sin), value


class FusedTransformerLayer(TransformerLayer):  # type: ignore[misc]
    """A pre-norm layer in which each residual addition happens inside the norm behind it, and back likewise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        products = (self.self_attention.linear_qkv, self.mlp.linear_fc1)
        for own, linear in zip((self.input_layernorm, self.pre_mlp_layernorm), products, strict=True):
            own.before_fp8 = isinstance(linear, Fp8ColumnParallelLinear) and not linear.sequence_parallel

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[s, b, h] -> the same, and no context."""
        if kwargs.get("inference_context") is not None:
            plain: tuple[Tensor, None] = super().forward(hidden_states, *args, **kwargs)
            return plain
        normed, residual = self.input_layernorm.fork(hidden_states)
        branch, _ = self.self_attention(
            normed,
            kwargs.get("attention_mask"),
            rotary_pos_emb=kwargs["rotary_pos_emb"],
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        if self.recompute_input_layernorm:
            self.input_layernorm.forget(normed, residual, branch)
        normed, residual = self.pre_mlp_layernorm.add_and_fork(branch, residual)
        branch, _ = self.mlp(normed)
        if self.recompute_pre_mlp_layernorm:
            self.pre_mlp_layernorm.forget(normed, residual, branch)
        return residual + branch, None


def use_fused_layers(block: TransformerBlockSubmodules, kernel: attention.Kernel) -> None:
    """Let a decoder spec of RMSNorm, RoPE and SwiGLU layers without dropout or biases build fused ones."""
    block.layer_norm = FusedRMSNorm
    for layer in block.layer_specs:
        layer.module = FusedTransformerLayer
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = FusedRMSNorm
        layer.submodules.mlp.module = FusedMLP
        layer.submodules.self_attention.module = FusedSelfAttention
        own = layer.submodules.self_attention.submodules
        own.core_attention = ModuleSpec(module=FusedCoreAttention, params={"kernel": kernel})
        if own.q_layernorm is RMSNorm:
            own.q_layernorm = own.k_layernorm = FusedRMSNorm
