"""Read whole parameters from the weight files of a NeMo 1.x checkpoint, which its ranks wrote.

NeMo's GPT has two sets of names: its own (`language_model.encoder.layers.0.self_attention.query_key_value.weight`)
and, since it is built on Megatron-core, that one's. Both are translated into the names of `sft.models.weight_map`, with
global layer numbers.

Tensor-parallel parts follow the weight map, as Megatron-core's do. NeMo's own code has two variants: with
`megatron_legacy` a rank's query, key and value follow one another and not head by head, and `swiglu` keeps gate and up
projection as two matrices where `fast-swiglu` and Megatron-core have one.

Files are pickles. They are loaded with weights_only, which builds tensors and plain containers and runs no code. A
training checkpoint that contains more is refused. Tensors stay on disk until they are used.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launcher.contract.errors import ModelError
from launcher.contract.model_shape import ModelShape
from launcher.contract.nemo.entries import Entries, value_of
from sft.models.weight_map import (
    EMBEDDING,
    FINAL_NORM,
    FINAL_NORM_BIAS,
    OUTPUT,
    POSITIONS,
    ParameterMap,
    canonical_name,
)

WEIGHTS = "model_weights.ckpt"

_RANK_FOLDER = re.compile(r"(?:mp_rank_(?P<mp>\d+)(?:_(?P<mp_stage>\d+))?|tp_rank_(?P<tp>\d+)_pp_rank_(?P<stage>\d+))")
_CHUNK = re.compile(r"model(\d*)\.")

_OUTER = {
    "language_model.embedding.word_embeddings.weight": EMBEDDING,
    "language_model.embedding.position_embeddings.weight": POSITIONS,
    "language_model.encoder.final_layernorm.weight": FINAL_NORM,
    "language_model.encoder.final_layernorm.bias": FINAL_NORM_BIAS,
    "language_model.output_layer.weight": OUTPUT,
}
_MODULES = {
    "input_layernorm": "input_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_h_to_4h_2": "mlp.linear_fc1.up",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
"""NeMo's modules of a layer -> Megatron-core's. `linear_fc1.up` is joined to `linear_fc1` later."""

_LAYER = re.compile(r"language_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_COMPUTED = ("_extra_state", "inv_freq", "core_attention", "position_ids")
"""Parts of the names of entries that are not weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """All parts of a checkpoint: [pipeline stage][tensor rank] -> name -> this rank's part."""

    parts: list[list[dict[str, Tensor]]]
    shape: ModelShape
    legacy_qkv: bool

    def names(self) -> set[str]:
        """Return the names of all parameters."""
        return {name for stage in self.parts for name in stage[0]}

    def dtype(self, name: str) -> torch.dtype:
        """Return the number type of a parameter that is there."""
        return next(stage[0][name].dtype for stage in self.parts if name in stage[0])

    def parameter(self, name: str, parameter_map: ParameterMap) -> Tensor:
        """Return the whole parameter without vocabulary padding, or raise ModelError for a wrong size."""
        ranks = next((stage for stage in self.parts if name in stage[0]), None)
        if ranks is None:
            raise ModelError(f"model.path: no parameter {name} in any stage of the checkpoint")
        parts = [_part(rank, name) for rank in ranks]
        if self.legacy_qkv and ".linear_qkv." in name and "layer_norm" not in name:
            parts = [_by_head(part, self.shape.num_attention_heads // len(ranks)) for part in parts]
        whole = _whole(parts, parameter_map)
        columns = () if parameter_map.columns is None else (parameter_map.columns,)
        if (
            whole.shape[1:] != columns
            or whole.shape[0] < parameter_map.rows
            or (not parameter_map.padded and len(whole) != parameter_map.rows)
        ):
            wanted = [parameter_map.rows, *columns]
            raise ModelError(f"model.path: {name} is {list(whole.shape)}; by model_config.yaml it should be {wanted}")
        return whole[: parameter_map.rows]


def open_shards(directory: Path, entries: Entries, shape: ModelShape) -> Shards:
    """Open every weight file in `directory` (a whole checkpoint, unpacked) without reading weights yet."""
    files = _weight_files(directory)
    stages = 1 + max(stage for _, stage in files)
    ranks = 1 + max(rank for rank, _ in files)
    absent = [(rank, stage) for stage in range(stages) for rank in range(ranks) if (rank, stage) not in files]
    if absent:
        named = ", ".join(f"tensor rank {rank} of stage {stage}" for rank, stage in absent[:3])
        raise ModelError(f"model.path: {directory}: no weights of {named}, of {ranks} x {stages}")
    parts = [
        [_read(files[rank, stage], stage, stages, shape.num_layers) for rank in range(ranks)] for stage in range(stages)
    ]
    return Shards(parts=parts, shape=shape, legacy_qkv=bool(value_of(entries, "model.megatron_legacy", False)))


def _weight_files(directory: Path) -> dict[tuple[int, int], Path]:
    """Return the weight files by (tensor rank, pipeline stage)."""
    files: dict[tuple[int, int], Path] = {}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        match = _RANK_FOLDER.fullmatch(folder.name)
        if match is None:
            continue
        rank = int(match["mp"] if match["mp"] is not None else match["tp"])
        files[rank, int(match["mp_stage"] or match["stage"] or 0)] = _only_checkpoint(folder)
    if not files:
        if not (directory / WEIGHTS).is_file():
            raise ModelError(
                f"model.path: {directory}: neither {WEIGHTS} nor mp_rank_* nor tp_rank_*_pp_rank_* folders"
            )
        files[0, 0] = directory / WEIGHTS
    return files


def _only_checkpoint(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    found = sorted(folder.glob("*.ckpt"))
    if len(found) != 1:
        said = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"model.path: {folder}: needs {WEIGHTS} or one .ckpt file, found {said}; leave the one to use")
    return found[0]


def _read(path: Path, stage: int, stages: int, num_layers: int) -> dict[str, Tensor]:
    """Return the parts in one rank's file by name, layers numbered through all stages."""
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"model.path: {path} cannot be loaded as weights alone ({reason}); of a training checkpoint, "
            "which holds objects besides, save the .nemo file with the NeMo that wrote it"
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"model.path: {path} holds no tensors")
    chunks = len({match[1] for name in tensors if (match := _CHUNK.match(name))}) or 1
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if any(word in name for word in _COMPUTED):
            continue
        match = _CHUNK.match(name)
        chunk = int(match[1] or 0) if match else 0
        # With virtual stages the layers of model chunk 0 of all stages come first, then those of chunk 1.
        offset = (chunk * stages + stage) * (num_layers // (stages * chunks))
        ours = _our_name(_CHUNK.sub("", name, count=1), offset)
        if ours is not None:
            found[ours] = tensor
    return found


def _our_name(name: str, offset: int) -> str | None:
    """Return our name for either code's, or None for the last stage's copy of a tied embedding."""
    name = re.sub(r"^(module\.)+", "", name)
    if name == "word_embeddings.weight":
        return None
    match = _LAYER.fullmatch(name)
    if match is None:
        return _OUTER.get(name) or canonical_name(name, offset)
    if match[2] not in _MODULES:
        raise ModelError(f"model.path: {name} has no counterpart here")
    return f"decoder.layers.{int(match[1]) + offset}.{_MODULES[match[2]]}.{match[3]}"


def _part(rank: dict[str, Tensor], name: str) -> Tensor:
    """Return one rank's part. Of a gated MLP in two matrices these are the gate's rows, then the up projection's."""
    up = name.replace(".linear_fc1.", ".linear_fc1.up.")
    return torch.cat([rank[name], rank[up]]) if up != name and up in rank else rank[name]


def _by_head(part: Tensor, heads: int) -> Tensor:
    """Return rows [query of all heads, key of all, value of all] as for each head its query, key and value."""
    return part.reshape(3, heads, -1, *part.shape[1:]).transpose(0, 1).reshape(part.shape)


def _whole(parts: list[Tensor], parameter_map: ParameterMap) -> Tensor:
    """Return the ranks' parts, joined as `parameter_map` says they were split."""
    if parameter_map.split is None or len(parts) == 1:
        return parts[0]
    if parameter_map.split == 1:
        return torch.cat(parts, dim=1)
    if len(parameter_map.blocks) == 1:
        return torch.cat(parts)
    shares = [sum(piece.rows for piece in block) // len(parts) for block in parameter_map.blocks]
    blocks = zip(*(torch.split(part, shares) for part in parts), strict=True)
    return torch.cat([row for block in blocks for row in block])
