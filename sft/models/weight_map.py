"""Which Hugging Face tensors make up each Megatron-core parameter, and where their rows lie: data, no input or output.

A parameter is described by the rows that it takes from Hugging Face tensors, in order (`ParameterMap`). The same
description serves both directions: import reads the rows that a rank needs, export puts rows back where they came from.
How the parameters are laid out on Megatron-core's side:

* linear_qkv: for each KV group its query heads, its key head, its value head. A tensor-parallel rank holds a
  contiguous part; with more ranks than KV groups a part is less than a group and Megatron-core gathers it back.
* linear_fc1: all gate rows, then all up rows; a rank holds its part of each half, hence two blocks.
* embedding and output layer: the vocabulary, then rows of zeros up to Megatron-core's padded size.
* linear_proj and linear_fc2 are split by columns; norms are whole on every rank.
* experts: the matrices of all experts, one below the other, in blocks of each expert's rows. An expert parallel rank
  holds a contiguous part of the experts, whose blocks are split as those of a dense layer are.

RoPE is not interleaved on Megatron-core's side; where files have it so, rows move inside a head
(`sft.models.neighbour_pairs`). How the files of a family are laid out is that family's matter (`sft.models.families`).

Rejected: a converter that builds the full state dict of one side and renames it (needs the whole model in memory,
and the rules twice, once for each direction).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
FINAL_NORM_BIAS = "decoder.final_layernorm.bias"
SHARED_EXPERT = "mlp.shared."
"""What the names of a shared expert's parameters begin with, within a layer."""

MXFP4_BLOCK = 32
"""Neighbouring inputs of a matrix in MXFP4 that have one scale."""

LANGUAGE_MODULE = "model.language_model."
"""The language model's place in transformers' multimodal models."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

_FUSED_NORMS = {
    f"{norm}.{kind}": f"{linear}.layer_norm_{kind}"
    for norm, linear in (("input_layernorm", "self_attention.linear_qkv"), ("pre_mlp_layernorm", "mlp.linear_fc1"))
    for kind in ("weight", "bias")
}
"""Our layer's names -> the names that checkpoints (and layers of Transformer Engine) use for the same norms."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of one Hugging Face tensor."""

    name: str
    start: int
    stop: int
    expert: int | None = None
    """Which matrix (or vector) of a tensor whose first axis is that of experts; None for a tensor without that axis."""
    step: int = 1
    """Every how many rows: two interleaved halves are two pieces of step 2."""

    @property
    def rows(self) -> int:
        return len(range(self.start, self.stop, self.step))

    def cut(self, first: int, last: int) -> Piece:
        """Return the piece's own rows `first` to `last`."""
        kept = range(self.start, self.stop, self.step)[first:last]
        return replace(self, start=kept.start, stop=kept[-1] + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterMap:
    """A whole Megatron-core parameter: blocks of pieces, each block split by itself over tensor-parallel ranks."""

    blocks: tuple[tuple[Piece, ...], ...]
    columns: int | None = None
    """Length of a row; None for a vector."""
    split: int | None = 0
    """Axis that is split over tensor-parallel ranks; None where every rank holds the whole parameter."""
    padded: bool = False
    """Rows of zeros may follow."""
    transposed: bool = False
    """The files hold the transposed matrix, [input, output]."""
    frozen: bool = False
    """It is never trained: a buffer, which keeps the precision of its files."""
    depthwise: bool = False
    """The files hold [rows, 1, columns]: the weights of a convolution that does not mix its channels."""
    experts: int = 0
    """Number of experts whose matrices these are, equally many blocks for each; 0 for a parameter without experts."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces, in order."""
        return tuple(piece for block in self.blocks for piece in block)

    @property
    def rows(self) -> int:
        """The number of rows without padding."""
        return sum(piece.rows for piece in self.pieces)

    def place(self, piece: Piece, columns: slice = slice(None)) -> tuple[int | slice, ...]:
        """Return where in its tensor a piece lies. What is there is the transpose of the rows where `transposed`."""
        rows = slice(piece.start, piece.stop, piece.step)
        own: tuple[int | slice, ...] = (rows,) if self.columns is None else (rows, columns)
        if self.transposed or self.depthwise:
            own = (columns, rows) if self.transposed else (rows, 0, columns)
        return own if piece.expert is None else (piece.expert, *own)

    def hf_shapes(self, columns: int | None = None) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its Hugging Face tensors by name. `columns` are those of a row if not the usual ones."""
        columns = self.columns if columns is None else columns
        rows: dict[str, int] = {}
        experts: dict[str, int] = {}
        for piece in self.pieces:
            rows[piece.name] = max(piece.stop, rows.get(piece.name, 0))
            if piece.expert is not None:
                experts[piece.name] = max(piece.expert + 1, experts.get(piece.name, 0))
        shapes = {}
        for name, count in rows.items():
            own: tuple[int, ...] = (count,) if columns is None else (count, columns)
            if columns is not None and (self.transposed or self.depthwise):
                own = (columns, count) if self.transposed else (count, 1, columns)
            shapes[name] = (experts[name], *own) if name in experts else own
        return shapes

    def renamed(self, rename: Callable[[str], str]) -> ParameterMap:
        """Return the map with other Hugging Face names."""
        blocks = tuple(tuple(replace(piece, name=rename(piece.name)) for piece in block) for block in self.blocks)
        return replace(self, blocks=blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """Which part of parameters a rank holds: its rank in each group that shares them, and the group's size."""

    tensor: tuple[int, int] = (0, 1)
    experts: tuple[int, int] = (0, 1)
    """Among the ranks that share the experts of a layer."""
    expert_tensor: tuple[int, int] = (0, 1)
    """Among the ranks that share each expert's matrices."""

    def of(self, parameter: ParameterMap) -> tuple[int, int]:
        """Return rank and size of the group that the parameter's `split` axis is cut over."""
        return self.expert_tensor if parameter.experts else self.tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMap:
    """The map of every parameter of a model."""

    outer: Mapping[str, ParameterMap]
    """Parameters outside of layers by name. The output layer is among them even where it is tied to the embedding,
    because the last pipeline stage then holds a copy of it."""
    layers: tuple[Mapping[str, ParameterMap], ...]
    """For each layer its parameters, by their names within the layer."""
    mxfp4: frozenset[str] = frozenset()
    """Hugging Face names of tensors of which the source's files hold blocks and scales (sft.hf.mxfp4). Exports have
    the tensors themselves."""
    head: str = "lm_head.weight"
    """Hugging Face name of the output layer, even where it is tied to the embedding."""
    language_prefix: str | None = None
    """What names of the language model's tensors begin with in files that hold it inside a multimodal model; None for
    others."""
    module_prefix: str = LANGUAGE_MODULE
    """What those of its modules begin with."""
    carried: tuple[str, ...] = ()
    """Beginnings of the names of tensors that the files hold and no layer is built of, such as those of vision towers
    and of heads that predict further tokens. Imports leave them, and exports have them as the source has them."""
    stacked: bool = field(init=False)
    """Whether all layers have the same parameters, which checkpoints then hold on one leading axis."""

    def __post_init__(self) -> None:
        sizes = [{name: (part.rows, part.columns) for name, part in layer.items()} for layer in self.layers]
        object.__setattr__(self, "stacked", all(layer == sizes[0] for layer in sizes))

    @property
    def embedding_name(self) -> str:
        """The Hugging Face name of the token embedding."""
        return self.outer[EMBEDDING].pieces[0].name

    def module(self, name: str) -> str:
        """Return what transformers and serving engines call the module `name` of the files.

        Files of multimodal models may have earlier names; those of modules are today's.
        """
        if self.language_prefix is None:
            return name
        return self.module_prefix + name.removeprefix(self.language_prefix)

    def unquantized(self) -> WeightMap:
        """Return the map of the same model's export."""
        return replace(self, mxfp4=frozenset())

    def renamed(self, rename: Callable[[str], str]) -> WeightMap:
        """Return the map with other Hugging Face names."""
        return replace(
            self,
            outer={name: part.renamed(rename) for name, part in self.outer.items()},
            layers=tuple({name: part.renamed(rename) for name, part in layer.items()} for layer in self.layers),
        )

    def find(self, name: str) -> ParameterMap | None:
        """Return the map of the parameter `name` (global layer index), or None where there is no such parameter."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return self.outer.get(name)
        layer = int(match[1])
        return self.layers[layer].get(match[2]) if layer < len(self.layers) else None

    def __getitem__(self, name: str) -> ParameterMap:
        """Return the map of the parameter `name`, or raise KeyError."""
        found = self.find(name)
        if found is None:
            raise KeyError(name)
        return found

    def parameters(self) -> dict[str, ParameterMap]:
        """Return the maps of all parameters by name, first to last, without a tied output layer."""
        tied = self.outer[OUTPUT] == self.outer[EMBEDDING]
        found = {name: part for name, part in self.outer.items() if name.startswith("embedding.")}
        for index, layer in enumerate(self.layers):
            found |= {f"decoder.layers.{index}.{name}": part for name, part in layer.items()}
        rest = {name: part for name, part in self.outer.items() if name not in found}
        return found | {name: part for name, part in rest.items() if not (tied and name == OUTPUT)}

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every Hugging Face tensor by name, in the order of `parameters`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self.parameters().values():
            for name, shape in part.hf_shapes().items():
                shapes[name] = tuple(map(max, shape, shapes.get(name, shape)))
        return shapes


def canonical_name(name: str, layer_offset: int = 0) -> str:
    """Return the name used here of a module's own parameter: no wrappers, global layer index, separate norms."""
    name = re.sub(r"^(module\.)+", "", name)
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    separate = {fused: own for own, fused in _FUSED_NORMS.items()}
    return f"decoder.layers.{int(match[1]) + layer_offset}.{separate.get(match[2], match[2])}"


def checkpoint_key(name: str, *, stacked: bool) -> tuple[str, int | None]:
    """Return a parameter's key in a sharded checkpoint and its index there.

    Equal layers are stacked on a leading axis, and have one key; otherwise each has its own, without an index.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name, None
    own = _FUSED_NORMS.get(match[2], match[2])
    return (f"decoder.layers.{own}", int(match[1])) if stacked else (f"decoder.layers.{match[1]}.{own}", None)


def rank_part(parameter: ParameterMap, place: RankPlace, shape: Sequence[int]) -> tuple[list[Piece], slice]:
    """Return the pieces of a rank whose parameter has this shape, and their columns."""
    rank, size = place.of(parameter)
    held = _of_own_experts(parameter, place)
    if parameter.split == 1:
        return list(held.pieces), slice(rank * shape[1], (rank + 1) * shape[1])
    if parameter.split is None:
        rank, size = 0, 1
    return rank_pieces(held, rank, size, shape[0]), slice(None)


def rank_pieces(parameter: ParameterMap, rank: int, size: int, rows: int) -> list[Piece]:
    """Return the pieces held by one of `size` ranks that has `rows` rows. Rows that no piece fills are padding."""
    if parameter.padded:
        return _cut(parameter.pieces, rank * rows, (rank + 1) * rows)
    found = []
    for block in parameter.blocks:
        share = sum(piece.rows for piece in block) // size
        found += _cut(block, rank * share, (rank + 1) * share)
    return found


def _of_own_experts(parameter: ParameterMap, place: RankPlace) -> ParameterMap:
    """Return the map of the experts that a rank holds, and any other parameter's as it is."""
    if not parameter.experts:
        return parameter
    rank, size = place.experts
    share = len(parameter.blocks) // size
    return replace(parameter, blocks=parameter.blocks[rank * share : (rank + 1) * share])


def split_parameter(parameter: ParameterMap, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the Hugging Face tensors that a whole Megatron-core parameter consists of, without padding.

    Axes in front of the last one are rows: those of experts' weights are several.
    """
    matrix = parameter.columns is not None
    values = values.flatten(0, -2) if matrix else values.flatten()
    shapes = parameter.hf_shapes(values.size(1) if matrix else None)
    whole = {name: values.new_empty(shape) for name, shape in shapes.items()}
    position = 0
    for piece in parameter.pieces:
        rows = values[position : position + piece.rows]
        whole[piece.name][parameter.place(piece)] = rows.T if parameter.transposed else rows
        position += piece.rows
    assert values[:position].numel() == sum(tensor.numel() for tensor in whole.values()), "rows are missing"
    return whole


def _cut(pieces: tuple[Piece, ...], start: int, stop: int) -> list[Piece]:
    """Return the part of `pieces`, laid end to end, between `start` and `stop`."""
    found, position = [], 0
    for piece in pieces:
        first, last = max(start - position, 0), min(stop - position, piece.rows)
        if first < last:
            found.append(piece.cut(first, last))
        position += piece.rows
    return found


# What families make their maps of -------------------------------------------------------------------------------------


def whole(name: str, rows: int, columns: int | None, split: int | None, *, transposed: bool = False) -> ParameterMap:
    """Return the map of a parameter that is one Hugging Face tensor."""
    return ParameterMap(blocks=((Piece(name, 0, rows),),), columns=columns, split=split, transposed=transposed)


def vector(name: str, rows: int) -> ParameterMap:
    """Return the map of a norm's weight, or of another vector that every rank holds whole."""
    return whole(name, rows, None, None)


def frozen_vector(name: str, rows: int) -> ParameterMap:
    """Return the map of a vector that every rank holds whole and that is never trained."""
    return replace(vector(name, rows), frozen=True)


def vocabulary(name: str, rows: int, columns: int) -> ParameterMap:
    """Return the map of an embedding or output layer, which Megatron-core pads."""
    return ParameterMap(blocks=((Piece(name, 0, rows),),), columns=columns, padded=True)
