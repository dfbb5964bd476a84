"""Time from `launcher submit` to the end of the first step, phase by phase, as processes of this machine.

    python -m benchmarks.first_step --model MODEL --data train.jsonl --ranks 1 --gpus 1

Three runs: a new one, whose data are tokenized and whose model is converted if need be; one that finds both in the
cache; and one that goes on from that one's checkpoint. What the page cache of the machine holds, all of them find:
drop it before the first run to measure a cold file system. `submit` is the launcher's own time, before the queue.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.contract.records import read_events
from launcher.contract.rundir import JsonObject, RunPaths

_CONFIG = "name: first-step\ncluster: local\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory, .gguf file, or package:NAME/FILE")
    parser.add_argument("--data", type=Path, required=True, help="rows to train on")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the config")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a run may take")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(measured(arguments, Path(folder)))


def measured(arguments: argparse.Namespace, folder: Path) -> str:
    """Make the three runs, and return their phases as a Markdown table."""
    config = folder / "cfg.yaml"
    config.write_text(_CONFIG, encoding="utf-8")
    model = Path(arguments.model)
    given = {
        "run_root": folder,
        "model.path": model.resolve() if model.exists() else arguments.model,
        "data.train": f"[{arguments.data.resolve()}]",
        "data.cache_dir": folder / "cache",
        "resources.tasks_per_node": arguments.ranks,
        "resources.gpus_per_node": arguments.gpus,
        "train.global_batch_size": 8 * arguments.ranks,
        "checkpoint.every": 2,
        "checkpoint.export": "false",
        "logging.plot": "false",
    }
    common = [f"{key}={value}" for key, value in given.items()] + arguments.set
    goes_on = f"checkpoint.resume_from={RunPaths(folder / 'cached').checkpoint(2)}"
    ways = {"new": [], "cached": [], "goes on": [goes_on]}
    found: dict[str, dict[str, float]] = {}
    for steps, (name, own) in zip((2, 2, 4), ways.items(), strict=True):
        paths = RunPaths(folder / name.replace(" ", "-"))
        overrides = [*common, *own, f"name={paths.name}", f"train.max_steps={steps}"]
        found[name] = one(config, overrides, paths, arguments.limit)
    return table(found)


def one(config: Path, overrides: list[str], paths: RunPaths, limit: float) -> dict[str, float]:
    """Submit a run, wait for its end, and return the seconds of each phase."""
    began = time.monotonic()
    command = [sys.executable, "-m", "launcher", "submit", str(config), "--yes", *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    submitted = time.monotonic() - began
    while not (ends := events(paths, "attempt_ended")):
        if time.monotonic() - began > limit:
            raise SystemExit(f"{paths.root} has not ended within {limit:g} s")
        time.sleep(0.2)
    steps = events(paths, "first_step")
    if not steps:
        logs = sorted(paths.logs.rglob("*.log"))
        raise SystemExit(f"it ended with {ends[0]['exit_code']}\n" + "\n".join(log.read_text()[-1500:] for log in logs))
    return {"submit": submitted, **steps[0]["phases"], "in all": submitted + steps[0]["seconds"]}


def events(paths: RunPaths, name: str) -> list[JsonObject]:
    """Return the events of that name that a run has written so far."""
    return [event for event in read_events(paths) if event["event"] == name]


def table(found: dict[str, dict[str, float]]) -> str:
    """Return a table with a row for each phase and a column for each run."""
    phases = list(dict.fromkeys(phase for each in found.values() for phase in each if phase != "in all"))
    lines = ["| seconds | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for phase in [*phases, "in all"]:
        cells = (f"{each[phase]:.2f}" if phase in each else "" for each in found.values())
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
