"""What the steps of a job import: seconds of each attempt, on every rank."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# In one process, from the step that needs least to the one that needs most.
IN_ORDER = """
import gc, json, sys
from sft.__main__ import main

WATCHED = ("torch", "torch.distributed.checkpoint", "transformers", "pytorch_lightning", "torchmetrics.functional",
           "matplotlib")
seen = {}
frozen = 0
for step in ("preflight", "prepare", "export", "train"):
    assert main([step, sys.argv[1]]) != 0, "there is no such run, and the command has imported what it needs"
    seen[step] = [name for name in WATCHED if name in sys.modules]
    assert gc.isenabled()
    seen[step + " left alone"] = gc.get_freeze_count() > frozen
    frozen = gc.get_freeze_count()
seen["collected"] = len(gc.get_objects())

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
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-c", IN_ORDER, str(tmp_path_factory.mktemp("run") / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_step_imports_no_library_that_it_does_not_use(seen: dict[str, Any]) -> None:
    assert seen["preflight"] == []
    assert seen["prepare"] == []
    assert seen["export"] == ["torch", "torch.distributed.checkpoint"]
    assert seen["train"] == ["torch", "torch.distributed.checkpoint", "pytorch_lightning"]


def test_collections_leave_imports_alone(seen: dict[str, Any]) -> None:
    assert all(seen[f"{step} left alone"] for step in ("preflight", "prepare", "export", "train"))
    assert seen["collected"] < 20_000


def test_torchmetrics_is_whole_for_who_asks(seen: dict[str, Any]) -> None:
    """A user's metric function may use it: all its names are there, its classes are Lightning's, and it plots."""
    assert seen["version"][0].isdigit()
    assert seen["shared base"]
    assert seen["missing"] == []
    assert seen["plotted"].startswith("matplotlib")
    assert seen["absent"]
