"""Every form that programs may rely on, by its name: the one list that schemas, their page and tests are made from."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.api.checked import ValidRun, ValidSweep
from launcher.api.jobs import Cancelled, Resubmitted, SubmittedRun, SubmittedSweep
from launcher.api.live import Usage
from launcher.api.meanings import Explained
from launcher.api.plans import PlannedSize
from launcher.api.runs import Report, Why
from launcher.clusters.check import CheckedCluster
from launcher.clusters.init import FirstFile
from launcher.contract.forms.events import EVENTS
from launcher.contract.forms.files import (
    ErrorFile,
    Hang,
    ManifestFile,
    MetricsLine,
    Notification,
    PreflightFile,
    Progress,
)
from launcher.runs.excluded_nodes import NodeEvidence
from launcher.runs.listing import ListedRun
from launcher.runs.state import RunStatus
from launcher.sweeps.groups import RunResult
from launcher.views.logs import LogText
from launcher.views.stacks import Stacks

ANSWERS: Mapping[str, object] = {
    "validate": ValidRun | ValidSweep,
    "explain": tuple[Explained, ...],
    "plan": tuple[PlannedSize, ...],
    "submit": SubmittedRun | SubmittedSweep,
    "resubmit": SubmittedRun | Resubmitted,
    "status": tuple[RunStatus, ...],
    "why": tuple[Why, ...],
    "logs": LogText,
    "list": tuple[ListedRun, ...],
    "stacks": Stacks,
    "usage": Usage,
    "results": tuple[RunResult, ...],
    "report": Report,
    "cancel": Cancelled,
    "nodes": tuple[NodeEvidence, ...],
    "cluster": FirstFile | CheckedCluster,
}
"""What commands print with --json, by the command; `why` is `status --why`."""

FILES: Mapping[str, object] = {
    "events": EVENTS,
    "progress": Progress,
    "manifest": ManifestFile,
    "metrics": MetricsLine,
    "error": ErrorFile,
    "hang": Hang,
    "preflight": PreflightFile,
    "notification": Notification,
}
"""What runs write, by the file; of .jsonl files a line."""
