"""TensorBoard, Weights & Biases and MLflow for real, without a network; what an absent or broken one does."""

from __future__ import annotations

import importlib.util
import sqlite3
import warnings
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.config.checks import spec_problems
from launcher.contract.errors import ConfigError
from launcher.contract.hardware import gpu_kind
from launcher.contract.model_shape import read_model_shape
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import LoggingSpec, RunSpec
from sft.commands.prepare import check_loggers
from sft.metrics.loggers import MetricLoggers
from sft.metrics.mfu import Utilization, utilization
from tests.tiny_model import make_tiny_model


def loggers(tmp_path: Path, first_step: int = 0, **logging: Any) -> MetricLoggers:
    (tmp_path / "run").mkdir(exist_ok=True)
    spec = RunSpec(name="run", logging=LoggingSpec(**logging))
    return MetricLoggers(spec, RunPaths(tmp_path / "run"), first_step, print)


def log_attempts(tmp_path: Path, **logging: Any) -> None:
    """Three steps, of which the third is lost with its attempt and done again."""
    for first_step, losses in ((0, (3.0, 2.0, 9.0)), (2, (1.0,))):
        log = loggers(tmp_path, first_step, **logging)
        for step, loss in enumerate(losses, start=first_step + 1):
            log.log({"step": step, "loss": loss, "note": "text is left out"})
        log.close()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the package tensorboard is not installed")
def test_tensorboard(tmp_path: Path) -> None:
    log_attempts(tmp_path, tensorboard=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert "note" not in events.Tags()["scalars"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="the package mlflow is not installed")
def test_mlflow_keeps_one_run_over_attempts(tmp_path: Path) -> None:
    log_attempts(tmp_path, mlflow="local")
    with sqlite3.connect(tmp_path / "run" / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("run", "FINISHED")]
        points = database.execute("select step, value from metrics where key = 'loss' order by timestamp").fetchall()
    assert sorted(points) == [(1, 3.0), (2, 2.0), (3, 1.0), (3, 9.0)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the package wandb is not installed")
def test_wandb_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log_attempts(tmp_path, wandb="project")
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-run.wandb"))
    assert files
    assert all(file.stat().st_size > 0 for file in files)


@pytest.mark.skipif(importlib.util.find_spec("nemo") is None, reason="the package nemo_toolkit is not installed")
def test_nemos_logger_writes_where_nemo_does(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log = loggers(tmp_path, nemo=True)
    log.log({"step": 1, "loss": 3.0, "note": "text is left out"})
    log.log({"step": 2, "loss": 0.123456789, "lr": 1e-5})
    lines = RunPaths(tmp_path / "run").nemo_log.read_text().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "global_step: 1, loss: 3",
        "global_step: 2, loss: 0.123457, lr: 1e-05",
    ]
    assert all(line.startswith("[NeMo I ") for line in lines)


def test_absent_package_is_said_before_ranks_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = RunSpec(logging=LoggingSpec(tensorboard=True, wandb="project"))
    with pytest.raises(ConfigError) as caught:
        check_loggers(spec)
    assert caught.value.problems[0].startswith("logging.tensorboard: needs the package tensorboard: pip install")
    assert "logging.wandb" in dict(spec_problems(spec))
    check_loggers(RunSpec())


def test_a_broken_logger_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    log = loggers(tmp_path, tensorboard=True)
    log._loggers[0].log_metrics = _fail  # type: ignore[method-assign]
    for step in (1, 2):
        log.log({"step": step, "loss": 1.0})
    assert capsys.readouterr().out == "TensorBoardLogger failed and is no longer used: OSError: no space\n"


def _fail(*_: Any, **__: Any) -> None:
    raise OSError("no space")


def test_utilization(tmp_path: Path) -> None:
    """By hand for one product: 6 operations a parameter and token, and 6 x layers x hidden x length squared."""
    make_tiny_model(tmp_path)
    shape = read_model_shape(tmp_path)
    assert shape is not None
    used = Utilization(shape=shape, gpus=2, peak_tflops=gpu_kind("h100").bf16_tflops)
    twice = used.of(2000, 0, 1.0)
    assert twice == pytest.approx(2 * used.of(1000, 0, 1.0))
    attention = used.of(1000, 10**9, 1.0) - used.of(1000, 0, 1.0)
    heads = shape.num_layers * shape.num_attention_heads * shape.head_dim
    assert attention == pytest.approx(6 * heads * 10**9 / (2 * 989e12))
    assert utilization(RunSpec(), shape, 2) is None  # CPU ranks have no peak
