"""watchdog: when a run that makes no progress is ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from launcher.contract.spec.rules import Above


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogSpec:
    """When a run that makes no progress is ended, with exit code 76 and the stacks of all ranks."""

    enabled: bool = True
    """Watch."""
    multiple: Annotated[float, Above(0)] = 10.0
    """A step may take this many times the median of the steps before it."""
    floor_seconds: Annotated[float, Above(0)] = 600.0
    """A step may always take this long."""
    first_step_seconds: Annotated[float, Above(0)] = 1800.0
    """The first step of an attempt, which compiles and warms up."""
    loading_seconds: Annotated[float, Above(0)] = 3600.0
    """Meeting the other ranks, data, weights and checkpoint before the first step."""
    evaluation_seconds: Annotated[float, Above(0)] = 3600.0
    """One evaluation, its answers included."""
    checkpoint_seconds: Annotated[float, Above(0)] = 3600.0
    """One save."""
