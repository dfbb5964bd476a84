"""Tensors of a source that are no part of the model, and that its export has unchanged (`WeightMap.carried`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sft.hf.files import WeightFiles
from sft.models.architecture import Architecture
from sft.models.stored_tensors import has_weights


@dataclass(frozen=True, slots=True)
class Carried:
    """The carried tensors of one model directory."""

    files: WeightFiles | None = None
    sizes: Mapping[str, int] | None = None
    """Bytes by name."""

    @classmethod
    def of(cls, model_dir: Path, architecture: Architecture) -> Carried:
        """Return those of a source, which may have a config alone, and then none."""
        if not architecture.weights.carried or not has_weights(model_dir):
            return cls()
        files = WeightFiles(model_dir)
        return cls(files, files.sizes(architecture.weights.carried))

    def tensor(self, name: str) -> torch.Tensor | None:
        """Return a whole tensor in its own number type, or None if it is not among those carried."""
        if self.files is None or self.sizes is None or name not in self.sizes:
            return None
        return self.files.unchanged(name)
