"""preflight: what nodes have to show before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from launcher.contract.spec.rules import AtLeast


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightSpec:
    """What each node is tested for before training starts.

    A node that fails is named, and the run ends with exit code 77.
    """

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: on Slurm, with several nodes or with GPUs."""
    timeout_seconds: Annotated[float, AtLeast(10)] = 60.0
    """Time for all tests; a node that has not answered by then is bad."""
    min_shm_mib: Annotated[int, AtLeast(0)] = 256
    """Free space that /dev/shm must have, in MiB."""
    min_disk_gib: Annotated[float, AtLeast(0)] = 1.0
    """Free space that the run directory must have, in GiB."""
    max_clock_skew_seconds: Annotated[float, AtLeast(0)] = 5.0
    """Largest difference between a node's clock and the first node's."""
