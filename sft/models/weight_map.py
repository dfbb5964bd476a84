"""Which Hugging Face tensors make up a Megatron-core parameter, and where each row lies: data, no reading or writing.

A parameter is described by the rows it takes from Hugging Face tensors, in order (`Layout`). The same description
serves both directions: import reads the rows a rank needs, export puts rows back where they came from. Layouts:

* linear_qkv: for each KV group its query heads, its key head, its value head. A tensor-parallel rank holds a
  contiguous part; with more ranks than KV groups a part is less than a group and Megatron-core gathers it back.
  Where the files hold one tensor (Phi-3), it is all query heads, then all key heads, then all value heads.
* linear_fc1: all gate rows, then all up rows, which may be one tensor in the files; a rank holds its part of each
  half, hence two blocks.
* embedding and output layer: the vocabulary, then rows of zeros up to Megatron-core's padded size.
* linear_proj and linear_fc2 are split by columns; norms are whole on every rank.
* GPT-2's files hold matrices turned over ([input, output]), and query, key and value in one tensor as Phi-3's do.

RoPE is not interleaved on either side, so that no row inside a head moves.

Rejected: a converter that builds the full state dict of one side and renames it (needs the whole model in memory,
and the layout rules twice, once a direction).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
FINAL_NORM_BIAS = "decoder.final_layernorm.bias"

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

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A whole Megatron-core parameter: blocks of pieces, each block split by itself over tensor-parallel ranks."""

    blocks: tuple[tuple[Piece, ...], ...]
    columns: int | None = None
    """Length of a row; None for a vector."""
    split: int | None = 0
    """Axis that is split over tensor-parallel ranks; None where each rank has it all."""
    padded: bool = False
    """Rows of zeros may follow."""
    transposed: bool = False
    """The files hold the matrix turned over: its rows are their columns."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces, in order."""
        return tuple(piece for block in self.blocks for piece in block)

    @property
    def rows(self) -> int:
        """Rows without padding."""
        return sum(piece.rows for piece in self.pieces)


def layout_of(name: str, architecture: Architecture) -> Layout | None:
    """Layout of the parameter `name` (global layer index); None where there is no such parameter."""
    shape = architecture.shape
    match = _LAYER.fullmatch(name)
    if match is None:
        return _outer_layouts(architecture).get(name)
    if int(match[1]) >= shape.num_layers:
        return None
    return _layer_layouts(architecture, int(match[1])).get(match[2])


def layer_parameters(architecture: Architecture) -> tuple[str, ...]:
    """Parameter names within one layer."""
    return tuple(_layer_layouts(architecture, 0))


def parameter_layouts(architecture: Architecture) -> dict[str, Layout]:
    """Every parameter of the whole model, first to last; a tied output layer is the embedding and not named."""
    outer = _outer_layouts(architecture)
    if architecture.shape.tied_embeddings:
        del outer[OUTPUT]
    layouts = {name: layout for name, layout in outer.items() if name.startswith("embedding.")}
    for layer in range(architecture.shape.num_layers):
        for name, layout in _layer_layouts(architecture, layer).items():
            layouts[f"decoder.layers.{layer}.{name}"] = layout
    return layouts | {name: layout for name, layout in outer.items() if name not in layouts}


def parameter_names(architecture: Architecture) -> Iterator[str]:
    """The names of `parameter_layouts`."""
    return iter(parameter_layouts(architecture))


def embedding_name(architecture: Architecture) -> str:
    """The Hugging Face name of the token embedding."""
    return "transformer.wte.weight" if architecture.gpt2 else "model.embed_tokens.weight"


def canonical_name(name: str, layer_offset: int = 0) -> str:
    """A module's own parameter name -> the name used here: no wrappers, global layer index, separate norms."""
    name = re.sub(r"^(module\.)+", "", name)
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    separate = {fused: own for own, fused in _FUSED_NORMS.items()}
    return f"decoder.layers.{int(match[1]) + layer_offset}.{separate.get(match[2], match[2])}"


def checkpoint_key(name: str) -> tuple[str, int | None]:
    """Key of a parameter in a sharded checkpoint, and its index there: layers are stacked on a leading axis."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name, None
    return f"decoder.layers.{_FUSED_NORMS.get(match[2], match[2])}", int(match[1])


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of the model, in the order of `parameter_layouts`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layout in parameter_layouts(architecture).values():
        for piece in layout.pieces:
            rows = max(piece.stop, shapes.get(piece.name, (0,))[-1 if layout.transposed else 0])
            shape = (rows,) if layout.columns is None else (rows, layout.columns)
            shapes[piece.name] = shape[::-1] if layout.transposed else shape
    return shapes


def rank_pieces(layout: Layout, rank: int, size: int, rows: int) -> list[Piece]:
    """The pieces of one of `size` ranks that holds `rows` rows; what is missing to `rows` is padding."""
    if layout.padded:
        return _cut(layout.pieces, rank * rows, (rank + 1) * rows)
    found = []
    for block in layout.blocks:
        share = sum(piece.rows for piece in block) // size
        found += _cut(block, rank * share, (rank + 1) * share)
    return found


def split_parameter(layout: Layout, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """A whole Megatron-core parameter -> its Hugging Face tensors; padding is cut off."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    position = 0
    for piece in layout.pieces:
        parts.setdefault(piece.name, {})[piece.start] = parameter[position : position + piece.rows]
        position += piece.rows
    whole = {name: torch.cat([rows[start] for start in sorted(rows)]) for name, rows in parts.items()}
    return {name: tensor.T.contiguous() for name, tensor in whole.items()} if layout.transposed else whole


def _cut(pieces: tuple[Piece, ...], start: int, stop: int) -> list[Piece]:
    """The part of `pieces`, laid end to end, between `start` and `stop`."""
    found, position = [], 0
    for piece in pieces:
        first, last = max(start - position, 0), min(stop - position, piece.rows)
        if first < last:
            found.append(Piece(piece.name, piece.start + first, piece.start + last))
        position += piece.rows
    return found


def _whole(name: str, rows: int, columns: int | None, split: int | None, *, transposed: bool = False) -> Layout:
    return Layout(blocks=((Piece(name, 0, rows),),), columns=columns, split=split, transposed=transposed)


def _norm(name: str, rows: int) -> Layout:
    return _whole(name, rows, None, None)


def _vocabulary(name: str, rows: int, columns: int) -> Layout:
    return Layout(blocks=((Piece(name, 0, rows),),), columns=columns, padded=True)


def _outer_layouts(architecture: Architecture) -> dict[str, Layout]:
    """Layouts of the parameters outside layers, a tied output layer among them."""
    shape = architecture.shape
    hidden = shape.hidden_size
    embedding = embedding_name(architecture)
    # The last pipeline stage holds its own copy of a tied embedding.
    head = embedding if shape.tied_embeddings else "lm_head.weight"
    layouts = {EMBEDDING: _vocabulary(embedding, shape.vocab_size, hidden)}
    if architecture.gpt2:
        layouts[POSITIONS] = _whole("transformer.wpe.weight", shape.max_position_embeddings, hidden, None)
        layouts[FINAL_NORM] = _norm("transformer.ln_f.weight", hidden)
        layouts[FINAL_NORM_BIAS] = _norm("transformer.ln_f.bias", hidden)
    else:
        layouts[FINAL_NORM] = _norm("model.norm.weight", hidden)
    layouts[OUTPUT] = _vocabulary(head, shape.vocab_size, hidden)
    return layouts


def _layer_layouts(architecture: Architecture, layer: int) -> dict[str, Layout]:
    """Layouts of the parameters in one layer."""
    if architecture.gpt2:
        return _gpt2_layer_layouts(architecture, f"transformer.h.{layer}.")
    shape, prefix = architecture.shape, f"model.layers.{layer}."
    hidden, ffn, head = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    joined = "qkv_proj" if architecture.fused else None
    layouts = {
        "input_layernorm.weight": _norm(f"{prefix}input_layernorm.weight", hidden),
        "self_attention.linear_qkv.weight": Layout(
            blocks=(_qkv(shape, attention, "weight", joined=joined),), columns=hidden
        ),
        "self_attention.linear_proj.weight": _whole(
            f"{attention}o_proj.weight", hidden, shape.num_attention_heads * head, split=1
        ),
        "pre_mlp_layernorm.weight": _norm(f"{prefix}post_attention_layernorm.weight", hidden),
        "mlp.linear_fc1.weight": Layout(blocks=_gate_and_up(architecture, mlp), columns=hidden),
        "mlp.linear_fc2.weight": _whole(f"{mlp}down_proj.weight", hidden, ffn, split=1),
    }
    if architecture.qkv_bias:
        layouts["self_attention.linear_qkv.bias"] = Layout(blocks=(_qkv(shape, attention, "bias", joined=joined),))
    if architecture.qk_norm:
        for kind in ("q", "k"):
            layouts[f"self_attention.{kind}_layernorm.weight"] = _norm(f"{attention}{kind}_norm.weight", head)
    return layouts


def _gpt2_layer_layouts(architecture: Architecture, prefix: str) -> dict[str, Layout]:
    """Layouts of one of GPT-2's layers, whose Hugging Face tensors start with `prefix`."""
    shape = architecture.shape
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    weight, bias = (_qkv(shape, f"{prefix}attn.", kind, joined="c_attn") for kind in ("weight", "bias"))
    attention, mlp = "self_attention.linear_", "mlp.linear_"
    layouts = {
        f"{attention}qkv.weight": Layout(blocks=(weight,), columns=hidden, transposed=True),
        f"{attention}qkv.bias": Layout(blocks=(bias,)),
        f"{attention}proj.weight": _whole(f"{prefix}attn.c_proj.weight", hidden, hidden, 1, transposed=True),
        f"{attention}proj.bias": _norm(f"{prefix}attn.c_proj.bias", hidden),
        f"{mlp}fc1.weight": _whole(f"{prefix}mlp.c_fc.weight", ffn, hidden, 0, transposed=True),
        f"{mlp}fc1.bias": _whole(f"{prefix}mlp.c_fc.bias", ffn, None, 0),
        f"{mlp}fc2.weight": _whole(f"{prefix}mlp.c_proj.weight", hidden, ffn, 1, transposed=True),
        f"{mlp}fc2.bias": _norm(f"{prefix}mlp.c_proj.bias", hidden),
    }
    for ours, theirs in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
        for kind in ("weight", "bias"):
            layouts[f"{ours}.{kind}"] = _norm(f"{prefix}{theirs}.{kind}", hidden)
    return layouts


def _qkv(shape: ModelShape, prefix: str, kind: str, *, joined: str | None) -> tuple[Piece, ...]:
    """Group-major: the query heads of a KV group, its key head, its value head, then the next group.

    `joined` names the tensor that holds all queries, all keys and all values, where the files have one.
    """
    head, groups = shape.head_dim, shape.num_query_groups
    queries = shape.num_attention_heads // groups * head
    # (tensor, its first row, rows of a group) of each of the three
    if joined is not None:
        name = f"{prefix}{joined}.{kind}"
        parts = [(name, 0, queries), (name, groups * queries, head), (name, groups * (queries + head), head)]
    else:
        parts = [(f"{prefix}{which}_proj.{kind}", 0, queries if which == "q" else head) for which in "qkv"]
    return tuple(
        Piece(name, first + group * width, first + (group + 1) * width)
        for group in range(groups)
        for name, first, width in parts
    )


def _gate_and_up(architecture: Architecture, prefix: str) -> tuple[tuple[Piece, ...], ...]:
    """Two blocks: the gate's rows, then those of the up projection."""
    ffn = architecture.shape.ffn_hidden_size
    if architecture.fused:
        name = f"{prefix}gate_up_proj.weight"
        return (Piece(name, 0, ffn),), (Piece(name, ffn, 2 * ffn),)
    return (Piece(f"{prefix}gate_proj.weight", 0, ffn),), (Piece(f"{prefix}up_proj.weight", 0, ffn),)
