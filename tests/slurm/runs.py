"""Submitting a small run to a test cluster with the command line, and reading what it left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths, read_lines
from tests.schemas import checked_output
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

CHECKOUT = Path(__file__).parents[2]

STEPS = 60
"""Some seconds of training, so that there is time to interfere."""

Curve = dict[int, tuple[float, float]]
"""Step -> (loss, grad norm)."""


@dataclass(frozen=True, slots=True)
class Workbench:
    """A folder with a model, data and a config for two nodes: tensor parallel 2 x data parallel 2."""

    root: Path
    cluster: SlurmCluster

    @property
    def config(self) -> Path:
        return self.root / "tiny.yaml"

    def run_paths(self, name: str) -> RunPaths:
        return RunPaths(self.root / "runs" / name)

    def launcher(
        self, *arguments: str, check: bool = True, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Call `python -m launcher ARGUMENTS` from the checkout, as a user would. `env` adds variables."""
        done = self.cluster.run([sys.executable, "-m", "launcher", *arguments], check=check, cwd=CHECKOUT, env=env)
        checked_output(arguments, done.stdout)
        return done

    def submit(self, name: str, *overrides: str, env: Mapping[str, str] | None = None) -> RunPaths:
        self.launcher("submit", str(self.config), f"name={name}", *overrides, env=env)
        return self.run_paths(name)

    def status(self, run: RunPaths) -> dict[str, Any]:
        """Return the run's entry in `status --json`."""
        (entry,) = json.loads(self.launcher("status", str(run.root), "--json").stdout)
        return dict(entry)

    def state(self, run: RunPaths) -> str:
        return str(self.status(run)["state"])

    def wait_for_state(self, run: RunPaths, state: str, timeout: float = 120) -> None:
        """Wait for a state; a run that ends in another one fails at once, with its log.

        The launcher is asked when there is news, and every five seconds: its start takes 20 times the CPU time of a
        look at the queue and at the run's events, and ranks that start need all there is.
        """
        asked: tuple[str, int, int] | None = None

        def reached() -> bool:
            nonlocal asked
            queue = self.cluster.run(["squeue", "--noheader", "--states=all", "--format=%i %T %r"]).stdout
            written = run.events.stat().st_size if run.events.exists() else 0
            news = (queue, written, int(time.monotonic() / 5))
            if news == asked:
                return False
            asked = news
            now = self.state(run)
            if now != state and JobState(now).terminal:
                raise AssertionError(f"{run.name} is {now}, not {state}\n{self.log(run)}")
            return now == state

        wait_until(reached, f"{run.name} to be {state}", timeout=timeout, interval=0.2)

    def log(self, run: RunPaths) -> str:
        """Return the ends of the batch logs and rank logs of all attempts."""
        files = sorted(run.logs.rglob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


def make_workbench(root: Path, cluster: SlurmCluster) -> Workbench:
    """Write model, rows and config to `root`. Dropout makes the curve depend on the random state as well."""
    make_tiny_model(root / "model", layers=2)
    write_jsonl(root / "train.jsonl", make_chat_rows(64, seed=1))
    config = {
        "cluster": "slurm-dev",
        "run_root": str(root / "runs"),
        "resources": {"nodes": 2, "tasks_per_node": 2, "gpus_per_node": 0, "time": "10", "signal_seconds": 30},
        "topology": {"tensor_parallel": 2, "sequence_parallel": True},
        "model": {"path": str(root / "model"), "hidden_dropout": 0.1},
        "data": {"train": [str(root / "train.jsonl")], "seq_length": 256, "workers": 1},
        "train": {
            "max_steps": STEPS,
            "global_batch_size": 4,
            "precision": "fp32",
            "optimizer": {"lr": 1e-3, "warmup_steps": 5},
        },
        "checkpoint": {"every": 10},
        "logging": {"plot": False},  # matplotlib takes a second of CPU time
        "preflight": {"enabled": "off"},  # its own tests switch it on: it takes some seconds of every attempt
    }
    bench = Workbench(root, cluster)
    bench.config.write_text(yaml.safe_dump(config, sort_keys=False))
    return bench


def loss_curve(run: RunPaths) -> Curve:
    """Return loss and gradient norm of every step, of steps done again after a restart those of the last time."""
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in read_lines(run.metrics) if "loss" in line}


def events(run: RunPaths, name: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run.events) if event["event"] == name]


def wait_for_checkpoint(run: RunPaths, timeout: float = 120) -> None:
    """Wait until a first complete checkpoint is there."""
    wait_until(lambda: bool(run.complete_checkpoints()), f"a checkpoint of {run.name}", timeout=timeout, interval=0.1)
