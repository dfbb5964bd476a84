"""Read parameters from the sharded weights of NeMo 2 and Megatron-core.

Megatron-core writes whole parameters in chunks, whatever the topology, so no rank's share is needed to read them. Keys
have the wrapper's prefix (`module.` in NeMo 2, `model.` in NeMo 1.x). The key of a layer's parameter has all layers on
a leading axis, or one layer under its number. Optimizer states and extra states of Transformer Engine (scales of fp8)
are skipped.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from launcher.contract.errors import ModelError
from sft.hf.sharded_reader import ShardedReader
from sft.models.weight_map import ParameterMap, canonical_name

_PREFIX = re.compile(r"^((module|model)\.)+")
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_NO_WEIGHTS = re.compile(r"^(optimizer|chained_\d+\.optimizer|rng_state|rerun_state)|_extra_state|inv_freq")


class DistributedWeights:
    """The parameters in the sharded checkpoint in `directory`, of a model of `num_layers` layers."""

    def __init__(self, directory: Path, num_layers: int) -> None:
        self._directory = directory
        self._reader = ShardedReader(directory)
        self._places: dict[str, tuple[str, int | None]] = {}
        for key in sorted(self._reader.keys()):
            if not _NO_WEIGHTS.search(key):
                self._add(key, _PREFIX.sub("", key), num_layers)

    def _add(self, key: str, name: str, num_layers: int) -> None:
        """Record where the parameters of `key` are: under its name, or one name for each layer."""
        match = _STACKED.fullmatch(name)
        if match is None:
            self._places[canonical_name(name)] = key, None
            return
        layers = self._reader.shape(key)[0]
        if layers != num_layers:
            raise ModelError(f"model.path: {self._directory}: {key} has {layers} layers; the config says {num_layers}")
        for layer in range(layers):
            self._places[canonical_name(f"decoder.layers.{layer}.{match[1]}")] = key, layer

    def names(self) -> set[str]:
        """Return the names of all parameters."""
        return set(self._places)

    def dtype(self, name: str) -> torch.dtype:
        """Return the number type of a parameter that is there."""
        return self._reader.dtype(self._places[name][0])

    def parameter(self, name: str, parameter_map: ParameterMap) -> Tensor:
        """Return the whole parameter without vocabulary padding, or raise ModelError for a wrong size."""
        if name not in self._places:
            raise ModelError(f"model.path: {self._directory}: no parameter {name}")
        whole = self._reader.tensor(*self._places[name])
        columns = () if parameter_map.columns is None else (parameter_map.columns,)
        enough = len(whole) >= parameter_map.rows if parameter_map.padded else len(whole) == parameter_map.rows
        if tuple(whole.shape[1:]) != columns or not enough:
            wanted = [parameter_map.rows, *columns]
            raise ModelError(f"model.path: {name} is {list(whole.shape)}; by the config it should be {wanted}")
        return whole[: parameter_map.rows]
