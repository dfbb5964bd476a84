"""TensorBoard, Weights & Biases, MLflow and NeMo's log file, beside metrics.jsonl: loggers told the same numbers.

They are conveniences: what goes wrong in one of them after it was set up is said once, and training goes on without it.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from launcher.contract.errors import ConfigError
from launcher.contract.logger_packages import missing_loggers
from launcher.contract.rundir import RunPaths, write_atomic
from launcher.contract.spec import RunSpec


def check_loggers(spec: RunSpec) -> None:
    """ConfigError where a package is missing that a logger needs."""
    problems = [f"{key}: {message}" for key, message in missing_loggers(spec)]
    if problems:
        raise ConfigError(problems)


class MetricLoggers:
    """The loggers a config asks for; rank 0 only."""

    def __init__(self, spec: RunSpec, paths: RunPaths, first_step: int, say: Callable[[str], None]) -> None:
        self._say = say
        logging = spec.logging
        self._loggers: list[Logger] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries; -W error must not stop a run for their deprecations
            if logging.tensorboard:
                self._loggers.append(_tensorboard(paths, first_step))
            if logging.wandb is not None:
                self._loggers.append(_wandb(logging.wandb, paths))
            if logging.mlflow is not None:
                self._loggers.append(_mlflow(logging.mlflow, paths))
            if logging.nemo:
                self._loggers.append(NemoLogger(paths.nemo_log))
        for logger in self._loggers[logging.tensorboard :]:  # TensorBoard would make a run of its own of them
            self._guarded(logger, lambda it: it.log_hyperparams(dataclasses.asdict(spec)))

    def log(self, fields: dict[str, Any]) -> None:
        """Hand on the numbers of a line of metrics.jsonl, under its step."""
        numbers = {name: value for name, value in fields.items() if isinstance(value, (int, float)) and name != "step"}
        for logger in list(self._loggers):
            self._guarded(logger, lambda it: it.log_metrics(numbers, step=fields["step"]))

    def close(self) -> None:
        """Write out what they still hold."""
        for logger in list(self._loggers):
            self._guarded(logger, lambda it: it.finalize("success"))

    def _guarded(self, logger: Logger, call: Callable[[Logger], Any]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(logger)
        except Exception as error:  # whatever a tracking server answers, it is no reason to lose a run
            self._loggers.remove(logger)
            self._say(f"{type(logger).__name__} is left out from here on: {type(error).__name__}: {error}")


def _tensorboard(paths: RunPaths, first_step: int) -> Logger:
    """Event files in RUN/tensorboard; of steps that are done again the later values count."""
    return TensorBoardLogger(paths.root, name="tensorboard", version="", purge_step=first_step + 1, flush_secs=10)


def _wandb(project: str, paths: RunPaths) -> Logger:
    """One W&B run over all attempts. Without WANDB_MODE it is kept in RUN/wandb, for `wandb sync`."""
    offline = os.environ.setdefault("WANDB_MODE", "offline") != "online"
    resume = None if offline else "allow"
    return WandbLogger(
        name=paths.name, project=project, id=paths.name, save_dir=paths.root, offline=offline, resume=resume
    )


def _mlflow(uri: str, paths: RunPaths) -> Logger:
    """One MLflow run over all attempts, in the experiment `sft`: its id is kept beside the metrics."""
    known = paths.root / "mlflow_run_id"
    where = f"sqlite:///{paths.root / 'mlflow.db'}" if uri == "local" else uri
    run_id = known.read_text(encoding="utf-8").strip() if known.exists() else None
    logger = MLFlowLogger("sft", run_name=paths.name, tracking_uri=where, run_id=run_id)
    write_atomic(known, f"{logger.run_id}\n")
    return logger


class NemoLogger(Logger):
    """Lines by the logger of `nemo.utils` (nemo_toolkit 3), in the file where NeMo's exp_manager writes rank 0's."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        from nemo.utils import logging as nemo_logging  # five seconds, and an optional package

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

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Not here: they are in the run's config.yaml."""
