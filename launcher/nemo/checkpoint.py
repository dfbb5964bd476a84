"""NeMo 1.x checkpoints from outside: is this one, and which model does its own model_config.yaml spell out?

A checkpoint is a `.nemo` archive (a tar file), or a directory with the same contents: model_config.yaml, and weights in
model_weights.ckpt, mp_rank_XX/ or tp_rank_XX_pp_rank_XXX/. Only the config is read here, which is enough to check a
topology; the ranks' side is `sft.nemo`. OmegaConf is imported by those functions alone that need it: ranks ask only
whether a path is such a checkpoint.
"""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigError, ModelError
from launcher.model_shape import ModelShape

if TYPE_CHECKING:
    from launcher.nemo.document import Entry

CONFIG = "model_config.yaml"
SUFFIX = ".nemo"

_LARGEST_CONFIG = 2**22


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a NeMo checkpoint, by its name and contents."""
    if path.suffix == SUFFIX:
        return path.is_file()
    return (path / CONFIG).is_file() and not (path / "config.json").exists()


def read_entries(path: Path) -> dict[str, Entry]:
    """The checkpoint's model_config.yaml, keys as they are under `model` in a NeMo config."""
    from launcher.nemo.document import read_document

    shown = f"{path}: {CONFIG}"
    text = _archived_config(path) if path.is_file() else (path / CONFIG).read_text(encoding="utf-8")
    try:
        return {f"model.{key}": entry for key, entry in read_document(text, shown).items()}
    except ConfigError as error:
        raise ModelError(error.problems) from None


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the checkpoint's model; ModelError where it has no counterpart."""
    from launcher.nemo.model_config import model_config

    try:
        return model_config(read_entries(path))
    except ConfigError as error:
        raise ModelError([f"model.path: {problem}" for problem in error.problems]) from None


def read_shape(path: Path) -> ModelShape:
    """Sizes of the checkpoint's model."""
    return ModelShape.from_config(read_config(path), str(path))


def inside(name: str, path: Path) -> PurePosixPath:
    """A member's name within the archive `path`; ModelError where it would land outside a folder it is unpacked to."""
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
