"""Rules for NeMo's sections `trainer` and `exp_manager`: resources, length of the run, its name and its records."""

from __future__ import annotations

from pathlib import PurePath

from launcher.contract.nemo.entries import Entries, value_of, whole_number_of
from launcher.contract.nemo.rule import Refused, Translation

_VALIDATION_FILES = "model.data.validation_ds.file_names"


def devices(value: object, entries: Entries) -> Translation:
    """Translate the devices of a node into GPUs, or into ranks for a CPU run."""
    accelerator = value_of(entries, "trainer.accelerator", "gpu")
    if not isinstance(value, int) or value < 1:
        raise Refused(f"{value!r} is not a number of devices; say how many each node has")
    if accelerator not in ("gpu", "cuda", "cpu"):
        raise Refused(f"trainer.accelerator {accelerator!r} is not gpu or cpu")
    return Translation({"resources.tasks_per_node" if accelerator == "cpu" else "resources.gpus_per_node": value})


def precision(value: object, entries: Entries) -> Translation:
    """Translate the precision, which is bf16 in one of its spellings or fp32."""
    text = str(value)
    if text.startswith("bf16"):
        return Translation({"train.precision": "bf16"}, "with fp32 master weights and fp32 gradient sums")
    if text in ("32", "32-true", "fp32"):
        return Translation({"train.precision": "fp32"})
    raise Refused(f"{value!r} is not supported; use bf16 or 32")


def max_steps(value: object, entries: Entries) -> Translation:
    """Translate the number of steps, for which -1 and null mean no limit."""
    if isinstance(value, int) and value > 0:
        return Translation({"train.max_steps": value})
    return Translation(note="no limit")


def max_epochs(value: object, entries: Entries) -> Translation:
    """Translate the number of epochs, unless the file limits the steps."""
    if not isinstance(value, int) or value < 1:
        return Translation(note="no limit")
    if whole_number_of(entries, "trainer.max_steps", 0) > 0:
        return Translation(note="trainer.max_steps counts; a run here has one limit, not the earlier of two")
    return Translation({"train.epochs": value})


def val_check_interval(value: object, entries: Entries) -> Translation:
    """Translate the steps between evaluations, if there is something to evaluate."""
    if value_of(entries, "trainer.limit_val_batches", 1) == 0:
        return Translation(note="evaluation is off (trainer.limit_val_batches)")
    if not value_of(entries, _VALIDATION_FILES):
        return Translation(note="no held-out data is named; set data.validation and train.eval_every")
    if not isinstance(value, int):
        raise Refused(f"{value} is a part of an epoch; give steps")
    return Translation({"train.eval_every": value})


def limit_train_batches(value: object, entries: Entries) -> Translation:
    """Refuse a part of an epoch: the float 1.0 is all of it, the whole number 1 a single batch."""
    if value is None or (isinstance(value, float) and value == 1.0):
        return Translation(note="every example is trained")
    raise Refused(f"{value!r} is not supported: every example is trained; set train.max_steps, or train.epochs: 0.1")


def log_directory(value: object, entries: Entries) -> Translation:
    """Translate the run's directory, which is run_root/name here."""
    if value is None:
        return Translation(note="not set")
    path = PurePath(str(value))
    return Translation({"run_root": str(path.parent), "name": path.name}, "run directories are run_root/name")


def experiment_name(value: object, entries: Entries) -> Translation:
    """Translate the run's name, unless exp_manager.explicit_log_dir ends with it."""
    if value_of(entries, "exp_manager.explicit_log_dir"):
        return Translation(note="exp_manager.explicit_log_dir names the run")
    return Translation({"name": value} if value else {})


def name(value: object, entries: Entries) -> Translation:
    """Translate the run's name, unless exp_manager has one."""
    if value_of(entries, "exp_manager.name") or value_of(entries, "exp_manager.explicit_log_dir"):
        return Translation(note="exp_manager names the run")
    return Translation({"name": value} if value else {})


def save_top_k(value: object, entries: Entries) -> Translation:
    """Translate the number of best checkpoints to keep, if the held-out loss decides which are best."""
    monitor = value_of(entries, "exp_manager.checkpoint_callback_params.monitor")
    if monitor not in ("val_loss", "validation_loss"):
        return Translation(note=f"{monitor} is not compared; the newest checkpoints are kept (checkpoint.keep_last)")
    if not value_of(entries, _VALIDATION_FILES):
        return Translation(note="no held-out data is named, so no checkpoint is the best")
    if not isinstance(value, int):
        raise Refused(f"{value!r} is not a number of checkpoints")
    return Translation({"checkpoint.keep_best": max(value, 0)})


def model_parallel_size(value: object, entries: Entries) -> Translation:
    """Refuse a product that does not agree with its factors."""
    tensor = whole_number_of(entries, "model.tensor_model_parallel_size", 1)
    pipeline = whole_number_of(entries, "model.pipeline_model_parallel_size", 1)
    if value not in (None, tensor, tensor * pipeline):
        raise Refused(f"{value} is not tensor {tensor} x pipeline {pipeline} = {tensor * pipeline}")
    return Translation(note="derived from the topology")


def wandb(value: object, entries: Entries) -> Translation:
    """Translate the project of Weights & Biases, if its logger is on."""
    if not value:
        return Translation(note="off")
    project = value_of(entries, "exp_manager.wandb_logger_kwargs.project") or value_of(entries, "exp_manager.name")
    if not project:
        raise Refused("needs exp_manager.wandb_logger_kwargs.project")
    return Translation({"logging.wandb": str(project)}, "kept offline unless WANDB_MODE=online")
