"""Convert a NeMo or Megatron-core checkpoint into a Hugging Face directory, one parameter after the other.

Memory never holds more than a weight file. An archive is unpacked beside the result first, so that weights can be
mapped from disk, and only regular files whose names stay inside it are. The tokenizer is converted if its files are in
the checkpoint, in a Hugging Face form or as GPT-2's vocabulary and merges. Another one has to be named by
`model.tokenizer`.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import yaml

from launcher.contract.errors import ModelError
from launcher.contract.model_shape import ModelShape
from launcher.contract.nemo.checkpoint import CONFIG, inside, read_config, read_entries, sharded_dir
from launcher.contract.nemo.context import CONTEXT, tokenizer_dir
from launcher.contract.nemo.entries import Entries, value_of
from sft.hf.exporter import copy_settings, write_model
from sft.hf.files import check_model_files
from sft.models.architecture import Architecture
from sft.models.registry import read_architecture
from sft.models.weight_map import ParameterMap, split_parameter
from sft.nemo.distributed import DistributedWeights
from sft.nemo.shards import open_shards

_GPT2_END = "<|endoftext|>"


class Weights(Protocol):
    """The parameters of a checkpoint, by the names of `sft.models.weight_map`."""

    def names(self) -> set[str]:
        """Return the names of all parameters."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the number type of a parameter that is there."""

    def parameter(self, name: str, parameter_map: ParameterMap) -> torch.Tensor:
        """Return the whole parameter, without vocabulary padding."""


def convert_nemo(source: Path, directory: Path) -> None:
    """Write config, weights and tokenizer of `source` into `directory`, or raise ModelError."""
    config = read_config(source)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    architecture = read_architecture(directory)
    with _unpacked(source, directory.parent) as folder:
        weights = _open_weights(folder, ModelShape.from_config(config, str(source)))
        maps = architecture.weights.parameters()
        _check_names(weights, architecture, source)
        write_model(
            lambda name: split_parameter(maps[name], weights.parameter(name, maps[name])),
            architecture,
            _dtypes(weights, maps),
            directory,
            directory,
        )
        _write_tokenizer(folder, directory)
    check_model_files(directory, architecture)


def _open_weights(folder: Path, shape: ModelShape) -> Weights:
    sharded = sharded_dir(folder)
    if sharded is not None:
        return DistributedWeights(sharded, shape.num_layers)
    return open_shards(folder, read_entries(folder), shape)


@contextmanager
def _unpacked(source: Path, beside: Path) -> Iterator[Path]:
    """Yield the checkpoint's folder, for an archive a private copy that is removed at the end."""
    if source.is_dir():
        yield source
        return
    aside = Path(tempfile.mkdtemp(prefix=".nemo.", dir=beside))
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                target = aside / inside(member.name, source)
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                file = archive.extractfile(member) if member.isfile() else None
                if file is None:
                    raise ModelError(
                        f"model.path: {source}: member {member.name!r} is a link or device; it is not unpacked"
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                with file, target.open("xb") as copy:
                    shutil.copyfileobj(file, copy, 2**24)
        yield aside
    except (tarfile.TarError, OSError) as error:
        raise ModelError(f"model.path: {source} cannot be unpacked ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_names(weights: Weights, architecture: Architecture, source: Path) -> None:
    """Raise ModelError for a weight that the model has no place for, which would be lost silently."""
    known = architecture.weights.parameters().keys()
    unknown = sorted(name for name in weights.names() - known if not name.endswith(".linear_fc1.up.weight"))
    tied = {"output_layer.weight"} if architecture.shape.tied_embeddings else set()
    if set(unknown) - tied:
        raise ModelError(f"model.path: {source}: {unknown[0]} has no place in the model of its config")


def _dtypes(weights: Weights, maps: Mapping[str, ParameterMap]) -> dict[str, torch.dtype]:
    """Return the number type of each Hugging Face tensor: that of the checkpoint."""
    held = weights.names()
    return {
        piece.name: weights.dtype(name) if name in held else torch.float32
        for name, parameter_map in maps.items()
        for piece in parameter_map.pieces
    }


def _write_tokenizer(folder: Path, directory: Path) -> None:
    """Write the tokenizer's files, where the checkpoint has any."""
    if (folder / CONTEXT).is_file():
        model = yaml.safe_load((folder / CONTEXT).read_text(encoding="utf-8"))
        copy_settings(folder, tokenizer_dir(model, folder / CONTEXT.parent), None, directory)
    elif (folder / CONFIG).is_file():
        _write_gpt2_tokenizer(folder, read_entries(folder), directory)
    else:
        copy_settings(folder, folder, None, directory)


def _write_gpt2_tokenizer(folder: Path, entries: Entries, directory: Path) -> None:
    """Write GPT-2's vocabulary and merges, which archives hold under `<hash>_vocab.json` and `<hash>_merges.txt`."""
    if value_of(entries, "model.tokenizer.type") != "GPT2BPETokenizer":
        return
    vocabulary = sorted(folder.glob("*vocab*.json"))
    merges = sorted(folder.glob("*merges*.txt"))
    if not vocabulary or not merges:
        return
    shutil.copyfile(vocabulary[0], directory / "vocab.json")
    shutil.copyfile(merges[0], directory / "merges.txt")
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": _GPT2_END,
        "eos_token": _GPT2_END,
        "unk_token": _GPT2_END,
        "add_prefix_space": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
