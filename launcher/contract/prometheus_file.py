"""The newest numbers of a run in Prometheus's text format, for a site's own dashboards (metrics.prometheus).

Rank 0 replaces the file while it trains, the batch script when an attempt begins and ends. docs/how-to/dashboards.md
has names and units.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.contract.logger_packages import PROMETHEUS
from launcher.contract.manifest import read_manifest
from launcher.contract.records import is_number, read_events, read_metrics, read_progress
from launcher.contract.rundir import JsonObject, RunPaths, checkpoint_step
from launcher.contract.spec import RunSpec

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_OF_PROGRESS = {
    "step": ("sft_step", "Finished optimizer steps."),
    "max_steps": ("sft_max_steps", "Steps that the run will have at its end."),
    "loss": ("sft_loss", "Training loss of the last logged step, in nats per trained token."),
    "grad_norm": ("sft_grad_norm", "Norm of the gradient of the last logged step, before clipping."),
    "lr": ("sft_learning_rate", "Learning rate of the last logged step."),
    "tokens_per_second": ("sft_tokens_per_second", "Tokens per second, all ranks together."),
    "mfu": ("sft_mfu_ratio", "Model FLOPs utilization, a fraction of the GPUs' peak."),
    "eta_seconds": ("sft_eta_seconds", "Estimated time to the last step, in seconds."),
    "consumed_examples": ("sft_consumed_examples", "Examples trained on so far."),
}
"""Key of progress.json -> name and help of a gauge."""
_HELD_OUT = "eval_loss"


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What the file says of the run's newest attempt, besides its numbers."""

    attempt: str
    active: bool
    exit_code: int | None = None
    held_out: Mapping[str, float] | None = None
    """Newest held-out losses; None: look them up in metrics.jsonl, which may be long."""


def write_prometheus(spec: RunSpec, paths: RunPaths, standing: Standing) -> None:
    """Replace the file, where the config asks for one and the package is here. OSError where it cannot be written."""
    file = spec.prometheus_file
    if file is None or importlib.util.find_spec(PROMETHEUS) is None:  # `sft prepare` says that it is missing
        return
    from prometheus_client import CollectorRegistry, write_to_textfile

    registry = CollectorRegistry()
    registry.register(_Numbers(spec, paths, standing))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(file), registry)


class _Numbers:
    """The numbers of a run as prometheus_client collects them."""

    def __init__(self, spec: RunSpec, paths: RunPaths, standing: Standing) -> None:
        self._spec, self._paths, self._standing = spec, paths, standing

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, each with the label `run`."""
        from prometheus_client.core import CounterMetricFamily, InfoMetricFamily

        name, standing = self._paths.name, self._standing
        events = read_events(self._paths)
        info = InfoMetricFamily("sft_run", "What the run is.", labels=["run"])
        info.add_metric([name], self._about(events))
        yield info
        yield self._gauge("sft_run_active", "1 while an attempt is at work, else 0.", float(standing.active))
        if standing.exit_code is not None:
            yield self._gauge("sft_run_exit_code", "Exit code of the last attempt.", float(standing.exit_code))
        for event, metric, text in (
            ("attempt_started", "sft_attempts", "Attempts that have started."),
            ("bad_step", "sft_bad_steps", "Steps whose update was not applied."),
        ):
            counter = CounterMetricFamily(metric, text, labels=["run"])
            counter.add_metric([name], float(sum(one["event"] == event for one in events)))
            yield counter
        yield from self._of_training()
        yield self._gauge("sft_updated_timestamp_seconds", "When this file was written.", time.time())

    def _about(self, events: list[JsonObject]) -> dict[str, str]:
        started = [event for event in events if event["event"] == "attempt_started"]
        return {
            "attempt": self._standing.attempt,
            "job": str(started[-1].get("job_id", "")) if started else "",
            "cluster": self._spec.cluster.name,
            "user": read_manifest(self._paths).submitter if self._paths.manifest.is_file() else "",
            "directory": str(self._paths.root),
            "nodes": str(self._spec.resources.nodes),
            "gpus": str(self._spec.resources.nodes * self._spec.resources.gpus_per_node),
        }

    def _of_training(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        progress = read_progress(self._paths)
        for key, (metric, text) in _OF_PROGRESS.items():
            if key in progress:
                yield self._gauge(metric, text, float(progress[key]))
        known = self._standing.held_out
        held_out = newest_losses(read_metrics(self._paths)) if known is None else known
        losses = GaugeMetricFamily("sft_eval_loss", "Held-out loss, in nats per target token.", labels=["run", "set"])
        for key, value in held_out.items():
            losses.add_metric([self._paths.name, key.partition("/")[2]], value)
        yield losses
        checkpoints = self._paths.complete_checkpoints()
        if checkpoints:
            step = float(checkpoint_step(checkpoints[-1]))
            yield self._gauge("sft_checkpoint_step", "Step of the newest complete checkpoint.", step)

    def _gauge(self, metric: str, text: str, value: float) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        gauge = GaugeMetricFamily(metric, text, labels=["run"])
        gauge.add_metric([self._paths.name], value)
        return gauge


def newest_losses(metrics: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """Return the last held-out loss of each data set, by its key in metrics.jsonl."""
    return {
        key: float(value)
        for line in metrics
        for key, value in line.items()
        if (key == _HELD_OUT or key.startswith(f"{_HELD_OUT}/")) and is_number(value)
    }
