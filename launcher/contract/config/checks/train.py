"""Checks of length, optimizer, precision and adapters."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.contract.hardware import gpu_kinds
from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import Problem
from launcher.contract.spec.rules import shown


def length_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield where the length of the training is missing, or given twice."""
    steps, epochs = spec.train.max_steps, spec.train.epochs
    if steps is None and epochs is None:
        yield "train.max_steps", "missing; set train.max_steps or train.epochs"
    if steps is not None and epochs is not None:
        yield "train.max_steps", f"{steps} and train.epochs {epochs} exclude each other; drop one"


def optimizer_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield parts of the learning rate schedule that contradict each other."""
    optimizer = spec.train.optimizer
    for name, rate in (("min_lr", optimizer.min_lr), ("initial_lr", optimizer.initial_lr)):
        if rate > optimizer.lr:
            yield f"train.optimizer.{name}", f"{shown(rate)} is above train.optimizer.lr {shown(optimizer.lr)}"
    if optimizer.decay_steps is not None and optimizer.decay_steps <= optimizer.warmup_steps:
        yield (
            "train.optimizer.decay_steps",
            f"{optimizer.decay_steps} is not above train.optimizer.warmup_steps {optimizer.warmup_steps}, "
            "which it includes",
        )


def fp8_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield why fp8 cannot be, before the ranks find out."""
    if spec.train.precision != "fp8":
        return
    name = (spec.cluster.gpu or spec.cluster.gpu_type or "").lower()
    if any(kind.name == name and kind.fp8_tflops is None for kind in gpu_kinds()):
        yield "train.precision", f"fp8 on GPUs of kind {name}, which have no fp8 products; set it to bf16"


def lora_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield adapter settings without adapters, and settings that adapters exclude."""
    lora = spec.model.lora
    if lora.rank is None:
        given = {
            "model.lora.alpha": lora.alpha,
            "model.lora.targets": lora.targets,
            "model.lora.dropout": lora.dropout,
            "checkpoint.export_merged": spec.checkpoint.export_merged,
        }
        for key, value in given.items():
            if value:
                yield key, f"{value} needs model.lora.rank, which is unset"
        return
    if len(set(lora.targets)) < len(lora.targets):
        yield "model.lora.targets", f"{lora.targets} names a layer twice"
    if spec.model.init == "random":
        yield "model.init", "random with model.lora.rank: adapters need weights to adapt, and only they are saved"
    if spec.checkpoint.export_merged and not spec.checkpoint.export:
        yield "checkpoint.export_merged", "needs checkpoint.export: true"
