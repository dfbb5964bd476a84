"""preflight: what nodes have to show before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from launcher.contract.spec.rules import AtLeast


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightSpec:
    """What every node has to show before training starts; a node that fails is named, and the run ends with 77."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: on Slurm, with several nodes or with GPUs."""
    timeout_seconds: Annotated[float, AtLeast(10)] = 60.0
    """The whole of it; a node that has said nothing by then is bad."""
    min_shm_mib: Annotated[int, AtLeast(0)] = 256
    """Free space that /dev/shm must have."""
    min_disk_gib: Annotated[float, AtLeast(0)] = 1.0
    """Free space that the run directory must have."""
    max_clock_skew_seconds: Annotated[float, AtLeast(0)] = 5.0
    """Clocks may differ by this from the first node's."""
