"""Which tensors the safetensors files of a model directory hold, by their headers and the index alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor as its file's header gives it."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    begin: int
    """The first of them in the file."""


def has_weights(model_dir: Path) -> bool:
    """Return whether `model_dir` names any weight file."""
    return (model_dir / SINGLE).is_file() or (model_dir / INDEX).is_file()


def weight_map(model_dir: Path) -> dict[str, str]:
    """Return the file of each tensor, from the single weight file or else from the index, as transformers does."""
    if (model_dir / SINGLE).is_file():
        return dict.fromkeys(read_header(model_dir / SINGLE), SINGLE)
    path = model_dir / INDEX
    if not path.is_file():
        pickled = any(model_dir.glob("pytorch_model*.bin"))
        hint = "; pickled weights are not read, save the model with safe_serialization" if pickled else ""
        raise ModelError(f"{model_dir}: neither {SINGLE} nor {INDEX}{hint}")
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not an index of weight files ({type(error).__name__}: {error})") from None
    outside = sorted({file for file in named.values() if Path(file).name != file})
    if outside:
        raise ModelError(f"{path}: names {outside[0]!r}, which is not a file of this directory")
    return named


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file, or raise ModelError if it is absent, damaged or truncated."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(f"{path}: truncated: {size} bytes, too few for its header")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        found = {
            name: TensorHeader(entry["dtype"], tuple(entry["shape"]), end - begin, 8 + length + begin)
            for name, entry in tensors.items()
            for begin, end in [entry["data_offsets"]]
        }
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; {INDEX} names it") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelError(f"{path}: not a safetensors file") from None
    if size < end:
        raise ModelError(f"{path}: truncated: {size} bytes, its header says {end}")
    return found
