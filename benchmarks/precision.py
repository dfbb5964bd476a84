"""Held-out losses of one fine-tuning in several precisions, side by side, on one GPU.

    python -m benchmarks.precision --model MODEL --data train.jsonl --held-out held-out.jsonl

The same examples in the same order, from the same weights: what differs is the precision. The data are tokenized once;
each training is a process of its own. `--only` chooses among the precisions, `--set` gives any key of the config.
Without a GPU it needs `--cpu`, where fp8 is emulated.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from launcher.contract.config.load import load_config
from launcher.contract.rundir import RunPaths, read_lines
from launcher.contract.spec import Fp8Spec, RunSpec, to_yaml

ALL_LINEARS = ["qkv", "proj", "fc1", "fc2"]
WAYS: dict[str, tuple[Literal["fp32", "bf16", "fp8"], Fp8Spec]] = {
    "fp32": ("fp32", Fp8Spec()),
    "bf16": ("bf16", Fp8Spec()),
    "fp8": ("fp8", Fp8Spec()),
    "fp8-evaluation": ("fp8", Fp8Spec(evaluation=True)),
    "fp8-ends": ("fp8", Fp8Spec(bf16_first_layers=1, bf16_last_layers=1)),
    "fp8-wide-ends": ("fp8", Fp8Spec(bf16_first_layers=4, bf16_last_layers=4)),
    "fp8-e5m2": ("fp8", Fp8Spec(gradients="e5m2")),
    "fp8-bf16-gradients": ("fp8", Fp8Spec(bf16_gradients=ALL_LINEARS)),
}
"""By name: train.precision and train.fp8."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Held-out loss before the first and after the last step, steps, and seconds with start and evaluations."""

    before: float
    after: float
    steps: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory, .gguf file, or package:NAME/FILE")
    parser.add_argument("--data", type=Path, required=True, help="rows to train on")
    parser.add_argument("--held-out", type=Path, help="rows to evaluate on; without them a tenth of --data")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=32, help="examples in a step")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=["fp32", "bf16", "fp8", "fp8-evaluation"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the config")
    parser.add_argument("--cpu", action="store_true", help="on one CPU rank, with plain kernels")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = dict(measured(arguments, Path(folder)))
    print(table(outcomes))


def measured(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Outcome]]:
    """Yield the name and the outcome of each training, and print a line once it is done."""
    base = base_spec(arguments, folder)
    for name in arguments.only:
        precision, fp8 = WAYS[name]
        spec = dataclasses.replace(base, train=dataclasses.replace(base.train, precision=precision, fp8=fp8))
        paths = RunPaths(folder / name)
        paths.root.mkdir()
        paths.config.write_text(to_yaml(spec), encoding="utf-8")
        began = time.monotonic()
        for command in ("prepare", "train"):
            log = paths.root / f"{command}.log"
            with log.open("wb") as file:
                done = subprocess.run(
                    [sys.executable, "-m", "sft", command, str(paths.config)], stdout=file, stderr=subprocess.STDOUT
                )
            if done.returncode:
                raise SystemExit(f"{name}: {command} ended with {done.returncode}\n{log.read_text()[-3000:]}")
        found = outcome(paths, time.monotonic() - began)
        print(f"{name}: {found.before:.4f} -> {found.after:.4f}, {found.seconds:.0f} s", flush=True)
        yield name, found


def base_spec(arguments: argparse.Namespace, folder: Path) -> RunSpec:
    """Return the checked config that all trainings share."""
    held_out = f"[{arguments.held_out.resolve()}]" if arguments.held_out else None
    given = {
        "run_root": folder,
        "model.path": Path(arguments.model).resolve() if Path(arguments.model).exists() else arguments.model,
        "data.train": f"[{arguments.data.resolve()}]",
        **({"data.validation": held_out} if held_out else {"data.validation_split": "10%"}),
        "data.packing": "true",
        "data.seq_length": 2048,
        "train.epochs": arguments.epochs,
        "train.global_batch_size": arguments.batch,
        "train.micro_batch_size": 4,
        "train.optimizer.lr": arguments.lr,
        "train.optimizer.warmup_steps": 5,
        "checkpoint.export": "false",
        "logging.plot": "false",
        "resources.gpus_per_node": 0 if arguments.cpu else 1,
        "resources.tasks_per_node": 1,
    }
    overrides = [f"{key}={value}" for key, value in given.items()]
    config = folder / "cfg.yaml"
    config.write_text("name: precision\n", encoding="utf-8")
    return load_config(config, [*overrides, *arguments.set]).spec


def outcome(paths: RunPaths, seconds: float) -> Outcome:
    """Return what the run in `paths` has logged."""
    records = list(read_lines(paths.metrics))
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    steps = max(record["step"] for record in records)
    return Outcome(before=losses[0], after=losses[-1], steps=steps, seconds=seconds)


def table(outcomes: dict[str, Outcome]) -> str:
    """Return the outcomes as a Markdown table, each with its difference from bf16 where that was run."""
    lines = ["| precision | held-out before | after | beside bf16 | steps | seconds |", "|---|---|---|---|---|---|"]
    bf16 = outcomes.get("bf16")
    for name, found in outcomes.items():
        beside = "" if bf16 is None else f"{found.after - bf16.after:+.4f}"
        values = (name, f"{found.before:.4f}", f"{found.after:.4f}", beside, str(found.steps), f"{found.seconds:.0f}")
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
