"""The safetensors files of a Hugging Face model directory: which tensor is where, whether all of it is there.

A directory that was copied halfway fails here, in seconds and before any rank starts, with the name of the file and
of the tensor. `check_model_files` reads only file headers: a header's last offset gives the size a file must have.

Rejected: pickled weights (pytorch_model.bin). Unpickling runs code from the file, and a slice of one tensor cannot
be read without reading all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors import SafetensorError, safe_open

from launcher.contract.errors import ModelError
from launcher.contract.rundir import sync_path
from sft.hf import mxfp4
from sft.hf.sliceable import Sliceable
from sft.models.architecture import Architecture
from sft.models.stored_tensors import INDEX, TensorHeader, read_header, weight_map
from sft.models.weight_map import ParameterMap, Piece

if TYPE_CHECKING:
    import torch

_FLOATS = ("BF16", "F16", "F32", "F64")
_BYTES = ("U8",)
_SHOWN = 3
_ROWS_COMPARED = 4096
_END_BYTES = 2**20

_COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of the names of RoPE's frequencies and GPT-2's causal masks."""


class _FileTensor(Sliceable, Protocol):
    def get_dtype(self) -> str: ...

    def get_shape(self) -> list[int]: ...


class _WeightFile(Protocol):
    """What safetensors opens."""

    def get_slice(self, name: str) -> _FileTensor: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


def read_piece(
    tensor: Sliceable, piece: Piece, parameter_map: ParameterMap, columns: slice = slice(None)
) -> torch.Tensor:
    """Return the rows of a piece, or some of their columns, from its tensor."""
    found = tensor[parameter_map.place(replace(piece, step=1), columns)]
    return (found.T if parameter_map.transposed else found)[:: piece.step]


class WeightFiles:
    """Reads tensors of a model directory by slices; a file is opened when the first tensor in it is needed."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._files = weight_map(model_dir)
        self._open: dict[str, _WeightFile] = {}
        self._dequantized: mxfp4.Mxfp4Tensor | None = None

    def tensor(self, name: str, shape: tuple[int, ...]) -> Sliceable:
        """Return an object whose indexing reads only those rows and columns of `name`."""
        if name not in self._files and mxfp4.stored_names(name)[0] in self._files:
            return self._of_mxfp4(name, shape)
        return self._stored(name, shape, _FLOATS)

    def _of_mxfp4(self, name: str, shape: tuple[int, ...]) -> Sliceable:
        """Return a tensor whose files hold blocks and scales. The latest stays, with what was read of it."""
        if self._dequantized is None or self._dequantized.name != name:
            names, shapes = mxfp4.stored_names(name), mxfp4.stored_shapes(shape)
            parts = (self._stored(part, size, _BYTES) for part, size in zip(names, shapes, strict=True))
            self._dequantized = mxfp4.Mxfp4Tensor(name, *parts)
        return self._dequantized

    def _stored(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> _FileTensor:
        if name not in self._files:
            raise ModelError(f"{self.model_dir}: no tensor {name} in any weight file")
        path = self.model_dir / self._files[name]
        try:
            found = self._opened(path).get_slice(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: tensor {name} cannot be read ({error})") from None
        problem = _problem(path, name, found.get_dtype(), tuple(found.get_shape()), shape, dtypes)
        if problem:
            raise ModelError(problem)
        return found

    def places(self, names: Iterable[str]) -> list[tuple[Path, int, int]]:
        """Return file, first byte and end of each of these tensors, as far as they are there."""
        stored = {own for name in names for own in (name, *mxfp4.stored_names(name)) if own in self._files}
        headers = {file: read_header(self.model_dir / file) for file in {self._files[name] for name in stored}}
        found = ((self._files[name], headers[self._files[name]][name]) for name in stored)
        return [(self.model_dir / file, header.begin, header.begin + header.size) for file, header in found]

    def sizes(self, beginnings: tuple[str, ...]) -> dict[str, int]:
        """Return the bytes of each tensor whose name begins with one of these."""
        files = {name: file for name, file in self._files.items() if name.startswith(beginnings)}
        headers = {file: read_header(self.model_dir / file) for file in set(files.values())}
        return {name: headers[file][name].size for name, file in files.items()}

    def unchanged(self, name: str) -> torch.Tensor:
        """Return the whole tensor `name` in whatever number type it has."""
        path = self.model_dir / self._files[name]
        try:
            return self._opened(path).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: tensor {name} cannot be read ({error})") from None

    def _opened(self, path: Path) -> _WeightFile:
        if path.name not in self._open:
            self._open[path.name] = safe_open(path, framework="pt")
        return self._open[path.name]


def check_model_files(model_dir: Path, architecture: Architecture) -> None:
    """Raise one ModelError with everything that is missing, truncated, of another shape or not supported."""
    files = weight_map(model_dir)
    headers: dict[str, dict[str, TensorHeader]] = {}
    problems: list[str] = []
    for file in sorted(set(files.values())):
        try:
            headers[file] = read_header(model_dir / file)
        except ModelError as error:
            problems += error.problems
    if not problems:
        problems = _tensor_problems(model_dir, files, headers, architecture)
    if not problems and architecture.shape.tied_embeddings and architecture.weights.head in files:
        head = architecture.weights.head
        problems = _tied_head_problems(model_dir, headers[files[head]][head], architecture)
    if problems:
        more = [f"{model_dir}: {len(problems) - _SHOWN} more such problems"] if len(problems) > _SHOWN else []
        raise ModelError([*problems[:_SHOWN], *more])


def weights_identity(model_dir: Path) -> str:
    """Return a digest of the weight files (sizes, first and last bytes) that tells models of equal shapes apart."""
    digest = hashlib.sha256()
    for name in sorted(set(weight_map(model_dir).values())):
        path = model_dir / name
        size = path.stat().st_size
        digest.update(f"{name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def write_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one weight file with the permissions of the umask (the library's own mode is owner only)."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def sync_files(directory: Path) -> None:
    """Flush every file of a finished directory to disk, before the directory is renamed."""
    for path in [*directory.rglob("*"), directory]:
        sync_path(path)


def _tensor_problems(
    model_dir: Path, files: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorHeader]], model: Architecture
) -> list[str]:
    """Return what is wrong with the tensors of complete files."""
    wanted = _stored_shapes(model)
    problems = []
    for name, (shape, dtypes) in wanted.items():
        if name not in files:
            problems.append(f"{model_dir}: no tensor {name} in any weight file{_bare_model(name, files)}")
        elif name not in headers[files[name]]:
            problems.append(f"{model_dir / files[name]}: no tensor {name}, though {INDEX} names it")
        else:
            found = headers[files[name]][name]
            problem = _problem(model_dir / files[name], name, found.dtype, found.shape, shape, dtypes)
            problems += [problem] if problem else []
    # A weight that no layer takes would be lost without a word, and again at export. Old files keep what is computed,
    # and a tied model's head may be there as a copy of its embedding.
    known = {*wanted, model.weights.head} if model.shape.tied_embeddings else set(wanted)
    for name in sorted(set(files) - known):
        if not name.endswith(_COMPUTED) and not name.startswith(model.weights.carried):
            problems.append(
                f"{model_dir / files[name]}: tensor {name} has no place in a {model.shape.model_type} model"
            )
    if model.weights.language_prefix is not None:  # those that are carried are known one by one
        lost = [name for name in model.weights.carried if not any(own.startswith(name) for own in files)]
        problems += [f"{model_dir}: no tensor {name} in any weight file" for name in lost]
    return problems


def _bare_model(name: str, files: Mapping[str, str]) -> str:
    """Return what to do about files of the base model alone, whose names lack its name in front."""
    inner = name.partition(".")[2]
    if inner not in files:
        return ""
    return f", only {inner}; save the whole model (AutoModelForCausalLM), not the base model in it"


def _stored_shapes(model: Architecture) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Return shape and possible number types of each tensor of the files."""
    found: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, shape in model.weights.hf_shapes().items():
        if name in model.weights.mxfp4:
            parts = zip(mxfp4.stored_names(name), mxfp4.stored_shapes(shape), strict=True)
            found |= {part: (size, _BYTES) for part, size in parts}
        else:
            found[name] = (shape, _FLOATS)
    return found


def _tied_head_problems(model_dir: Path, head: TensorHeader, model: Architecture) -> list[str]:
    """Return whether a tied model's second copy of its embedding is none: transformers unties two that differ."""
    import torch

    shape = (model.shape.vocab_size, model.shape.hidden_size)
    if head.shape == shape:
        files = WeightFiles(model_dir)
        copy, original = files.tensor(model.weights.head, shape), files.tensor(model.weights.embedding_name, shape)
        starts = range(0, shape[0], _ROWS_COMPARED)
        if all(torch.equal(copy[row : row + _ROWS_COMPARED], original[row : row + _ROWS_COMPARED]) for row in starts):
            return []
    names = model.weights.head, model.weights.embedding_name
    return [f"{model_dir}: config.json ties the embeddings, but {names[0]} differs from {names[1]}"]


def _problem(
    path: Path, name: str, dtype: str, found: tuple[int, ...], shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> str | None:
    """Return why this tensor is not the one that the config describes, or None."""
    if found != shape:
        return f"{path}: tensor {name} is {list(found)}; by config.json it should be {list(shape)}"
    if dtype not in dtypes:
        return f"{path}: tensor {name} is {dtype}; supported are {', '.join(dtypes)}"
    return None
