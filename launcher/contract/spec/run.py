"""The whole config of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from launcher.contract.rundir import RunPaths
from launcher.contract.schedulers import CAPABILITIES
from launcher.contract.spec.checkpoint import CheckpointSpec
from launcher.contract.spec.cluster import ClusterSpec
from launcher.contract.spec.data import DataSpec
from launcher.contract.spec.evaluation import EvaluationSpec
from launcher.contract.spec.fields import values_under
from launcher.contract.spec.logging import LoggingSpec
from launcher.contract.spec.metrics import MetricsSpec
from launcher.contract.spec.model import ModelSpec
from launcher.contract.spec.notify import NotifySpec
from launcher.contract.spec.paths import Directory, RunReference
from launcher.contract.spec.preflight import PreflightSpec
from launcher.contract.spec.resources import ResourcesSpec
from launcher.contract.spec.restart import RestartSpec
from launcher.contract.spec.rules import NAME_OF_RUN, SHELL_VARIABLE, Required
from launcher.contract.spec.topology import TopologySpec
from launcher.contract.spec.train import TrainSpec
from launcher.contract.spec.watchdog import WatchdogSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """Everything about one run."""

    name: Annotated[str, Required("give the run a name"), NAME_OF_RUN] = ""
    """Name of the run: letters, digits, dot, dash, underscore."""
    run_root: Annotated[str, Directory()] = "runs"
    """Directory that holds the run directories; on a cluster it must be on the shared file system."""
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    """A cluster's name (a file in cluster_configs/), or its settings."""
    env_from: Annotated[list[str], SHELL_VARIABLE] = field(default_factory=list)
    """Like cluster.env_from, for this run: names of variables, e.g. [WANDB_API_KEY]."""
    after: Annotated[str | None, RunReference()] = None
    """Start when this run (a name in run_root, or a directory) has succeeded. model.path, model.tokenizer and
    checkpoint.resume_from may then name what it has yet to write, e.g. RUN/export or RUN/checkpoints."""
    resources: ResourcesSpec = field(default_factory=ResourcesSpec)
    """What is asked of the scheduler."""
    topology: TopologySpec = field(default_factory=TopologySpec)
    """How the model is spread over ranks."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The model to start from."""
    data: DataSpec = field(default_factory=DataSpec)
    """What to train on."""
    train: TrainSpec = field(default_factory=TrainSpec)
    """How to train."""
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    """Answers during training."""
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    """What is kept."""
    restart: RestartSpec = field(default_factory=RestartSpec)
    """When it goes on by itself."""
    logging: LoggingSpec = field(default_factory=LoggingSpec)
    """What is written down."""
    metrics: MetricsSpec = field(default_factory=MetricsSpec)
    """Numbers for a site's own dashboards."""
    notify: NotifySpec = field(default_factory=NotifySpec)
    """Who is told when an attempt ends."""
    preflight: PreflightSpec = field(default_factory=PreflightSpec)
    """What nodes have to show before training."""
    watchdog: WatchdogSpec = field(default_factory=WatchdogSpec)
    """When a run that hangs is ended."""

    @property
    def after_directory(self) -> Path | None:
        """The directory of the run that `after` names."""
        return Path(self.run_root) / self.after if self.after else None

    def comes_later(self, path: str) -> bool:
        """Return whether `path` is in the directory of the run before this one, which may have yet to write it."""
        return self.after_directory is not None and Path(path).is_relative_to(self.after_directory)

    @property
    def secret_names(self) -> tuple[str, ...]:
        """Variables whose values come from the submitting shell."""
        return tuple(dict.fromkeys(name for _, name in values_under(self, SHELL_VARIABLE)))

    @property
    def checkpoint_ranking(self) -> CheckpointSpec:
        """The checkpoint settings by which the best are kept: its own, or those that early stopping implies."""
        early = self.train.early_stopping
        if self.checkpoint.keep_best or early.patience is None:
            return self.checkpoint
        return dataclasses.replace(self.checkpoint, keep_best=1, best_metric=early.metric, best_mode=early.mode)

    @property
    def has_preflight(self) -> bool:
        """Whether nodes are tested before training: only a scheduler that allocates nodes has others."""
        wanted = self.resources.nodes > 1 or self.resources.gpus_per_node > 0
        chosen = {"auto": wanted, "on": True, "off": False}[self.preflight.enabled]
        return chosen and CAPABILITIES[self.cluster.scheduler].allocates_nodes

    @property
    def prometheus_file(self) -> Path | None:
        """The file of metrics.prometheus, or None where none is asked for."""
        chosen = self.metrics.prometheus
        if chosen is None or chosen.lower() == "false":
            return None
        run = RunPaths(Path(self.run_root) / self.name)
        return run.prometheus if chosen.lower() == "true" else Path(chosen) / f"{self.name}.prom"

    @property
    def cache_dir(self) -> Path:
        """Where tokenized data and converted models are kept."""
        return Path(self.data.cache_dir) if self.data.cache_dir else Path(self.run_root) / ".cache"
