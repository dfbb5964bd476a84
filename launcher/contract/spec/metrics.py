"""metrics: numbers for a site's own dashboards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from launcher.contract.spec.paths import DirectoryOrTruth


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsSpec:
    """Numbers for a site's own dashboards."""

    prometheus: Annotated[str | None, DirectoryOrTruth(mounted=True)] = None
    """Keep the run's newest numbers in a file of Prometheus's text format (package prometheus_client), replaced as a
    whole every 15 s: true for RUN/metrics.prom, or the directory in which NAME.prom shall be, such as that of
    node_exporter's textfile collector."""
