"""Loggers that get the same numbers as metrics.jsonl: TensorBoard, Weights & Biases, MLflow and NeMo's log file.

They are conveniences: a logger that fails after it was set up is reported once, and training goes on without it.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher.contract.rundir import RunPaths, write_atomic
from launcher.contract.spec import RunSpec
from sft.runtime.lightning import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


class MetricLoggers:
    """The loggers that a config asks for. Only rank 0 has them."""

    def __init__(self, spec: RunSpec, paths: RunPaths, first_step: int, say: Callable[[str], None]) -> None:
        self._say = say
        logging = spec.logging
        self._loggers: list[Logger] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # with -W error a deprecation in a logger's library would stop the run
            if logging.tensorboard:
                self._loggers.append(_tensorboard(paths, first_step))
            if logging.wandb is not None:
                self._loggers.append(_wandb(logging.wandb, paths))
            if logging.mlflow is not None:
                self._loggers.append(_mlflow(logging.mlflow, paths))
            if logging.nemo:
                self._loggers.append(NemoLogger(paths.nemo_log))
        for logger in self._loggers[logging.tensorboard :]:  # all but TensorBoard, which shows them as another run
            self._guarded(logger, lambda it: it.log_hyperparams(dataclasses.asdict(spec)))

    def log(self, fields: Mapping[str, object]) -> None:
        """Pass the numbers of a line of metrics.jsonl to all loggers, under its step."""
        numbers = {name: value for name, value in fields.items() if isinstance(value, (int, float)) and name != "step"}
        step = fields["step"]
        assert isinstance(step, int), "every line of metrics.jsonl has its step"
        for logger in list(self._loggers):
            self._guarded(logger, lambda it: it.log_metrics(numbers, step=step))

    def close(self) -> None:
        """Write what the loggers still hold in memory."""
        for logger in list(self._loggers):
            self._guarded(logger, lambda it: it.finalize("success"))

    def _guarded(self, logger: Logger, call: Callable[[Logger], object]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(logger)
        except Exception as error:  # no answer of a tracking server is a reason to lose a run
            self._loggers.remove(logger)
            self._say(f"{type(logger).__name__} failed and is no longer used: {type(error).__name__}: {error}")


def _tensorboard(paths: RunPaths, first_step: int) -> Logger:
    """Return a logger that writes event files to RUN/tensorboard."""
    # purge_step hides what an earlier attempt logged of the steps that are now done again.
    return TensorBoardLogger(paths.root, name="tensorboard", version="", purge_step=first_step + 1, flush_secs=10)


def _wandb(project: str, paths: RunPaths) -> Logger:
    """Return a logger of one W&B run for all attempts, which stays in RUN/wandb unless WANDB_MODE is `online`."""
    offline = os.environ.setdefault("WANDB_MODE", "offline") != "online"
    resume = None if offline else "allow"
    return WandbLogger(
        name=paths.name, project=project, id=paths.name, save_dir=paths.root, offline=offline, resume=resume
    )


def _mlflow(uri: str, paths: RunPaths) -> Logger:
    """Return a logger of one MLflow run for all attempts, in the experiment `sft`."""
    known = paths.root / "mlflow_run_id"
    where = f"sqlite:///{paths.root / 'mlflow.db'}" if uri == "local" else uri
    run_id = known.read_text(encoding="utf-8").strip() if known.exists() else None
    logger = MLFlowLogger("sft", run_name=paths.name, tracking_uri=where, run_id=run_id)
    write_atomic(known, f"{logger.run_id}\n")
    return logger


class NemoLogger(Logger):
    """Writes lines with the logger of `nemo.utils` (nemo_toolkit 3) to the log file of NeMo's exp_manager."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        from nemo.utils import logging as nemo_logging  # an optional package that takes five seconds to import

        nemo_logging.captureWarnings(False)
        nemo_logging.remove_stream_handlers()
        nemo_logging.add_file_handler(str(file))
        self._log = nemo_logging

    @property
    def name(self) -> str:
        return "nemo"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        numbers = ", ".join(f"{name}: {value:.6g}" for name, value in metrics.items())
        self._log.info(f"global_step: {step}, {numbers}")

    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """Do nothing: they are in the run's config.yaml."""
