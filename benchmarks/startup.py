"""Time of the launcher's commands beyond Python's own start: `python benchmarks/startup.py`.

Each command and a bare `python -c pass` are run in turn, `--repeats` times; the difference of the best times is what is
ours. The best, because what other processes take from the machine is noise that only adds. `status` is asked about
1,000 runs of a Slurm that a small script stands in for; `--runs` says another number.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.job import Job, JobId
from launcher.contract.manifest import Manifest, write_manifest
from launcher.contract.rundir import COMPLETE, RunPaths, append_event, write_json

_MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
_CONFIG = """\
name: startup
model: {path: model}
data: {train: data.jsonl, seq_length: 128}
train: {max_steps: 3, global_batch_size: 4}
cluster: slurm-dev
"""
_SQUEUE = """\
#!/bin/bash
for ((job = 1; job <= %d; job++)); do echo "$job|PENDING|Priority|N/A|run-$job"; done
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """Best wall and processor seconds of one command."""

    wall: float
    cpu: float


def main() -> None:
    """Measure each command and print a line about it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--runs", type=int, default=1000, help="runs that `status` is asked about")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_inputs(folder, options.runs)
        launcher = ("-m", "launcher")
        commands = {
            "--help": (*launcher, "--help"),
            "validate": (*launcher, "validate", "cfg.yaml"),
            "render": (*launcher, "render", "cfg.yaml"),
            "status, no runs": (*launcher, "status", "--run-root", "none"),
            f"status, {options.runs:,} runs": (*launcher, "status", "--run-root", "runs"),
        }
        bare = ("-c", "pass")
        best = measure(folder, [bare, *commands.values()], options.repeats)
        print(f"python -c pass: {best[bare].wall:.3f} s, {best[bare].cpu:.3f} s of them on the processor; beyond that:")
        for name, words in commands.items():
            print(f"{name:<20} {best[words].wall - best[bare].wall:.3f} s, {best[words].cpu - best[bare].cpu:.3f} s")


def make_inputs(folder: Path, runs: int) -> None:
    """Write a config that renders, and run directories that squeue has jobs for."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(_MODEL))
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "cfg.yaml").write_text(_CONFIG)
    (folder / "bin").mkdir()
    squeue = folder / "bin" / "squeue"
    squeue.write_text(_SQUEUE % runs)
    squeue.chmod(0o755)
    for number in range(1, runs + 1):
        make_run(RunPaths(folder / "runs" / f"run-{number}"), str(number))


def make_run(paths: RunPaths, job_id: str) -> None:
    """Write the directory of a run that was preempted in mid-training and waits in the queue."""
    paths.root.mkdir(parents=True)
    job = Job(id=JobId(text=job_id, scheduler="slurm"), submitted_at=1.0)
    manifest = Manifest(
        name=paths.name,
        created_at=1.0,
        submitter="me",
        host="login",
        command=("launcher", "submit"),
        versions={},
        source={},
        topology={"summary": "tp2"},
        jobs=(job,),
    )
    write_manifest(paths, manifest)
    attempt = f"{job_id}.0"
    append_event(paths, "submitted", job_id=job_id, scheduler="slurm")
    append_event(paths, "attempt_started", attempt=attempt, job_id=job_id)
    append_event(paths, "training_started", attempt=attempt, step=0, max_steps=100)
    append_event(paths, "attempt_ended", attempt=attempt, exit_code=75)
    write_json(paths.progress, {"attempt": attempt, "step": 50, "max_steps": 100, "loss": 1.5})
    for step in (25, 50):
        checkpoint = paths.checkpoint(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / COMPLETE).touch()


def measure(folder: Path, commands: Sequence[tuple[str, ...]], repeats: int) -> dict[tuple[str, ...], Cost]:
    """Return the best times of each command in `repeats` rounds, in each of which every command runs once."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": root}
    found: dict[tuple[str, ...], list[Cost]] = {command: [] for command in commands}
    for _ in range(repeats):
        for command in commands:
            before, began = os.times(), time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True)
            wall, after = time.perf_counter() - began, os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            found[command].append(Cost(wall, cpu))
    return {
        command: Cost(min(cost.wall for cost in costs), min(cost.cpu for cost in costs))
        for command, costs in found.items()
    }


if __name__ == "__main__":
    main()
