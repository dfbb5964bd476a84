"""What the user says about a first config, and what follows for nodes and names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.config.cluster_file import load_cluster
from launcher.contract.divisors import nearest_multiples, shown_numbers
from launcher.contract.errors import ConfigError

DEFAULT_RANK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Model, data and machine of a first run."""

    model: str
    data: tuple[str, ...]
    cluster: str
    gpus: int
    """In all; 0 trains on CPU ranks."""
    lora_rank: int | None = None
    """None trains all weights."""
    name: str | None = None

    @property
    def run_name(self) -> str:
        """Name of the run: the one that was given, or the model's and the data's."""
        if self.name is not None:
            return self.name
        data = Path(self.data[0].partition(":")[0]).name.partition(".")[0]
        model = Path(self.model).name
        words = [model.removesuffix(".gguf").removesuffix(".nemo"), data, "lora" if self.lora_rank else ""]
        clean = [re.sub(r"[^a-z0-9._-]+", "-", word.lower()).strip("-.") for word in words]
        return "-".join(word for word in clean if word)[:64] or "first"

    def nodes(self) -> tuple[int, int]:
        """Return the number of nodes and the GPUs on each.

        Raise ConfigError where the GPUs are no whole nodes of the cluster.
        """
        each = load_cluster(self.cluster).resources.gpus_per_node
        if not self.gpus or not each or self.gpus <= each:
            return 1, self.gpus
        if self.gpus % each:
            nearest = shown_numbers(nearest_multiples(self.gpus, each))
            raise ConfigError(f"--gpus {self.gpus} are not whole nodes of {each} (cluster {self.cluster}): {nearest}")
        return self.gpus // each, each
