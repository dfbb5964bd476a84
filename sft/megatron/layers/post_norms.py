"""Layers that norm what attention and MLP return before it is added to the residual (Gemma 2 and 3, Olmo 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from sft.megatron.core import TransformerConfig, TransformerLayer
from sft.megatron.layers.residual import Add, Branch


class PostNormTransformerLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron-core's layer with a norm of class `norm` after attention and another after the MLP."""

    def __init__(self, config: TransformerConfig, *args: object, norm: type[nn.Module], **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_attention_layernorm, self.post_mlp_layernorm = (
            norm(config, config.hidden_size, eps=config.layernorm_epsilon) for _ in range(2)
        )
        for name, own in (("self_attn_bda", self.post_attention_layernorm), ("mlp_bda", self.post_mlp_layernorm)):
            setattr(self, name, _normed_addition(own, getattr(self, name)))


def _normed_addition(norm: nn.Module, addition: Callable[[bool, bool], Add]) -> Callable[[bool, bool], Add]:
    """Return what Megatron-core's layer asks, given (training, fused): `addition` of the normed branch."""

    def normed(training: bool, fused: bool) -> Add:
        add = addition(training, fused)

        def normed_add(branch: Branch, residual: Tensor, dropout: float) -> Tensor:
            output, bias = branch
            return add((norm(output if bias is None else output + bias), None), residual, dropout)

        return normed_add

    return normed
