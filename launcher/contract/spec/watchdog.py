"""watchdog: when a run that makes no progress is ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from launcher.contract.spec.rules import Above


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogSpec:
    """When a run that makes no progress is ended, with exit code 76 and the stacks of all ranks in its logs."""

    enabled: bool = True
    """Whether to watch at all."""
    multiple: Annotated[float, Above(0)] = 10.0
    """Limit of a step as a multiple of the median of the steps before it."""
    floor_seconds: Annotated[float, Above(0)] = 600.0
    """Smallest limit of a step, and how long a rank of the same host may be stopped in a save or an evaluation."""
    first_step_seconds: Annotated[float, Above(0)] = 1800.0
    """Limit of an attempt's first step, which compiles and warms up."""
    loading_seconds: Annotated[float, Above(0)] = 3600.0
    """Limit of everything before the first step: meeting the other ranks, data, weights and checkpoint."""
    evaluation_seconds: Annotated[float, Above(0)] = 3600.0
    """Limit of one evaluation with its answers."""
    checkpoint_seconds: Annotated[float, Above(0)] = 3600.0
    """Limit of one save."""
