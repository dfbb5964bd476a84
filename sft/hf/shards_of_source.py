"""The weight files of a multimodal model with a trained language model in them: the source's files, name for name.

Tensors of other parts are copied byte for byte. Which file holds a tensor, how it is called and its number type stay
those of the source, so that whatever loads the source loads the export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from launcher.contract.rundir import read_json, write_json
from sft.hf.files import write_weights
from sft.models.architecture import Architecture
from sft.models.stored_tensors import INDEX, SINGLE, weight_map

TensorsOf = Callable[[str], Mapping[str, torch.Tensor]]
"""Name of a parameter -> the Hugging Face tensors that make it up."""


def write_shards_of_source(
    tensors_of: TensorsOf,
    architecture: Architecture,
    dtypes: Mapping[str, torch.dtype],
    model_dir: Path,
    directory: Path,
) -> None:
    """Write the files of `model_dir` to `directory`, with trained tensors in place of the language model's."""
    files = weight_map(model_dir)
    parameters = _parameter_of_tensors(architecture)
    total = 0
    for file in sorted(set(files.values())):
        names = [name for name, own in files.items() if own == file]
        trained = {parameters[name] for name in names if name in parameters}
        tensors = {
            hf_name: tensor.to(dtypes[hf_name])
            for parameter in sorted(trained)
            for hf_name, tensor in tensors_of(parameter).items()
            if files.get(hf_name) == file
        }
        head = architecture.weights.head
        if head in names and head not in tensors:  # the source also stores the tied output layer
            embedding = architecture.weights.embedding_name
            tensors[head] = tensors_of(parameters[embedding])[embedding].to(dtypes[embedding]).clone()
        with safe_open(model_dir / file, framework="pt") as source:
            tensors |= {name: source.get_tensor(name) for name in names if name not in tensors}
        write_weights(tensors, directory / file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = None if (model_dir / SINGLE).is_file() else read_json(model_dir / INDEX)
    if index is not None:
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        write_json(directory / INDEX, index)


def _parameter_of_tensors(architecture: Architecture) -> dict[str, str]:
    """Return by Hugging Face name the parameter that a tensor is a part of."""
    return {
        piece.name: name
        for name, parameter_map in architecture.weights.parameters().items()
        for piece in parameter_map.pieces
    }
