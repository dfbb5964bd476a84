"""Fill the Megatron-core parameters of this rank from a Hugging Face directory, reading only this rank's slices.

Parameters are filled one after another and piece by piece, straight into place: beside the model, a rank never holds
more than the piece it is reading. What the pieces are is `sft.models.weight_map`' matter.

Rejected: loading a transformers model on every rank and copying from it (world size times the whole model in host
memory), and one rank that reads and sends (the others wait, and the interconnect carries what the file system could).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from sft.hf.adapter import MARK as ADAPTER_MARK
from sft.hf.files import WeightFiles, read_piece
from sft.hf.sliceable import Sliceable
from sft.models.architecture import Architecture
from sft.models.weight_map import ParameterMap, RankPlace, canonical_name, rank_part


class TensorSource(Protocol):
    """Where Hugging Face tensors come from: the files of a directory, or anything else that can be cut."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Sliceable:
        """Return an object that gives rows, or rows and columns, of the tensor `name` when indexed."""


def load_hf_weights(
    model_chunks: Sequence[nn.Module],
    architecture: Architecture,
    model_dir: Path,
    *,
    place: RankPlace,
    layer_offsets: Sequence[int],
    only_frozen: bool = False,
) -> None:
    """Fill every parameter of `model_chunks` from the files of `model_dir`, or raise ModelError."""
    source = WeightFiles(model_dir)
    fill_parameters(
        model_chunks, architecture, source, place=place, layer_offsets=layer_offsets, only_frozen=only_frozen
    )


def needed_tensors(
    model_chunks: Sequence[nn.Module], architecture: Architecture, *, place: RankPlace, layer_offsets: Sequence[int]
) -> set[str]:
    """Return the names of the tensors from which this rank's parameters are filled."""
    found: set[str] = set()
    for model_chunk, offset in zip(model_chunks, layer_offsets, strict=True):
        for name, parameter in _named_weights(model_chunk, offset, architecture).items():
            pieces, _ = rank_part(architecture.weights[name], place, parameter.shape)
            found |= {piece.name for piece in pieces}
    return found


def fill_parameters(
    model_chunks: Sequence[nn.Module],
    architecture: Architecture,
    source: TensorSource,
    *,
    place: RankPlace,
    layer_offsets: Sequence[int],
    only_frozen: bool = False,
) -> None:
    """Fill every parameter of `model_chunks` but adapters, in its own dtype and on its own device.

    `place` says which part of each this rank holds, `layer_offsets` the global index of each chunk's first layer. With
    `only_frozen`, parameters that are trained become NaN and nothing of them is read: a checkpoint has to fill them.
    """
    shapes = architecture.weights.hf_shapes()
    for model_chunk, offset in zip(model_chunks, layer_offsets, strict=True):
        named = _named_weights(model_chunk, offset, architecture)
        _check_layers(named, architecture)
        for name, parameter in named.items():
            parameter_map = architecture.weights.find(name)
            if parameter_map is None:
                raise ValueError(f"parameter {name} has no counterpart in a {architecture.shape.model_type} model")
            _check_built(name, parameter, parameter_map, place)
            if only_frozen and not parameter_map.frozen:
                parameter.data.fill_(torch.nan)
                continue
            _fill(parameter, parameter_map, source, shapes, place)


def _named_weights(model_chunk: nn.Module, offset: int, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return the parameters of a chunk by their names in the whole model, and the buffers that files hold."""
    found: dict[str, torch.Tensor] = {
        canonical_name(name, offset): parameter
        for name, parameter in model_chunk.named_parameters()
        if ADAPTER_MARK not in name
    }
    buffers = {canonical_name(name, offset): buffer for name, buffer in model_chunk.named_buffers()}
    return found | {name: buffer for name, buffer in buffers.items() if architecture.weights.find(name) is not None}


@torch.no_grad()
def _fill(
    parameter: torch.Tensor,
    parameter_map: ParameterMap,
    source: TensorSource,
    shapes: dict[str, tuple[int, ...]],
    place: RankPlace,
) -> None:
    """Read this rank's pieces of one parameter into it. Rows that no piece covers become zero."""
    pieces, columns = rank_part(parameter_map, place, parameter.shape)
    position = 0
    for piece in pieces:
        tensor = source.tensor(piece.name, shapes[piece.name])
        parameter[position : position + piece.rows].copy_(read_piece(tensor, piece, parameter_map, columns))
        position += piece.rows
    parameter[position:].zero_()


def _check_built(name: str, parameter: torch.Tensor, parameter_map: ParameterMap, place: RankPlace) -> None:
    """Raise ValueError for our own bugs: a parameter of another shape, or a split one that is not marked as such.

    Megatron-core marks a weight only while it initialises it. Without the mark the gradient norm leaves out what the
    other tensor-parallel ranks hold.
    """
    _, size = place.of(parameter_map)
    whole = [extent * (size if axis == parameter_map.split else 1) for axis, extent in enumerate(parameter.shape)]
    if parameter_map.experts:
        whole[0] *= place.experts[1]
    expected = [parameter_map.rows] if parameter_map.columns is None else [parameter_map.rows, parameter_map.columns]
    fits = whole[0] >= expected[0] if parameter_map.padded else whole[0] == expected[0]
    if len(whole) != len(expected) or whole[1:] != expected[1:] or not fits:
        raise ValueError(f"parameter {name} is {whole} over all ranks, not {expected}")
    mark = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]
    if size > 1 and mark != parameter_map.split:
        raise ValueError(f"parameter {name} is marked as split on axis {mark}, not {parameter_map.split}")


def _check_layers(names: Iterable[str], architecture: Architecture) -> None:
    """Raise ValueError for our own bugs: a layer without a bias or norm that the architecture has."""
    names = set(names)
    layers = {name.split(".")[2] for name in names if name.startswith("decoder.layers.")}
    maps = architecture.weights.layers
    expected = {f"decoder.layers.{layer}.{name}" for layer in layers for name in maps[int(layer)]}
    if not expected <= names:
        raise ValueError(f"the model lacks parameters of its architecture: {', '.join(sorted(expected - names))}")
