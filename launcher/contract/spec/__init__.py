"""The config of a run as frozen dataclasses: the one schema that launcher, rank program and docs share.

One file a section. A field's annotation holds its rules, the docstring below it is its reference documentation
(docs/config.md is made from it), and its default stands here and nowhere else. `launcher.contract.config.load` reads
what a user wrote into a `RunSpec`; `read_resolved` reads back what the launcher resolved: the config of every rank.

Rejected: plain dicts with `.get(key, default)` at the point of use (a typo is then silent), and one class for
all settings (a rank would carry scheduler settings, the launcher would carry optimizer code).
"""

from launcher.contract.spec.checkpoint import CheckpointSpec
from launcher.contract.spec.cluster import ClusterSpec, RuntimeSpec
from launcher.contract.spec.data import DataSpec, HubSpec, SourceSpec
from launcher.contract.spec.evaluation import EvaluationSpec
from launcher.contract.spec.logging import LoggingSpec
from launcher.contract.spec.metrics import MetricsSpec
from launcher.contract.spec.model import LoraSpec, ModelSpec
from launcher.contract.spec.notify import NotifySpec
from launcher.contract.spec.preflight import PreflightSpec
from launcher.contract.spec.resolved import is_config_of, read_resolved, sealed, to_yaml
from launcher.contract.spec.resources import ResourcesSpec
from launcher.contract.spec.restart import RestartSpec
from launcher.contract.spec.run import RunSpec
from launcher.contract.spec.topology import TopologySpec
from launcher.contract.spec.train import EarlyStoppingSpec, Fp8Spec, OptimizerSpec, TrainSpec
from launcher.contract.spec.watchdog import WatchdogSpec

__all__ = [
    "CheckpointSpec",
    "ClusterSpec",
    "DataSpec",
    "EarlyStoppingSpec",
    "EvaluationSpec",
    "Fp8Spec",
    "HubSpec",
    "LoggingSpec",
    "LoraSpec",
    "MetricsSpec",
    "ModelSpec",
    "NotifySpec",
    "OptimizerSpec",
    "PreflightSpec",
    "ResourcesSpec",
    "RestartSpec",
    "RunSpec",
    "RuntimeSpec",
    "SourceSpec",
    "TopologySpec",
    "TrainSpec",
    "WatchdogSpec",
    "is_config_of",
    "read_resolved",
    "sealed",
    "to_yaml",
]
