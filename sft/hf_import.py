"""Fill the Megatron-core parameters of this rank from a Hugging Face directory, reading only this rank's slices.

Parameters are filled one after another and piece by piece, straight into place: beside the model, a rank never holds
more than the piece it is reading. What the pieces are is `hf_weights`' matter.

Rejected: loading a transformers model on every rank and copying from it (world size times the whole model in host
memory), and one rank that reads and sends (the others wait, and the interconnect carries what the file system could).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from sft.architecture import Architecture
from sft.hf_files import WeightFiles
from sft.hf_weights import Layout, canonical_name, hf_shapes, layer_parameters, layout_of, rank_pieces


def load_hf_weights(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    model_dir: Path,
    *,
    tensor_rank: int,
    tensor_size: int,
    layer_offsets: Sequence[int],
) -> None:
    """Fill every parameter of `chunks` in its own dtype and on its own device.

    `layer_offsets` holds the global index of each chunk's first layer. ModelError names file and tensor.
    """
    files = WeightFiles(model_dir)
    shapes = hf_shapes(architecture)
    for chunk, offset in zip(chunks, layer_offsets, strict=True):
        named = {canonical_name(name, offset): parameter for name, parameter in chunk.named_parameters()}
        _check_layers(named, architecture)
        for name, parameter in named.items():
            layout = layout_of(name, architecture)
            if layout is None:
                raise ValueError(f"parameter {name} has no counterpart in a {architecture.shape.model_type} model")
            _check_shape(name, parameter, layout, tensor_size)
            _fill(parameter, layout, files, shapes, tensor_rank, tensor_size)


@torch.no_grad()
def _fill(
    parameter: nn.Parameter,
    layout: Layout,
    files: WeightFiles,
    shapes: dict[str, tuple[int, ...]],
    rank: int,
    size: int,
) -> None:
    """Read this rank's pieces of one parameter into it; rows that no piece covers become zero."""
    axis = _partition_axis(parameter)
    if axis == 1:
        pieces, columns = list(layout.pieces), slice(rank * parameter.shape[1], (rank + 1) * parameter.shape[1])
    else:
        pieces = rank_pieces(layout, *((rank, size) if axis == 0 else (0, 1)), rows=parameter.shape[0])
        columns = slice(None)
    position = 0
    for piece in pieces:
        tensor = files.tensor(piece.name, shapes[piece.name])
        rows = slice(piece.start, piece.stop)
        parameter[position : position + piece.rows].copy_(tensor[rows] if axis != 1 else tensor[rows, columns])
        position += piece.rows
    parameter[position:].zero_()


def _partition_axis(parameter: nn.Parameter) -> int | None:
    """The axis on which Megatron-core splits this parameter over tensor-parallel ranks; None where each has it all."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def _check_shape(name: str, parameter: nn.Parameter, layout: Layout, size: int) -> None:
    """Our own bugs: a model that was not built from this architecture."""
    axis = _partition_axis(parameter)
    rows, columns = parameter.shape[0], parameter.shape[1] if parameter.dim() == 2 else None
    rows, columns = rows * size if axis == 0 else rows, columns * size if columns and axis == 1 else columns
    fits = rows >= layout.rows if layout.padded else rows == layout.rows
    if not fits or columns != layout.columns:
        raise ValueError(f"parameter {name} is {[rows, columns]} over all ranks, not {[layout.rows, layout.columns]}")


def _check_layers(names: Iterable[str], architecture: Architecture) -> None:
    """Our own bugs: a layer built without a bias or norm that the architecture has, whose weights would be lost."""
    names = set(names)
    layers = {name.split(".")[2] for name in names if name.startswith("decoder.layers.")}
    expected = {f"decoder.layers.{layer}.{name}" for layer in layers for name in layer_parameters(architecture)}
    if not expected <= names:
        raise ValueError(f"the model lacks parameters of its architecture: {', '.join(sorted(expected - names))}")
