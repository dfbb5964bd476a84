"""Convert a Hugging Face directory into a NeMo 2 checkpoint: sharded weights, and what NeMo needs to build the model.

It starts from an exported directory, not from a run's checkpoint, to have merged adapters and the tokenizer.
NeMo loads the result wherever it loads a checkpoint of its own. Any Megatron-core can load `weights/` alone.

The vocabulary is not padded: NeMo would count the padding's logits in every loss. It has to be divisible by the tensor
parallel size there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from launcher.contract.errors import ModelError
from sft.hf.exporter import copy_settings, file_dtypes, whole_directory
from sft.hf.files import WeightFiles, check_model_files, read_piece
from sft.hf.sharded_writer import FileChunk, write_sharded
from sft.models.architecture import Architecture
from sft.models.registry import read_architecture
from sft.models.weight_map import ParameterMap, checkpoint_key
from sft.nemo.context_writer import TOKENIZER, io_json, model_object, model_yaml

_PREFIX = "module."
_LAYER_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer that have an extra state, whether Transformer Engine is used or not."""
_CONTENT = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_sharded_model_space",
}
"""Tells NeMo how to read the keys: as those of NeMo 2.7."""


def export_nemo2(model_dir: Path, out_dir: Path) -> None:
    """Write the model in `model_dir` as the NeMo 2 checkpoint `out_dir`.

    Raise ModelError if NeMo has no class for it.
    """
    architecture = read_architecture(model_dir)
    check_model_files(model_dir, architecture)
    dtypes = set(file_dtypes(model_dir, architecture).values())
    if len(dtypes) != 1:
        raise ModelError(f"{model_dir}: weights of {len(dtypes)} number types; a NeMo 2 model has one")
    dtype = dtypes.pop()
    built = model_object(architecture, str(dtype).removeprefix("torch."))
    files, shapes, maps = WeightFiles(model_dir), architecture.weights.hf_shapes(), architecture.weights.parameters()
    with whole_directory(out_dir) as aside:
        write_sharded(
            aside / "weights",
            _file_chunks(architecture, dtype),
            lambda name: _parameter(maps[name], files, shapes),
            _extra_states(architecture),
            {"content_metadata": _CONTENT},
        )
        context = aside / "context"
        (context / TOKENIZER).mkdir(parents=True)
        copy_settings(model_dir, model_dir, None, context / TOKENIZER)
        (context / "io.json").write_text(json.dumps(io_json(built)), encoding="utf-8")
        (context / "model.yaml").write_text(yaml.safe_dump(model_yaml(built)), encoding="utf-8")


def _file_chunks(architecture: Architecture, dtype: torch.dtype) -> list[FileChunk]:
    """Return every parameter under its key, those of layers with their place on the leading axis."""
    found = []
    for name, parameter_map in architecture.weights.parameters().items():
        key, index = checkpoint_key(name, stacked=architecture.weights.stacked)
        own = (parameter_map.rows,) if parameter_map.columns is None else (parameter_map.rows, parameter_map.columns)
        shape = own if index is None else (architecture.shape.num_layers, *own)
        found.append(FileChunk(key=_PREFIX + key, name=name, shape=shape, dtype=dtype, index=index))
    return found


def _parameter(parameter_map: ParameterMap, files: WeightFiles, shapes: Mapping[str, tuple[int, ...]]) -> torch.Tensor:
    """Return a whole Megatron-core parameter, put together from its Hugging Face tensors."""
    parts = []
    for piece in parameter_map.pieces:
        parts.append(read_piece(files.tensor(piece.name, shapes[piece.name]), piece, parameter_map))
    return torch.cat(parts)


def _extra_states(architecture: Architecture) -> dict[str, None]:
    """Return the keys under which modules keep the scales of fp8 training, of which there are none."""
    layers = architecture.shape.num_layers
    norms = ("self_attention.q_layernorm", "self_attention.k_layernorm") if architecture.attentions[0].qk_norm else ()
    keys = [
        f"{_PREFIX}decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for module in (*_LAYER_MODULES, *norms)
        for layer in range(layers)
    ]
    return dict.fromkeys([*keys, f"{_PREFIX}decoder.final_layernorm._extra_state/shard_0_1"])
