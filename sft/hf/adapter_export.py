"""Adapters of a sharded checkpoint -> a PEFT adapter directory, or the model with the adapter added to its weights.

The directory holds what `peft` and vLLM load: adapter_config.json, adapter_model.safetensors, and the tokenizer with
the chat template the run was trained with. Merging adds scale * B A, and with DoRA gives each row its length, in fp32
and rounds once, to the type the file has.

Rejected: to write it with `peft`. It would build the whole model to save a few matrices, and be one more dependency.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from launcher.contract.errors import CheckpointError, ModelError
from launcher.contract.hub_cache import Repository, Snapshot, cache_root, cached_commit, is_id
from launcher.contract.model_shape import ADAPTER_CONFIG
from launcher.contract.rundir import read_json, write_json
from launcher.contract.spec import LoraSpec
from sft.hf.adapter import (
    ADAPTER_WEIGHTS,
    MAGNITUDE,
    PEFT_PREFIX,
    AdapterTarget,
    AdapterTensors,
    all_targets,
    merged_weight,
)
from sft.hf.expert_adapter import ExpertTarget, all_expert_targets, weight_in_memory
from sft.hf.exporter import (
    check_export,
    copy_settings,
    file_dtypes,
    trained_dtypes,
    whole_directory,
    write_config,
    write_model,
)
from sft.hf.files import WeightFiles, write_weights
from sft.hf.joined_experts import add_joined, is_wrapper, joined, merged_tensor, of_both, wrappers
from sft.hf.peft_config import peft_config
from sft.hf.sharded_reader import ShardedReader
from sft.hf.trained_routers import frozen_parts, name_in_memory, trained_routers
from sft.models.architecture import Architecture
from sft.models.registry import read_architecture
from sft.models.weight_map import checkpoint_key

MERGED_ADAPTER = "adapter"
"""Where a merged export keeps the adapter that went into it."""


def export_adapter(
    checkpoint_dir: Path,
    model_dir: Path,
    out_dir: Path,
    lora: LoraSpec,
    *,
    merged: bool = False,
    tokenizer_dir: Path | None = None,
    chat_template: bytes | None = None,
) -> None:
    """Write the adapter in `checkpoint_dir` to `out_dir`, with `merged` also the adapted model."""
    architecture = read_architecture(model_dir)
    reader = ShardedReader(checkpoint_dir)
    targets, of_experts = all_targets(architecture, lora), all_expert_targets(architecture, lora)
    _check_checkpoint(reader, checkpoint_dir, [*targets, *of_experts], lora)
    with whole_directory(out_dir) as aside:
        copy_settings(model_dir, tokenizer_dir or model_dir, chat_template, aside)
        own = aside / MERGED_ADAPTER if merged else aside
        own.mkdir(exist_ok=True)
        _write_adapter(reader, targets, of_experts, architecture, WeightFiles(model_dir), own, lora)
        write_json(own / ADAPTER_CONFIG, peft_config(lora, architecture, model_dir, targets, of_experts))
        if merged:
            dtypes = file_dtypes(model_dir, architecture)
            merge = _Merger(reader, model_dir, architecture, targets, of_experts, lora)
            write_model(merge.tensors_of, architecture, dtypes, model_dir, aside)
            write_config(model_dir, aside, trained_dtypes(architecture, dtypes))
            check_export(aside, architecture)


def adapted_model(directory: Path) -> Path | None:
    """Return the model that the adapter in `directory` belongs to, or None where the directory holds a model."""
    if (directory / "config.json").is_file() or not (directory / ADAPTER_CONFIG).is_file():
        return None
    settings = read_json(directory / ADAPTER_CONFIG) or {}
    base, revision = str(settings["base_model_name_or_path"]), str(settings.get("revision") or "main")
    if Path(base).exists() or not is_id(base):
        return Path(base)
    repository = Repository(kind="model", id=base)
    commit = cached_commit(repository, revision)
    snapshot = Snapshot(repository=repository, commit=commit or revision, cache=cache_root())
    if not snapshot.path.is_dir():
        raise ModelError(f"{directory} is an adapter of {base} ({revision}), which is not in the cache {cache_root()}")
    return snapshot.path


@torch.no_grad()
def add_adapter(model: torch.nn.Module, directory: Path) -> None:
    """Add the adapter in `directory` to the weights of a transformers model."""
    config = read_json(directory / ADAPTER_CONFIG) or {}
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    parameters = config.get("target_parameters") or []
    for name, a in tensors.items():
        prefix, found, _ = name.partition(".lora_A.")
        module = prefix.removeprefix(PEFT_PREFIX)
        if found:
            adapter = AdapterTensors(a, tensors[f"{prefix}.lora_B.weight"], tensors.get(f"{prefix}.{MAGNITUDE}"))
            if is_wrapper(module, parameters):
                add_joined(model, module, adapter, scale, parameters)
                continue
            weight = weight_in_memory(model, module)
            weight.copy_(merged_weight(weight, adapter, scale))
        elif ".lora_" not in name:
            model.state_dict()[module].copy_(a)


class _Merger:
    """The model's tensors from its own files, with the adapter added."""

    def __init__(
        self,
        reader: ShardedReader,
        model_dir: Path,
        architecture: Architecture,
        targets: list[AdapterTarget],
        of_experts: list[ExpertTarget],
        lora: LoraSpec,
    ) -> None:
        self._reader = reader
        self._files = WeightFiles(model_dir)
        self._architecture = architecture
        self._shapes = architecture.weights.hf_shapes()
        self._targets = {f"{target.module}.weight": target for target in targets}
        separate = [target for target in of_experts if target.tensor is None]
        self._of_experts = {f"{module}.weight": target for target in separate for module in target.modules}
        self._joined = {target.tensor: target for target in of_experts if target.tensor is not None}
        # Those of all experts of a layer are read together, and gate and up projections are asked for in turn.
        self._adapters_of = lru_cache(maxsize=2)(self._read_experts)
        self._lora = lora
        self._routers = {tensor: name for name, tensor in trained_routers(architecture, lora).items()}

    def tensors_of(self, parameter: str) -> Mapping[str, torch.Tensor]:
        """Return the tensors that make up one parameter."""
        parameter_map = self._architecture.weights[parameter]
        return {name: self._tensor(name) for name in dict.fromkeys(piece.name for piece in parameter_map.pieces)}

    def _tensor(self, name: str) -> torch.Tensor:
        whole = self._files.tensor(name, self._shapes[name])[:]
        if name in self._routers:
            return _router(self._reader, self._architecture, self._routers[name])
        if name in self._targets:
            return merged_weight(whole, self._targets[name].read(self._reader, dora=self._lora.dora), self._lora.scale)
        if name in self._of_experts:
            return merged_weight(whole, self._adapters_of(self._of_experts[name])[name], self._lora.scale)
        if name in self._joined:
            target = self._joined[name]
            adapters = [adapter for _, adapter in target.read(self._reader)]
            return merged_tensor(whole, adapters, self._lora.scale, transposed=target.transposed)
        return whole

    def _read_experts(self, target: ExpertTarget) -> dict[str, AdapterTensors]:
        """Return the adapters of a layer's experts by tensor."""
        return {f"{module}.weight": adapter for module, adapter in target.read(self._reader)}


def _write_adapter(
    reader: ShardedReader,
    targets: list[AdapterTarget],
    of_experts: list[ExpertTarget],
    architecture: Architecture,
    source: WeightFiles,
    directory: Path,
    lora: LoraSpec,
) -> None:
    """Write the adapters, and with them the routers that were trained."""
    tensors: dict[str, torch.Tensor] = {}
    for target in targets:
        tensors |= target.read(reader, dora=lora.dora).named(architecture.weights.module(target.module))
    modules = wrappers([target.tensor for target in of_experts if target.tensor is not None])
    if architecture.weights.language_prefix is not None:
        # PEFT puts adapters of single experts together for language models alone.
        separate = [target for target in of_experts if target.tensor is None]
        tensors |= _joined_layers(reader, separate, architecture)
        of_experts = [target for target in of_experts if target.tensor is not None]
    for experts in of_experts:
        if experts.tensor is not None:
            adapters = joined([adapter for _, adapter in experts.read(reader)])
            tensors |= adapters.named(architecture.weights.module(modules[experts.tensor]))
            continue
        for module, adapter in experts.read(reader):
            tensors |= adapter.named(architecture.weights.module(module))
    for name, tensor in trained_routers(architecture, lora).items():
        tensors[f"{PEFT_PREFIX}{name_in_memory(architecture, tensor)}"] = _router(reader, architecture, name)
    for tensor in frozen_parts(architecture, lora):
        tensors[f"{PEFT_PREFIX}{name_in_memory(architecture, tensor)}"] = source.unchanged(tensor)
    write_weights({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / ADAPTER_WEIGHTS)


def _joined_layers(
    reader: ShardedReader, separate: list[ExpertTarget], architecture: Architecture
) -> dict[str, torch.Tensor]:
    """Return the adapters of single experts as those of the tensors in which transformers has all of a layer."""
    by_tensor: dict[str, list[ExpertTarget]] = {}
    for target in separate:
        by_tensor.setdefault(target.tensor_in_memory, []).append(target)
    places = wrappers(list(by_tensor))
    found: dict[str, torch.Tensor] = {}
    for tensor, targets in by_tensor.items():
        halves = [[adapter for _, adapter in target.read(reader)] for target in targets]
        whole = [of_both(*pair) if len(pair) == 2 else pair[0] for pair in zip(*halves, strict=True)]
        found |= joined(whole).named(architecture.weights.module(places[tensor]))
    return found


def _router(reader: ShardedReader, architecture: Architecture, name: str) -> torch.Tensor:
    return reader.tensor(*checkpoint_key(name, stacked=architecture.weights.stacked))


def _check_checkpoint(
    reader: ShardedReader, checkpoint_dir: Path, targets: list[AdapterTarget | ExpertTarget], lora: LoraSpec
) -> None:
    """Refuse the checkpoint of another rank, other targets or another model before anything is written."""
    assert lora.rank is not None
    layers = max(target.layer for target in targets) + 1
    for target in targets:
        key, index = target.checkpoint_key("lora_A")
        rows = lora.rank * (len(target.modules) if isinstance(target, ExpertTarget) else 1)
        expected = (*(() if index is None else (layers,)), rows, target.columns)
        if reader.shape(key) != expected:
            raise CheckpointError(
                f"checkpoint {checkpoint_dir}: {key} is {list(reader.shape(key))}; by model.lora and config.json it "
                f"should be {list(expected)}"
            )
