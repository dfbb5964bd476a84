"""A mixture of experts beside an MLP that every token meets."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft.megatron.core import MLP, MLPSubmodules, TransformerConfig, parallel_state
from sft.megatron.layers.linears import Linears
from sft.megatron.layers.mixture_of_experts import ExpertMLP
from sft.models.architecture import Experts


class SharedWeight(nn.Module):
    """Weights the shared expert's output of each token by the sigmoid of a product with the token."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
        # Each rank then has its own part of the sequence, and a partial gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return each token's weight, [..., 1]."""
        return torch.sigmoid(F.linear(tokens, self.weight))


class SharedExpertMLP(ExpertMLP):
    """The feed-forward part of a decoder layer whose tokens go to a few of many MLPs, and all of them to one more."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        experts: Experts,
        mlp: type[MLP],
        linears: Linears,
        **options: Any,
    ) -> None:
        super().__init__(config, experts=experts, **options)
        assert experts.shared is not None
        # Megatron-core's MLP takes its width from the configuration, which has that of dense layers.
        own = copy.copy(config)
        own.ffn_hidden_size = experts.shared.width
        own.add_bias_linear = False  # which it has where attention's output has a bias
        self.shared = mlp(
            own,
            MLPSubmodules(linear_fc1=linears.column, linear_fc2=linears.row),
            ffn_hidden_size=experts.shared.width,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        self.shared_weight = SharedWeight(config) if experts.shared.weighted else None

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Return the output, [s, b, h] as the input is, and no bias."""
        shared: list[Tensor] = []
        routed = self._routed(hidden_states, lambda: shared.append(self._of_all(hidden_states)))
        return routed + shared[0], None

    def _of_all(self, hidden_states: Tensor) -> Tensor:
        """Return what the expert that every token meets makes of each."""
        output: Tensor = self.shared(hidden_states)[0]
        return output if self.shared_weight is None else self.shared_weight(hidden_states) * output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the weights as a sharded checkpoint has them."""
        experts = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        shared: dict[str, Any] = self.shared.sharded_state_dict(f"{prefix}shared.", sharded_offsets, metadata)
        return experts | shared


class ExpertsBesideMLP(SharedExpertMLP):
    """Experts and an MLP that take the same tokens, each with norms of its own before and behind it (Gemma 4)."""

    def __init__(self, config: TransformerConfig, *, norm: type[nn.Module], **options: Any) -> None:
        super().__init__(config, **options)
        self.norm_before_shared, self.norm_before_experts, self.norm_after_shared, self.norm_after_experts = (
            norm(config, config.hidden_size, eps=config.layernorm_epsilon) for _ in range(4)
        )

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Return the output, [s, b, h] as the input is, and no bias. The router sees tokens that are not normed."""
        shared: list[Tensor] = []
        routed = self._routed(
            self.norm_before_experts(hidden_states),
            lambda: shared.append(self._of_all(self.norm_before_shared(hidden_states))),
            chosen_by=hidden_states,
        )
        return self.norm_after_shared(shared[0]) + self.norm_after_experts(routed), None
