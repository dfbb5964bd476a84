"""Sharded Megatron-core checkpoint -> Hugging Face directory that vanilla transformers loads.

One layer's parameter is read, taken apart into Hugging Face tensors and put into the current weight file; memory
never holds more than one weight file. No model is built and no process group is needed, so any machine that sees the
files can export. Import followed by export is bitwise the identity: numbers keep the type that the source has, tied
heads stay tied, the padding of the vocabulary is cut off.

The directory is written beside its target, read back (names, shapes, sizes), synced and renamed: an export is whole
or absent.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from launcher.contract.errors import CheckpointError, ModelError
from launcher.contract.rundir import read_json, sync_path, write_json
from sft.hf.carried import Carried
from sft.hf.files import check_model_files, sync_files, write_weights
from sft.hf.processor_template import drop_processor_templates, unite_templates
from sft.hf.sharded_reader import ShardedReader
from sft.hf.shards_of_source import write_shards_of_source
from sft.models.architecture import Architecture
from sft.models.registry import read_architecture
from sft.models.stored_tensors import INDEX, SINGLE, has_weights, read_header, weight_map
from sft.models.weight_map import checkpoint_key, split_parameter

MAX_FILE_BYTES = 4 * 10**9
"""Largest weight file: what a reader without slicing must hold at once."""

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
"""Of a tokenizer's directory, what is the tokenizer: not weights, not notes, not code."""

_MODEL_SETTINGS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Of a model's directory, what is about the model: how it answers, and how images are prepared for it."""

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def export_checkpoint(
    checkpoint_dir: Path,
    model_dir: Path,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_dir: Path | None = None,
    chat_template: bytes | None = None,
) -> None:
    """Write the model in `checkpoint_dir` to `out_dir`, with config and generation settings from `model_dir`.

    `dtype` None keeps each tensor's type in `model_dir`, or where that has no weights the checkpoint's.
    """
    architecture = read_architecture(model_dir)
    if architecture.weights.language_prefix is not None and not has_weights(model_dir):
        raise ModelError(f"{model_dir}: no weight files; the parts of the model that are not trained come from them")
    reader = ShardedReader(checkpoint_dir)
    _check_checkpoint(reader, checkpoint_dir, architecture)
    maps = architecture.weights.parameters()
    stacked = architecture.weights.stacked
    with whole_directory(out_dir) as aside:
        dtypes = _export_dtypes(reader, model_dir, architecture, dtype)
        write_model(
            lambda name: split_parameter(maps[name], reader.tensor(*checkpoint_key(name, stacked=stacked))),
            architecture,
            dtypes,
            model_dir,
            aside,
        )
        copy_settings(model_dir, tokenizer_dir or model_dir, chat_template, aside)
        write_config(model_dir, aside, trained_dtypes(architecture, dtypes))
        check_export(aside, architecture)


def check_export(directory: Path, architecture: Architecture) -> None:
    """Raise ModelError with what is wrong in the weight files of an export."""
    check_model_files(directory, replace(architecture, weights=architecture.weights.unquantized()))


@contextmanager
def whole_directory(out_dir: Path) -> Iterator[Path]:
    """Yield a directory to write into, which takes the place of `out_dir` when the block ends without an error."""
    aside = out_dir.parent / f".{out_dir.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        sync_files(aside)
        _replace(out_dir, aside)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"export {out_dir}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def plan_files(
    architecture: Architecture, dtypes: Mapping[str, torch.dtype], most: int, carried: Mapping[str, int] | None = None
) -> list[list[str]]:
    """Return the parameters of each weight file, in model order, and behind them `carried` tensors, given with sizes.

    A file has at most `most` bytes, or one parameter.
    """
    parameters = {
        name: part.rows * (part.columns or 1) * dtypes[part.pieces[0].name].itemsize
        for name, part in architecture.weights.parameters().items()
    }
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in [*parameters.items(), *(carried or {}).items()]:
        if files[-1] and filled + size > most:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def _check_checkpoint(reader: ShardedReader, checkpoint_dir: Path, architecture: Architecture) -> None:
    """Refuse a checkpoint of another model before anything is written."""
    for name, parameter_map in architecture.weights.parameters().items():
        key, index = checkpoint_key(name, stacked=architecture.weights.stacked)
        layers = () if index is None else (architecture.shape.num_layers,)
        columns = () if parameter_map.columns is None else (parameter_map.columns,)
        expected = (*layers, parameter_map.rows, *columns)
        found = _with_joined_rows(reader.shape(key), len(layers), len(columns))
        if parameter_map.padded and len(found) == len(expected) and found[0] >= parameter_map.rows:
            found = (parameter_map.rows, *found[1:])
        if found != expected:
            raise CheckpointError(
                f"checkpoint {checkpoint_dir}: {key} is {list(reader.shape(key))}; config.json says {list(expected)}"
            )


def _with_joined_rows(shape: tuple[int, ...], before: int, after: int) -> tuple[int, ...]:
    """Return the shape with one axis of rows between `before` and `after` axes: experts' weights have several."""
    rows = shape[before : len(shape) - after]
    return (*shape[:before], math.prod(rows), *shape[len(shape) - after :])


def _export_dtypes(
    reader: ShardedReader, model_dir: Path, architecture: Architecture, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Return the number type of every Hugging Face tensor. `dtype` is for those that are trained."""
    if has_weights(model_dir):
        own = file_dtypes(model_dir, architecture)
    else:
        own = {
            piece.name: reader.dtype(checkpoint_key(name, stacked=architecture.weights.stacked)[0])
            for name, parameter_map in architecture.weights.parameters().items()
            for piece in parameter_map.pieces
        }
    return own if dtype is None else own | dict.fromkeys(trained_dtypes(architecture, own), dtype)


def trained_dtypes(architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Return the number types of the tensors that can be trained: others keep theirs whatever the model has."""
    parts = architecture.weights.parameters().values()
    frozen = {piece.name for part in parts if part.frozen for piece in part.pieces}
    return {name: dtype for name, dtype in dtypes.items() if name not in frozen}


def file_dtypes(model_dir: Path, architecture: Architecture) -> dict[str, torch.dtype]:
    """Return the number type of every tensor of a model directory."""
    files = weight_map(model_dir)
    headers = {file: read_header(model_dir / file) for file in set(files.values())}
    return {
        name: torch.bfloat16 if name in architecture.weights.mxfp4 else _DTYPES[headers[files[name]][name].dtype]
        for name in architecture.weights.hf_shapes()
    }


def write_model(
    tensors_of: Callable[[str], Mapping[str, torch.Tensor]],
    architecture: Architecture,
    dtypes: Mapping[str, torch.dtype],
    model_dir: Path,
    directory: Path,
) -> None:
    """Write all weight files, and their index where there is more than one.

    `tensors_of` gives the Hugging Face tensors that make up a parameter. Those that are no part of the trained model
    come from `model_dir`.
    """
    if architecture.weights.language_prefix is not None:
        write_shards_of_source(tensors_of, architecture, dtypes, model_dir, directory)
        return
    carried = Carried.of(model_dir, architecture)
    plan = plan_files(architecture, dtypes, MAX_FILE_BYTES, carried.sizes)
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(plan, start=1):
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            unchanged = carried.tensor(name)
            if unchanged is not None:
                tensors[name] = unchanged
                continue
            for hf_name, tensor in tensors_of(name).items():
                tensors[hf_name] = tensor.to(dtypes[hf_name])
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        write_weights(tensors, directory / file)
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(plan) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def copy_settings(model_dir: Path, tokenizer_dir: Path, chat_template: bytes | None, directory: Path) -> None:
    """Copy tokenizer, generation and image settings, and the chat template that the run was trained with."""
    found = {path for pattern in _TOKENIZER_FILES for path in tokenizer_dir.glob(pattern)}
    for path in [*sorted(found), *(model_dir / name for name in _MODEL_SETTINGS)]:
        if path.is_dir():
            shutil.copytree(path, directory / path.name)
        elif path.is_file():
            shutil.copyfile(path, directory / path.name)
    if chat_template is not None:
        (directory / "chat_template.jinja").write_bytes(chat_template)
        # Those of the tokenizer would be chosen for conversations with tools, which were trained with this one.
        shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
        drop_processor_templates(directory)
    else:
        unite_templates(directory)


def write_config(model_dir: Path, directory: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Write the source's config.json, with another number type where the weights have one, and no quantization."""
    config: dict[str, object] = read_json(model_dir / "config.json") or {}
    quantized = config.pop("quantization_config", None) is not None
    used = set(dtypes.values())
    dtype = str(used.pop()).removeprefix("torch.") if len(used) == 1 else None
    stated = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if dtype is None or all(config.get(key) == dtype for key in stated):
        if quantized:
            write_json(directory / "config.json", config)
        else:
            shutil.copyfile(model_dir / "config.json", directory / "config.json")
    else:
        text = config.get("text_config")
        inner = {"text_config": text | {key: dtype for key in stated if key in text}} if isinstance(text, dict) else {}
        write_json(directory / "config.json", config | dict.fromkeys(stated, dtype) | inner)


def _replace(target: Path, aside: Path) -> None:
    """Put `aside` in the place of `target`. An earlier export is removed only when the new one is complete."""
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    sync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)
