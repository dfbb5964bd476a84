"""Low-rank adapters on Megatron-core's parallel linears; the model's own weights are frozen.

Under tensor parallel an adapter is split as its linear is. Column-parallel (linear_qkv, linear_fc1): A is whole on
every rank, B holds the rank's rows. Row-parallel (linear_proj, linear_fc2): A holds the rank's columns, B is whole.
Between A and B there are only `rank` numbers a token, so that is where ranks exchange: with sequence parallel a gather
(or a reduce-scatter), without it an all-reduce (of the gradient, or of the sum). A part that is whole on every rank
then gets a whole gradient on each without sequence parallel, and a partial one with it; those carry the mark by which
Megatron-core adds them up. Linears that every rank has whole (latents) have whole adapters, which see the rank's own
part of the sequence alone.

DoRA gives each row of the adapted weight W + scale * B A a length of its own: the output is multiplied by magnitude /
norm of the row, and no gradient goes through the norm (sft.megatron.layers.dora).

The fused linears take one B for all their targets: its rows in the linear's order, each zero outside the columns of
its own target's A. That is done on weights, which are small, and not on activations. Where ranks need not exchange
anything between A and B, frozen product and adapters are one operation (sft.kernels.adapted).

Rejected: wrapping the linears in modules of our own (every parameter would change its name, in the importer and in
checkpoints), and PEFT itself (it knows neither the joined rows nor these linears).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.contract.spec import LoraSpec
from sft.hf.adapter import MARK, AdapterTarget, adapter_targets
from sft.hf.expert_adapter import expert_targets
from sft.kernels.adapted import LowRank, adapted_linear
from sft.kernels.fp8 import WithRows, unquantized
from sft.megatron.core import (
    GPTModel,
    TransformerConfig,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
    tensor_parallel,
)
from sft.megatron.layers.dora import RowNorms
from sft.megatron.layers.expert_lora import ExpertAdapters
from sft.megatron.layers.fp8 import fp8_gradients
from sft.megatron.layers.mixture_of_experts import ExpertMLP
from sft.megatron.layers.router import routers_of
from sft.models.architecture import Architecture
from sft.models.weight_map import rank_pieces


class Adapter(nn.Module):
    """This rank's A and B of one target."""

    def __init__(self, target: AdapterTarget, lora: LoraSpec, weight: Tensor, *, sequence_parallel: bool) -> None:
        super().__init__()
        assert lora.rank is not None
        rank = lora.rank
        self.target = target
        size = _ranks_that_share(target)
        columns, shares = (target.columns // size, 1) if target.split_input else (target.columns, size)
        self.lora_A = nn.Parameter(weight.new_empty(rank, columns))
        self.lora_B = nn.ParameterList(
            nn.Parameter(weight.new_zeros(rows // shares, rank)) for rows in target.block_rows
        )
        self.magnitude = nn.ParameterList(
            nn.Parameter(weight.new_ones(len(block))) for block in self.lora_B if lora.dora
        )
        """Of each row, in the blocks of B; empty without DoRA."""
        by_row = [*self.lora_B, *self.magnitude]
        split, whole = ([self.lora_A], by_row) if target.split_input else (by_row, [self.lora_A])
        if target.is_whole:
            split, whole = [], [self.lora_A, *by_row]
        for parameter in split:
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, int(target.split_input), 1)
        for parameter in whole:
            parameter.sequence_parallel = sequence_parallel  # type: ignore[union-attr]

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Set A to its initial values, the same under every topology, and B to zero: the model starts unchanged."""
        whole = self.target.draw_a(self.lora_A.shape[0], seed)
        columns = self.lora_A.shape[1]
        first = parallel_state.get_tensor_model_parallel_rank() * columns if self.target.split_input else 0
        self.lora_A.copy_(whole[:, first : first + columns])
        for block in self.lora_B:
            block.zero_()

    def split_axes(self) -> dict[str, int]:
        """Return the parameters that are split over tensor-parallel ranks, each with its axis."""
        if self.target.is_whole:
            return {}
        if self.target.split_input:
            return {"lora_A": 1}
        own = {"lora_B": self.lora_B, "magnitude": self.magnitude}
        return {f"{name}.{block}": 0 for name, blocks in own.items() for block in range(len(blocks))}

    @torch.no_grad()
    def set_magnitudes(self, norms: Tensor) -> None:
        """Set the magnitudes to these norms of the rows, block after block: the model starts unchanged."""
        for block, values in zip(self.magnitude, torch.split(norms, list(map(len, self.magnitude))), strict=True):
            block.copy_(values)


class Adapters(nn.ModuleDict):
    """The adapters of one Megatron-core linear, by the names of their targets."""

    def __init__(
        self, targets: Sequence[AdapterTarget], lora: LoraSpec, linear: Any, architecture: Architecture
    ) -> None:
        made = [Adapter(target, lora, linear.weight, sequence_parallel=linear.sequence_parallel) for target in targets]
        super().__init__({adapter.target.name: adapter for adapter in made})
        self.scale = lora.scale
        self.dropout = lora.dropout
        order = _rows_of_targets(targets, architecture, linear.weight.shape[0])
        self.register_buffer("_order", order.to(linear.weight.device), persistent=False)
        by_parts = linear.tp_group if targets[0].split_input else None
        self.norms = RowNorms(lora.scale, by_parts) if lora.dora else None

    def reset(self, weight: Tensor, seed: int) -> None:
        """Set all adapters of the linear with this weight to their initial values."""
        for part in self._parts():
            part.reset(seed)
        if self.norms is None:
            return
        norms = self.norms(weight, self.up_weight(), self._down_weight())
        sizes = [sum(map(len, part.lora_B)) for part in self._parts()]
        # One place more, for all rows without a target.
        by_target = norms.new_empty(sum(sizes) + 1).index_copy(0, self._row_order(), norms)
        for part, own in zip(self._parts(), torch.split(by_target[:-1], sizes), strict=True):
            part.set_magnitudes(own)

    @property
    def two_products(self) -> bool:
        """Whether two products are all that the adapters are now."""
        return self.norms is None and not self._drops

    def as_one(self) -> LowRank:
        """Return all targets' adapters as one."""
        return LowRank(self._down_weight(), self.up_weight(), self.scale)

    def down(self, x: Tensor, *, own_part: bool) -> Tensor:
        """Return scaled A(x) of all targets, side by side. `own_part` says that no other tensor rank has this input."""
        if not self._drops:
            return self.scale * F.linear(x, self._down_weight())
        return self.scale * torch.cat([F.linear(self._dropped(x, own_part), part.lora_A) for part in self._parts()], -1)

    def up_weight(self) -> Tensor:
        """Return B of all targets in the order of the linear's rows, [rows, targets * rank]."""
        blocks = torch.block_diag(*(torch.cat(list(part.lora_B)) for part in self._parts()))  # type: ignore[no-untyped-call]
        return F.pad(blocks, (0, 0, 0, 1)).index_select(0, self._row_order())

    def added(self, output: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the linear's `output` with what the adapters make of `hidden`, which is `down` over all ranks.

        `weight` is the linear's, and `bias` what is in its output already.
        """
        up = self.up_weight()
        whole = output + F.linear(hidden, up)
        if self.norms is None:
            return whole
        norms = self.norms(weight, up, self._down_weight()).to(weight.dtype)  # as the magnitudes: both start equal
        factor = torch.where(self._row_order() < self._targeted, self._magnitudes() / norms.float(), 1.0)
        scaled = ((whole if bias is None else whole - bias) * factor).to(output.dtype)
        return scaled if bias is None else scaled + bias

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: object, metadata: Mapping[str, object], tp_group: dist.ProcessGroup
    ) -> dict[str, object]:
        """Return the adapters for a sharded checkpoint."""
        axes = {f"{name}.{own}": axis for name, part in self._named() for own, axis in part.split_axes().items()}
        state = self.state_dict(keep_vars=True)
        made: dict[str, object] = make_sharded_tensors_for_checkpoint(
            state, prefix, axes, sharded_offsets, tp_group=tp_group, dp_cp_group=metadata["dp_cp_group"]
        )
        return made

    @property
    def _targeted(self) -> int:
        """How many of this rank's rows have a target."""
        return sum(len(block) for part in self._parts() for block in part.lora_B)

    def _row_order(self) -> Tensor:
        order: Tensor = self._order  # type: ignore[assignment]
        return order

    def _down_weight(self) -> Tensor:
        """Return A of all targets, [targets * rank, columns]."""
        return torch.cat([part.lora_A for part in self._parts()])

    def _magnitudes(self) -> Tensor:
        """Return the magnitudes in the order of the linear's rows, fp32 [rows], 1 where a row has no target."""
        blocks = torch.cat([block for part in self._parts() for block in part.magnitude])
        return F.pad(blocks, (0, 1), value=1.0).index_select(0, self._row_order()).float()

    def _named(self) -> Iterator[tuple[str, Adapter]]:
        for name, part in self.items():
            assert isinstance(part, Adapter)
            yield name, part

    def _parts(self) -> Iterator[Adapter]:
        return (part for _, part in self._named())

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0.0

    def _dropped(self, x: Tensor, own_part: bool) -> Tensor:
        """Return `x` after dropout: with equal masks where ranks share an input, with different ones for parts."""
        with tensor_parallel.get_cuda_rng_tracker().fork() if own_part else nullcontext():
            return F.dropout(x, self.dropout)


class _Adapted:
    """What the mixins below have: a place for adapters, and their part of a checkpoint."""

    weight: Tensor
    bias: Tensor | None
    skip_bias_add: bool
    tp_group: dist.ProcessGroup

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.lora: Adapters | None = None

    @property
    def adds_adapters(self) -> bool:
        """Whether there are adapters that the frozen product can add itself."""
        return self.lora is not None and self.tp_group.size() == 1 and self.lora.two_products

    def as_one(self) -> LowRank:
        """Return the adapters, which `adds_adapters` says are there, for an operation that adds them."""
        assert self.lora is not None
        return self.lora.as_one()

    def _in_one(self, x: Tensor | WithRows) -> tuple[Tensor, Tensor | None]:
        """Return output and bias, adapters included."""
        forms = fp8_gradients(self)
        form = None if forms is None else forms[0]
        output = adapted_linear(x, self.weight, self._added_bias, self.as_one(), fp8_gradients=form)
        return output, self.bias if self.skip_bias_add else None

    @property
    def _added_bias(self) -> Tensor | None:
        """The bias that is in the output, and not returned beside it."""
        return None if self.skip_bias_add else self.bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: object = (), metadata: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        """Return the linear's own state and the adapters', which Megatron-core would take for unsplit tensors."""
        own: dict[str, object] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        if self.lora is None:
            return own
        assert metadata is not None  # it names the group that holds copies
        kept = {key: value for key, value in own.items() if MARK not in key}
        return kept | self.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata, self.tp_group)


class AdaptedColumn(_Adapted):
    """Goes over a column-parallel linear of any precision; adapters are there once `attach_adapters` has put them."""

    sequence_parallel: bool

    def forward(
        self, input_: Tensor | WithRows, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and bias."""
        if self.adds_adapters:
            return self._in_one(input_)
        output, bias = super().forward(input_, weight, runtime_gather_output)  # type: ignore[misc]
        if self.lora is None:
            return output, bias
        hidden = self.lora.down(unquantized(input_), own_part=self.sequence_parallel)
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self.lora.added(output, hidden, self.weight, self._added_bias), bias


class AdaptedRow(_Adapted):
    """Goes over a row-parallel linear of any precision; adapters are there once `attach_adapters` has put them."""

    sequence_parallel: bool

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return output and bias."""
        if self.adds_adapters:
            return self._in_one(input_)
        output, bias = super().forward(input_)  # type: ignore[misc]
        if self.lora is None:
            return output, bias
        hidden = self.lora.down(input_, own_part=True)
        if self.sequence_parallel:
            hidden = tensor_parallel.reduce_scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = tensor_parallel.reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self.lora.added(output, hidden, self.weight, self._added_bias), bias


class AdaptedWhole(_Adapted):
    """Goes over a linear that every rank has whole; adapters are there once `attach_adapters` has put them."""

    sequence_parallel: bool

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return output and no bias."""
        if self.adds_adapters:
            return self._in_one(input_)
        output, bias = super().forward(input_)  # type: ignore[misc]
        if self.lora is None:
            return output, bias
        hidden = self.lora.down(input_, own_part=self.sequence_parallel)
        return self.lora.added(output, hidden, self.weight, self._added_bias), bias


def attach_adapters(
    model_chunk: GPTModel, lora: LoraSpec, architecture: Architecture, config: TransformerConfig
) -> None:
    """Give every targeted linear of a chunk its adapters, and freeze all else but routers that are to be trained."""
    model_chunk.requires_grad_(False)
    if lora.router:
        for router in routers_of(model_chunk).values():
            for parameter in router.parameters():
                parameter.requires_grad_(True)
    for layer in model_chunk.decoder.layers:
        targets = adapter_targets(architecture, lora, layer.layer_number - 1)
        for linear in dict.fromkeys(target.linear for target in targets):
            module = layer.get_submodule(linear)
            own = [target for target in targets if target.linear == linear]
            module.lora = Adapters(own, lora, module, architecture)
        if isinstance(layer.mlp, ExpertMLP):
            layer.mlp.adapt(lora, expert_targets(architecture, lora, layer.layer_number - 1))
    recomputes = config.recompute_granularity == "full" or "layernorm" in (config.recompute_modules or ())
    if model_chunk.pre_process and recomputes:
        model_chunk.embedding.register_forward_hook(_require_grad)


def reset_adapters(model_chunks: Sequence[nn.Module], seed: int) -> None:
    """Fill all adapters with their initial values."""
    for model_chunk in model_chunks:
        for module in model_chunk.modules():
            if isinstance(module, _Adapted) and module.lora is not None:
                module.lora.reset(module.weight, seed)
            elif isinstance(module, ExpertAdapters):
                module.reset(seed)


def _ranks_that_share(target: AdapterTarget) -> int:
    """Return how many tensor parallel ranks have parts of a target's linear."""
    return 1 if target.is_whole else parallel_state.get_tensor_model_parallel_world_size()


def _require_grad(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Make the embedding require a gradient: recomputed layers get none for their adapters if no input does.

    Recomputed norms, which are frozen, would not even keep their input.
    """
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _rows_of_targets(targets: Sequence[AdapterTarget], architecture: Architecture, rows: int) -> Tensor:
    """Return for each of this rank's rows its index among the targets' rows, or their number where it has no target."""
    target = targets[0]
    parameter_map = architecture.weights.layers[target.layer][f"{target.linear}.weight"]
    size = 1 if target.split_input else _ranks_that_share(target)
    rank = 0 if size == 1 else parallel_state.get_tensor_model_parallel_rank()
    held = [piece.name for piece in rank_pieces(parameter_map, rank, size, rows) for _ in range(piece.rows)]
    order = torch.full((rows,), -1, device="cpu")
    taken = 0
    for target in targets:
        mine = torch.tensor([name == f"{target.module}.weight" for name in held], device="cpu")
        count = int(mine.sum())
        if count * size != target.parameter_map.rows:
            raise ValueError(
                f"{target.module}: a rank holds {count} of {target.parameter_map.rows} rows, which is no even share"
            )
        order[mine] = torch.arange(taken, taken + count, device="cpu")
        taken += count
    order[order < 0] = taken
    return order
