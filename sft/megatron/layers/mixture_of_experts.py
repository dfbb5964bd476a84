"""A mixture of experts in place of the MLP: a router that chooses, experts that compute, and the weighted sum.

Expert parallel ranks hold some of a layer's experts each, and send each other the tokens; expert tensor parallel ranks
hold a part of each expert's width, as tensor parallel ranks do of a dense MLP. The router works in fp32, once a token,
on the tokens that the rank has: with sequence parallelism those of its part, which the expert tensor parallel ranks
then gather together with what was chosen for them.

Not Megatron-core's own MoE layer: its grouped experts need a package that has to be compiled, its loop over experts is
slow, its combination adds up with atomics (two runs differ on a GPU), and its gradient norm leaves experts out where
tensor and expert parallelism meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from launcher.contract.spec import LoraSpec
from sft.hf.expert_adapter import ExpertTarget
from sft.kernels.clamped_experts import Unit, clamped_experts, clamped_unit
from sft.kernels.expert_bias import add_expert_bias
from sft.kernels.expert_mlp import swiglu_experts, weighted_swiglu
from sft.kernels.fp8_experts import fp8_expert_products
from sft.kernels.grouped_experts import (
    Assignment,
    assign,
    expert_products,
    sort_rows,
    sum_of_experts,
    to_experts,
    unsort_rows,
)
from sft.megatron.core import (
    MegatronModule,
    ShardedTensor,
    ShardedTensorFactory,
    TransformerConfig,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
    tensor_parallel,
)
from sft.megatron.layers.activations import ACTIVATIONS
from sft.megatron.layers.expert_lora import ExpertAdapters
from sft.megatron.layers.fp8 import Fp8Linear, fp8_gradients
from sft.megatron.layers.router import Router
from sft.megatron.layers.weights_in_use import await_weights
from sft.megatron.parallel.experts import mark_as_experts, plan_exchange
from sft.models.architecture import Experts


class ExpertLinear(nn.Module):
    """The matrices of this rank's experts, one below the other, split over ranks like a dense linear's.

    Of a linear whose input is split (axis 1) every rank has the whole biases, and the first of them adds them.
    """

    def __init__(
        self, config: TransformerConfig, count: int, rows: int, columns: int, *, split: int, biased: bool = False
    ) -> None:
        super().__init__()
        self._count = count
        self.weight = nn.Parameter(torch.empty(count * rows, columns, dtype=config.params_dtype))
        mark_as_experts(self.weight, split=split)
        self.bias: nn.Parameter | None = None
        self.adds_bias = split == 0 or parallel_state.get_expert_tensor_parallel_rank() == 0
        if biased:
            self.bias = nn.Parameter(torch.empty(count * rows, dtype=config.params_dtype))
            mark_as_experts(self.bias, split=0 if split == 0 else None)
        self.lora: ExpertAdapters | None = None

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return the product of each expert's rows, which end where `ends` says, with its matrix, and its bias."""
        product = self._product(rows, ends)
        if self.bias is not None:
            product = add_expert_bias(product, self.bias.view(self._count, -1), ends, here=self.adds_bias)
        return product if self.lora is None else product + self.lora(rows, ends)

    def _product(self, rows: Tensor, ends: Tensor) -> Tensor:
        return expert_products(rows, self.weight.view(self._count, -1, self.weight.size(1)), ends)


class Fp8ExpertLinear(Fp8Linear, ExpertLinear):
    """The same with its products in fp8. Biases and adapters stay as they are."""

    def _product(self, rows: Tensor, ends: Tensor) -> Tensor:
        if not self.computes_in_fp8:
            return super()._product(rows, ends)
        return fp8_expert_products(rows, self.weight, ends, self.gradients)


class ExpertMLP(MegatronModule):  # type: ignore[misc]
    """The feed-forward part of a decoder layer whose tokens go to a few of many gated MLPs."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        experts: Experts,
        linear: type[ExpertLinear] = ExpertLinear,
        fused: bool = False,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self._fused = fused
        clamped = experts.clamped
        self._unit: Unit | None = None if clamped is None else (clamped.slope, clamped.limit)
        self._count = experts.count
        self._owners = parallel_state.get_expert_model_parallel_group()
        self._held = experts.count // self._owners.size()
        self.tp_group = parallel_state.get_expert_tensor_parallel_group()
        width = experts.width // self.tp_group.size()
        self.router = Router(config, experts)
        hidden, biased = config.hidden_size, experts.bias
        self.linear_fc1 = linear(config, self._held, 2 * width, hidden, split=0, biased=biased)
        self.linear_fc2 = linear(config, self._held, hidden, width, split=1, biased=biased)
        self.sequence_parallel: bool = config.sequence_parallel

    def adapt(self, lora: LoraSpec, targets: Sequence[ExpertTarget]) -> None:
        """Give this rank's experts their adapters."""
        first = self._owners.rank() * self._held
        for name, linear in (("mlp.linear_fc1", self.linear_fc1), ("mlp.linear_fc2", self.linear_fc2)):
            own = [target for target in targets if target.linear == name]
            if own:
                linear.lora = ExpertAdapters(own, lora, linear.weight, first=first, held=self._held)

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Return the output, [s, b, h] as the input is, and no bias."""
        return self._routed(hidden_states), None

    def _routed(
        self, hidden_states: Tensor, meanwhile: Callable[[], None] | None = None, *, chosen_by: Tensor | None = None
    ) -> Tensor:
        """Return what the chosen experts make of each token. `meanwhile` is called while tokens are on their way.

        The router takes `chosen_by`, or the tokens themselves.
        """
        weights, chosen = self.router(hidden_states if chosen_by is None else chosen_by)
        tokens, weights, chosen = self._shared(hidden_states), self._shared(weights), self._gathered(chosen)
        assignment = assign(chosen.flatten(0, 1), self._count)
        rows, weights = to_experts(tokens.flatten(0, 1), assignment), sort_rows(weights.flatten(), assignment)
        output = sum_of_experts(self._computed(rows, weights, assignment, meanwhile), assignment)
        return self._reduced(output.view_as(tokens))

    def _computed(
        self, rows: Tensor, weights: Tensor, assignment: Assignment, meanwhile: Callable[[], None] | None
    ) -> Tensor:
        """Return what the experts make of rows that are sorted by expert, wherever those are held."""
        if self._owners.size() == 1:
            if meanwhile is not None:
                meanwhile()
            return self._products(rows, weights, assignment.ends)
        exchange = plan_exchange(assignment.counts(), self._owners)
        sent = exchange.send(rows), exchange.send(weights)
        if meanwhile is not None:
            meanwhile()
        rows, weights = (each.arrived() for each in sent)
        own = assign(exchange.experts.unsqueeze(-1), self._held)
        computed = self._products(to_experts(rows, own), sort_rows(weights, own), own.ends)
        return exchange.back(unsort_rows(computed, own))

    def _products(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Return the weighted outputs of this rank's experts."""
        if self._fused and self.linear_fc1.lora is None and self.linear_fc2.lora is None:
            await_weights(self.linear_fc1)
            await_weights(self.linear_fc2)
            return self._at_once(rows, weights, ends)
        mixed = self.linear_fc1(rows, ends)
        if self._fused and self._unit is None:
            weighted: Tensor = self.linear_fc2(weighted_swiglu(mixed, weights), ends)
            return weighted
        product: Tensor = self.linear_fc2(self._activated(mixed), ends)
        return (product * weights.unsqueeze(-1)).to(product.dtype)

    def _at_once(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Return the weighted outputs, by one operation."""
        up, down = self.linear_fc1, self.linear_fc2
        forms = fp8_gradients(up, down)
        if self._unit is None:
            return swiglu_experts(rows, weights, up.weight, down.weight, ends, fp8_gradients=forms)
        assert up.bias is not None
        assert down.bias is not None
        biased = (up.weight, up.bias), (down.weight, down.bias)
        return clamped_experts(rows, weights, *biased, ends, self._unit, adds_bias=down.adds_bias, fp8_gradients=forms)

    def _activated(self, mixed: Tensor) -> Tensor:
        """Return the gated unit of [gate, up], without the weights of rows."""
        if self._unit is not None:
            return clamped_unit(mixed, self._unit)
        gate, up = mixed.chunk(2, dim=-1)
        return ACTIVATIONS[self.router.experts.activation](gate) * up

    def _shared(self, own: Tensor) -> Tensor:
        """Return the values of all tokens on every rank of the group, whose gradients are summed over its ranks."""
        if self.sequence_parallel:
            gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(own, group=self.tp_group)
            return gathered
        copied: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(own, group=self.tp_group)
        return copied

    def _gathered(self, chosen: Tensor) -> Tensor:
        return self._shared(chosen) if self.sequence_parallel else chosen

    def _reduced(self, partial: Tensor) -> Tensor:
        """Return the sum over the group, whose ranks have each computed a part of every expert's width."""
        if self.sequence_parallel:
            part: Tensor = tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
            return part
        whole: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
        return whole

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the weights as a sharded checkpoint has them: fc1 as [experts, 2, width, hidden]."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {name: value for name, value in self.state_dict(keep_vars=True).items() if not name.startswith("linear_")},
            prefix,
            {},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        fc1, fc2 = f"{prefix}linear_fc1.weight", f"{prefix}linear_fc2.weight"
        hidden = self.config.hidden_size
        # A rank's rows of each expert's gate and up are not one range of the whole matrix, hence four axes.
        state[fc1] = self._sharded(fc1, self.linear_fc1.weight, (self._held, 2, -1, hidden), 2, sharded_offsets)
        state[fc2] = self._sharded(fc2, self.linear_fc2.weight, self.linear_fc2.weight.shape, 1, sharded_offsets)
        state |= self._sharded_biases(prefix, sharded_offsets)
        for linear, module in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            for name, adapter in module.named_parameters():
                if name not in ("weight", "bias"):
                    key = f"{prefix}{linear}.{name}"
                    state[key] = self._sharded(key, adapter, adapter.shape, 1, sharded_offsets)
        return state

    def _sharded_biases(self, prefix: str, offsets: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
        """Return the biases, where there are some: fc1's as [experts, 2, width], and fc2's as [experts, hidden]."""
        first, second = self.linear_fc1.bias, self.linear_fc2.bias
        if first is None or second is None:
            return {}
        keys = f"{prefix}linear_fc1.bias", f"{prefix}linear_fc2.bias"
        return {
            keys[0]: self._sharded(keys[0], first, (self._held, 2, -1), 2, offsets),
            keys[1]: self._sharded(keys[1], second, (self._held, -1), None, offsets),
        }

    def _sharded(
        self,
        key: str,
        weight: Tensor,
        shape: Sequence[int],
        split: int | None,
        offsets: tuple[tuple[int, int, int], ...],
    ) -> ShardedTensorFactory:
        """Return what experts have as a part of that of all experts: axis 0 over owners, axis `split` over width.

        With `split` None each rank of those that share experts has it whole.
        """
        prepended, owners, group = len(offsets), self._owners, self.tp_group
        over_width = () if split is None else ((prepended + split, group.rank(), group.size()),)

        def build(key: str, weight: Tensor, replica_id: Any, *_: object) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key,
                weight.view(*shape),
                *offsets,
                (prepended, owners.rank(), owners.size()),
                *over_width,
                replica_id=replica_id,
                prepend_axis_num=prepended,
            )

        def merge(loaded: Tensor) -> Tensor:
            return loaded.reshape(weight.shape)

        copy = group.rank() if split is None else 0
        replica = (0, copy, parallel_state.get_expert_data_parallel_rank())
        return ShardedTensorFactory(key, weight, build, merge, replica)
