"""Recognise NeMo and Megatron-core checkpoints, and read which model they hold.

* NeMo 1.x: a `.nemo` archive (a tar file), or a directory with the same contents. model_config.yaml spells the model
  out; the weights are in model_weights.ckpt, mp_rank_XX/, tp_rank_XX_pp_rank_XXX/, or sharded in model_weights/.
* NeMo 2: a directory with context/model.yaml and sharded weights in weights/.
* Megatron-core: sharded weights with the Hugging Face config.json of their model beside them, or one folder above in
  a directory like NeMo 2's.

Only the config is read here, which is enough to check a topology; `sft.nemo` reads the weights.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path, PurePosixPath

from launcher.contract.errors import ConfigError, ModelError
from launcher.contract.model_shape import ModelShape
from launcher.contract.nemo.context import CONTEXT, context_config
from launcher.contract.nemo.entries import Entry
from launcher.contract.usual_keys import HfConfig

CONFIG = "model_config.yaml"
SUFFIX = ".nemo"

_HF_CONFIG = "config.json"
_INDEX = ".metadata"
_FORMAT = "metadata.json"
_SHARDED = ("weights", "model_weights", ".")
"""Where sharded weights may be: in NeMo 2's folder, NeMo 1.x's, or a plain checkpoint's own."""
_LARGEST_CONFIG = 2**22  # bytes


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` is a NeMo or Megatron-core checkpoint, by its name and contents."""
    if path.suffix == SUFFIX and path.is_file():
        return True
    if (path / CONTEXT).is_file():
        return True
    if (path / _HF_CONFIG).exists():
        return sharded_dir(path) is not None and not any(path.glob("*.safetensors"))
    return (path / CONFIG).is_file()


def sharded_dir(path: Path) -> Path | None:
    """Return the folder of a checkpoint's sharded weights, or None if it has none.

    Raise ModelError if they are incomplete or in a format that is not supported.
    """
    for name in _SHARDED:
        folder = path / name
        if (folder / _INDEX).is_file():
            return folder
        try:
            backend = json.loads((folder / _FORMAT).read_text(encoding="utf-8"))["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if backend != "torch_dist":
            raise ModelError(
                f"model.path: {folder} has the format {backend!r}; only torch_dist is read. "
                "Convert it with the Megatron-core that wrote it: load it and save it as torch_dist"
            )
        raise ModelError(f"model.path: {folder} has no {_INDEX}: the checkpoint is incomplete")
    return None


def read_entries(path: Path) -> dict[str, Entry]:
    """Read a checkpoint's model_config.yaml, with the keys that a NeMo config has for it (`model.*`)."""
    # Imported here because it imports OmegaConf, which ranks do not need to recognise a checkpoint.
    from launcher.contract.nemo.document import read_document

    shown = f"{path}: {CONFIG}"
    text = _archived_config(path) if path.is_file() else (path / CONFIG).read_text(encoding="utf-8")
    try:
        return {f"model.{key}": entry for key, entry in read_document(text, shown).items()}
    except ConfigError as error:
        raise ModelError(error.problems) from None


def read_config(path: Path) -> HfConfig:
    """Return the checkpoint's model as a config.json, or raise ModelError if it has no Hugging Face counterpart."""
    if path.is_dir():
        sharded_dir(path)  # raises for a format that is not read, before a job is submitted
    if (path / CONTEXT).is_file():
        return context_config(path)
    if (path / _HF_CONFIG).is_file():
        return _stated_config(path / _HF_CONFIG)
    from launcher.contract.nemo.model_config import model_config

    try:
        return model_config(read_entries(path))
    except ConfigError as error:
        raise ModelError([f"model.path: {problem}" for problem in error.problems]) from None


def read_shape(path: Path) -> ModelShape:
    """Return the sizes of the checkpoint's model."""
    return ModelShape.from_config(read_config(path), str(path))


def _stated_config(path: Path) -> HfConfig:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {path} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"model.path: {path} holds a {type(config).__name__}, not an object")
    return config


def inside(name: str, path: Path) -> PurePosixPath:
    """Return the name of an archive's member as a path.

    Raise ModelError if it would be unpacked outside its folder.
    """
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        raise ModelError(f"model.path: {path}: member {name!r} points out of the archive; it is not unpacked")
    return place


def _archived_config(path: Path) -> str:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if inside(member.name, path).name == CONFIG and member.isfile() and member.size <= _LARGEST_CONFIG:
                    file = archive.extractfile(member)
                    assert file is not None  # a regular file
                    return file.read().decode("utf-8")
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"model.path: {path} is not a readable .nemo archive ({error})") from None
    raise ModelError(f"model.path: {path}: no {CONFIG} in the archive")
