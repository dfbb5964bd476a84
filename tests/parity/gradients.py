"""Gradients of Megatron-core ranks under their Hugging Face names, whole, whatever the topology."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

import sft.engine.module
from launcher.contract.exit_codes import ExitCode
from launcher.contract.spec import read_resolved
from sft.megatron.core import get_transformer_layer_offset, parallel_state
from sft.megatron.parallel.groups import rank_place
from sft.models.architecture import Architecture
from sft.models.registry import read_architecture
from sft.models.weight_map import canonical_name, rank_part
from sft.training.trainer import train

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows and columns of the gradient of one Hugging Face tensor."""

    name: str
    place: tuple[int | slice, ...]
    values: NDArray[np.float32]


def train_and_capture(config: Path) -> list[list[Part]]:
    """Train, on a rank, and return what it holds of the gradients of each step, as the optimizer gets them."""
    architecture = read_architecture(Path(read_resolved(config).model.path))
    return train_and_keep(config, lambda chunks: parts_of(chunks, architecture))


def train_and_keep(config: Path, of_step: Callable[[list[Any]], T]) -> list[T]:
    """Train, on a rank, and return what `of_step` makes of its model chunks in each step, once they have gradients."""
    steps: list[T] = []
    finalize = sft.engine.module.reduce_and_divide_gradients

    def spy(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        finalize(chunks, *args, **kwargs)
        steps.append(of_step(chunks))

    sft.engine.module.reduce_and_divide_gradients = spy
    assert train(config) == ExitCode.OK
    return steps


def join(by_rank: list[list[list[Part]]], architecture: Architecture) -> list[dict[str, torch.Tensor]]:
    """Return the whole gradients of each step. Parts that several ranks hold must be the same; none may be missing."""
    return [_join_step([part for rank in step for part in rank], architecture) for step in zip(*by_rank, strict=True)]


def largest_differences(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], count: int = 5
) -> dict[str, float]:
    """Return the gradients that differ most, with the norms of their differences over those expected."""
    tiny = 1e-30  # an expert without tokens has no gradient on either side
    errors = {
        name: float((found[name] - gradient).norm() / gradient.norm().clamp_min(tiny))
        for name, gradient in expected.items()
    }
    return dict(sorted(errors.items(), key=lambda item: -item[1])[:count])


def _join_step(parts: list[Part], architecture: Architecture) -> dict[str, torch.Tensor]:
    maps = architecture.weights.parameters().values()
    frozen = {piece.name for parameter_map in maps if parameter_map.frozen for piece in parameter_map.pieces}
    shapes = architecture.weights.hf_shapes()
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items() if name not in frozen}
    for part in parts:
        place, values = whole[part.name][part.place], torch.from_numpy(part.values)
        seen = ~place.isnan()
        torch.testing.assert_close(place[seen], values[seen], rtol=1e-5, atol=1e-9)
        whole[part.name][part.place] = values
    missing = [name for name, tensor in whole.items() if tensor.isnan().any()]
    assert not missing
    return whole


def parts_of(chunks: list[Any], architecture: Architecture) -> list[Part]:
    place = rank_place()
    found = []
    for index, chunk in enumerate(chunks):
        _gather_shards(chunk)
        offset = get_transformer_layer_offset(chunk.config, index if len(chunks) > 1 else None)
        for name, parameter in chunk.named_parameters():
            parameter_map = architecture.weights[canonical_name(name, offset)]
            gradient = parameter.main_grad.detach().float().cpu().numpy().copy()
            position = 0
            pieces, columns = rank_part(parameter_map, place, gradient.shape)
            for piece in pieces:
                values = gradient[position : position + piece.rows]
                own = values.T if parameter_map.transposed else values
                found.append(Part(piece.name, parameter_map.place(piece, columns), own))
                position += piece.rows
    return found


def _gather_shards(chunk: Any) -> None:
    """Gather the buffers: with the distributed optimizer each data parallel rank has reduced its own shard alone."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    experts = parallel_state.get_expert_data_parallel_group()
    for group, buffers in ((dense, chunk.buffers), (experts, chunk.expert_parallel_buffers)):
        for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
            whole = bucket.grad_data
            share = whole.numel() // group.size()
            mine = whole[group.rank() * share : (group.rank() + 1) * share].clone()
            dist.all_gather_into_tensor(whole, mine, group=group)
