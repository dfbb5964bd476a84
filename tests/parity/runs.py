"""Small runs on CPU ranks: a run directory with a resolved config, and the rank main on it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, read_lines
from launcher.contract.spec import (
    CheckpointSpec,
    DataSpec,
    EvaluationSpec,
    LoggingSpec,
    ModelSpec,
    OptimizerSpec,
    ResourcesSpec,
    RunSpec,
    TopologySpec,
    TrainSpec,
    read_resolved,
    to_yaml,
)
from sft.data.prepared.prepare import open_or_build
from sft.data.prepared.schedule import batch_schedule
from sft.training.trainer import train
from tests.parity.reference import Curve, train_reference
from tests.ranks import run_ranks


def make_run(
    root: Path,
    model_dir: Path,
    train_file: Path,
    *,
    ranks: int,
    topology: dict[str, Any] | None = None,
    name: str = "run",
    max_steps: int = 5,
    held_out: Path | None = None,
    **settings: Any,
) -> RunPaths:
    """Make a run directory under `root`. `settings` replace fields of any section by name, `evaluation` as a whole."""
    optimizer = {"lr": 1e-2, "weight_decay": 0.01, "schedule": "constant", "clip_grad": 1.0}
    spec = RunSpec(
        name=name,
        run_root=str(root),
        resources=ResourcesSpec(tasks_per_node=ranks, **_of(ResourcesSpec, settings)),
        topology=TopologySpec(**(topology or {})),
        model=ModelSpec(path=str(model_dir)),
        data=DataSpec(
            train=[] if "sources" in settings else [str(train_file)],
            validation=[str(held_out)] if held_out else [],
            **{"seq_length": 256, "workers": 1, **_of(DataSpec, settings)},  # type: ignore[arg-type]
        ),
        train=TrainSpec(
            max_steps=max_steps,
            **{"global_batch_size": 8, "micro_batch_size": 1, "precision": "fp32", **_of(TrainSpec, settings)},
            optimizer=OptimizerSpec(**{**optimizer, **_of(OptimizerSpec, settings)}),  # type: ignore[arg-type]
        ),
        evaluation=settings.get("evaluation", EvaluationSpec()),
        checkpoint=CheckpointSpec(**{"export": False, **_of(CheckpointSpec, settings)}),
        logging=LoggingSpec(plot=False),
    )
    paths = RunPaths(root / name)
    paths.root.mkdir(parents=True, exist_ok=True)
    paths.config.write_text(to_yaml(spec))
    return paths


def run_training(paths: RunPaths, ranks: int, timeout: float = 120.0, function: Any = None) -> list[Any]:
    """Run the rank main on real ranks; asserts that each one finished its steps unless `function` replaces it."""
    results = run_ranks(ranks, function or train, paths.config, timeout=timeout)
    if function is None:
        assert results == [ExitCode.OK] * ranks
    return results


def refused(config: Path) -> str:
    """Run on a rank: why training does not start, which ends a rank with code 2."""
    try:
        train(config)
    except ConfigError as error:
        return str(error)
    return ""


def copy_start(full: RunPaths, paths: RunPaths, step: int) -> None:
    """Give a run the checkpoint and the log that another one had after `step`."""
    shutil.copytree(full.checkpoint(step), paths.checkpoint(step))
    paths.metrics.write_text("".join(full.metrics.read_text().splitlines(keepends=True)[:step]))


def expect_same_end(full: RunPaths, paths: RunPaths, ranks: int) -> None:
    """Train `paths`, on so many ranks, from the checkpoint after two steps of `full`: it ends as `full` has."""
    copy_start(full, paths, 2)
    run_training(paths, ranks)
    whole, resumed = curve(full), curve(paths)
    assert resumed[0] == pytest.approx(whole[0], rel=1e-5)
    assert resumed[1] == pytest.approx(whole[1], rel=3e-5)


def curve(paths: RunPaths) -> tuple[list[float], list[float]]:
    """Return losses and gradient norms by step, from metrics.jsonl."""
    steps = [record for record in read_lines(paths.metrics) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    return [record["loss"] for record in steps], [record["grad_norm"] for record in steps]


def reference_curve(root: Path, model: Path, train_file: Path, *, steps: int, **settings: Any) -> Curve:
    """Return what `make_run` with these settings must give, on one process."""
    spec = read_resolved(make_run(root, model, train_file, ranks=1, max_steps=steps, **settings).config)
    cache = open_or_build(spec, model, build=True).train
    return train_reference(spec, model, cache, batch_schedule(spec, cache, shuffle=True), steps)


def _of(spec: Any, settings: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(spec)}
    return {name: value for name, value in settings.items() if name in names}
