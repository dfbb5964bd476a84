"""What a command knows before it acts: the checked config, its layout and the directory its run would have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.checks import package_file
from launcher.config import LoadedConfig, load_config
from launcher.errors import ConfigError
from launcher.gguf_shape import read_gguf_shape
from launcher.model_shape import ModelShape, read_model_shape
from launcher.nemo.checkpoint import is_checkpoint, read_shape
from launcher.rundir import RunPaths
from launcher.spec import RunSpec
from launcher.topology import Topology, build_topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run that could be submitted."""

    config: LoadedConfig
    topology: Topology
    paths: RunPaths

    @property
    def spec(self) -> RunSpec:
        """The resolved config."""
        return self.config.spec


def make_plan(path: Path, overrides: Sequence[str] = (), cluster: str | None = None, *, resolved: bool = False) -> Plan:
    """Load and check everything that can be checked without a scheduler."""
    config = load_config(path, overrides, cluster, resolved=resolved)
    shape = model_shape_of(config.spec)
    if config.described is not None:
        _check_described(config, shape)
    topology = build_topology(config.spec, shape)
    return Plan(config=config, topology=topology, paths=RunPaths(Path(config.spec.run_root) / config.spec.name))


def _check_described(config: LoadedConfig, shape: ModelShape | None) -> None:
    """ConfigError where the model that the file spells out is not the one in model.path."""
    if shape is None or config.described is None:
        return
    described = ModelShape.from_config(dict(config.described), str(config.path))
    differences = [
        f"{config.path}: model: {field.name} is {mine}, but {theirs} in model.path {config.spec.model.path}"
        for field in dataclasses.fields(ModelShape)
        if field.name != "max_position_embeddings"  # rotary positions have no table of that length
        and (mine := getattr(described, field.name)) != (theirs := getattr(shape, field.name))
    ]
    if differences:
        raise ConfigError(differences)


def model_shape_of(spec: RunSpec) -> ModelShape | None:
    """The model's sizes, or None where they cannot be read on this machine."""
    packaged = package_file(spec.model.path) if spec.model.path.startswith("package:") else None
    path = packaged or Path(spec.model.path)
    if path.suffix == ".gguf":
        return read_gguf_shape(path)
    if is_checkpoint(path):
        return read_shape(path)
    return read_model_shape(path)
