"""What the steps of a job import: seconds of each attempt, on every rank."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# In one process, from the step that needs least to the one that needs most.
IN_ORDER = """
import json, sys

WATCHED = ("torch", "torch.distributed.checkpoint", "transformers", "pytorch_lightning", "torchmetrics.functional",
           "matplotlib")
seen = {}
for step, module in (("preflight", "sft.health.preflight.run"), ("prepare", "sft.commands.prepare"),
                     ("export", "sft.commands.export"), ("train", "sft.training.trainer")):
    __import__(module)
    seen[step] = [name for name in WATCHED if name in sys.modules]

import torchmetrics
from sft.runtime.lightning import LightningModule
base = sys.modules[LightningModule.__module__].Metric
seen["version"] = torchmetrics.__version__
seen["shared base"] = torchmetrics.Metric is base and issubclass(torchmetrics.Accuracy, base)
seen["missing"] = [name for name in torchmetrics.__all__ if not hasattr(torchmetrics, name)]
metric = torchmetrics.MeanMetric()
metric.update(2.0)
seen["plotted"] = type(metric.plot()[1]).__module__
try:
    torchmetrics.no_such_metric
except AttributeError:
    seen["absent"] = True
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-c", IN_ORDER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_step_imports_no_library_that_it_does_not_use(seen: dict[str, Any]) -> None:
    assert seen["preflight"] == []
    assert seen["prepare"] == ["torch"]
    assert seen["export"] == ["torch", "torch.distributed.checkpoint"]
    assert seen["train"] == ["torch", "torch.distributed.checkpoint", "pytorch_lightning"]


def test_torchmetrics_is_whole_for_who_asks(seen: dict[str, Any]) -> None:
    """A user's metric function may use it: all its names are there, its classes are Lightning's, and it plots."""
    assert seen["version"][0].isdigit()
    assert seen["shared base"]
    assert seen["missing"] == []
    assert seen["plotted"].startswith("matplotlib")
    assert seen["absent"]
