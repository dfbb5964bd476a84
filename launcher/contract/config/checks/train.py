"""Checks of length, optimizer, precision and adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from launcher.contract.cuda_graphs import no_graphs, no_graphs_because
from launcher.contract.hardware import gpu_kinds
from launcher.contract.spec import Fp8Spec, OptimizerSpec, RunSpec, TrainSpec
from launcher.contract.spec.fields import Problem, field_problems
from launcher.contract.spec.model import ALL_LINEAR
from launcher.contract.spec.rules import shown
from launcher.contract.spec.train import FP8_LINEARS
from launcher.contract.steps import schedule_problems, share_of_steps


def length_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield where the length of the training is missing, or given twice."""
    steps, epochs = spec.train.max_steps, spec.train.epochs
    if steps is None and epochs is None:
        yield "train.max_steps", "missing; set train.max_steps or train.epochs"
    if steps is not None and epochs is not None:
        yield "train.max_steps", f"{steps} and train.epochs {shown(epochs)} exclude each other; drop one"


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
    yield from _warmup_problems(spec.train)
    yield from _shape_problems(optimizer)
    steps = spec.train.max_steps or optimizer.decay_steps or 0  # those of train.epochs are known to prepare alone
    if steps > 0 and not any(field_problems(optimizer, "warmup_ratio")):
        yield from schedule_problems(optimizer, steps)


def bad_step_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield a way back to checkpoints that there will not be."""
    if spec.train.on_bad_step == "rewind" and spec.checkpoint.every is None and not spec.checkpoint_ranking.keep_best:
        yield "train.on_bad_step", "rewind needs checkpoint.every: without it the first checkpoint is the last step's"


def number_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield number types and kernels that the rest of the settings leave no use for."""
    train = spec.train
    if train.precision == "fp32" and train.optimizer.grad_reduce != "fp32":
        yield (
            "train.optimizer.grad_reduce",
            f"{train.optimizer.grad_reduce} with train.precision fp32, whose gradients are summed in fp32; drop one",
        )
    yield from _attention_problems(spec)
    if train.linear_attention == "fla":
        if train.deterministic:
            yield "train.linear_attention", f"fla{_TIMED}"
        elif train.precision == "fp32":
            yield "train.linear_attention", "fla does not compute in fp32, which train.precision is; set it to auto"
        elif not spec.resources.gpus_per_node:
            yield "train.linear_attention", "fla needs GPUs, and resources.gpus_per_node is 0; set it to auto"


_TIMED = ": its results depend on timing, which train.deterministic refuses; set it to auto"


def _attention_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield why the attention kernel that is named would not be used."""
    key, kernel, train = "train.attention", spec.train.attention, spec.train
    if kernel == "auto":
        return
    dropout = spec.model.attention_dropout
    lacks = {"is a kernel of fused layers, and train.kernels is plain": train.kernels == "plain"}
    if kernel == "flash4":
        lacks["computes in half precision, and train.precision is fp32"] = train.precision == "fp32"
        lacks[f"has no dropout, and model.attention_dropout is {dropout:g}"] = dropout > 0
    found = [f"{kernel} {lack}; set it to auto" for lack, is_so in lacks.items() if is_so]
    if train.deterministic and kernel == "flash4":
        found.append(f"{kernel}{_TIMED}")
    if not found and not spec.resources.gpus_per_node:
        found.append(f"{kernel} is a kernel for GPUs, and resources.gpus_per_node is 0; set it to auto")
    yield from ((key, problem) for problem in found)


def recompute_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield a number of recomputed layers where no whole layers are, or all have to be."""
    layers, recompute = spec.train.recompute_layers, spec.train.recompute
    if layers is None or recompute == "full":
        return
    why = "all inputs of layers go to the host" if recompute == "offload" else "no whole layers are computed again"
    yield "train.recompute_layers", f"{layers} needs train.recompute full; with {recompute} {why}"


def graph_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield why layers cannot be launched as CUDA graphs where they must be, as far as the config alone says."""
    if spec.train.cuda_graphs != "always":
        return
    because = "train.kernels plain" if spec.train.kernels == "plain" else no_graphs_because(spec, None)
    if because is None and not spec.resources.gpus_per_node:
        because = "there are no GPUs: resources.gpus_per_node 0"
    if because is not None:
        yield "train.cuda_graphs", no_graphs(because)


def _warmup_problems(train: TrainSpec) -> Iterator[Problem]:
    """Yield what is wrong with a warm-up that is given as a share of the run."""
    optimizer = train.optimizer
    if optimizer.warmup_ratio is None:
        return
    key, ratio = "train.optimizer.warmup_ratio", shown(optimizer.warmup_ratio)
    if optimizer.warmup_steps:
        yield key, f"{ratio} and train.optimizer.warmup_steps {optimizer.warmup_steps} exclude each other; drop one"
    if optimizer.decay_steps is None:
        return
    if train.max_steps is None:
        yield key, f"{ratio} with train.optimizer.decay_steps needs train.max_steps; give train.optimizer.warmup_steps"
    elif (steps := share_of_steps(optimizer.warmup_ratio, train.max_steps)) >= optimizer.decay_steps:
        yield (
            key,
            f"{ratio} of {train.max_steps} steps is a warm-up of {steps}, which train.optimizer.decay_steps "
            f"{optimizer.decay_steps} includes and must be above",
        )


def _shape_problems(optimizer: OptimizerSpec) -> Iterator[Problem]:
    """Yield settings of another schedule than the chosen one, and those that the chosen one lacks."""
    schedule = optimizer.schedule
    settings: dict[str, tuple[str, object]] = {
        "wsd_steps": ("wsd", optimizer.wsd_steps),
        "wsd_decay": ("wsd", optimizer.wsd_decay),
        "power": ("polynomial", optimizer.power),
        "cycles": ("cosine_with_restarts", optimizer.cycles),
    }
    for name, (owner, value) in settings.items():
        if value is not None and schedule != owner:
            yield f"train.optimizer.{name}", f"{shown(value)} belongs to schedule {owner}, and schedule is {schedule}"
        if value is None and schedule == owner and name in ("power", "cycles"):
            yield f"train.optimizer.{name}", f"missing; schedule {schedule} needs it"
    if schedule == "constant":
        for name, value, unset in (("min_lr", optimizer.min_lr, 0.0), ("decay_steps", optimizer.decay_steps, None)):
            if value != unset:
                yield f"train.optimizer.{name}", f"{shown(value)}: schedule constant does not decay; drop one"
    if optimizer.initial_lr and not (optimizer.warmup_steps or optimizer.warmup_ratio):
        yield (
            "train.optimizer.initial_lr",
            f"{shown(optimizer.initial_lr)} begins a warm-up, and there is none; give train.optimizer.warmup_steps",
        )
    if schedule != "inverse_sqrt":
        return
    if not (optimizer.warmup_steps or optimizer.warmup_ratio):
        yield "train.optimizer.schedule", "inverse_sqrt is measured by the warm-up; give train.optimizer.warmup_steps"
    if optimizer.decay_steps is not None:
        yield "train.optimizer.decay_steps", f"{optimizer.decay_steps}: inverse_sqrt has no end; drop it"


def fp8_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield why fp8 cannot be, before the ranks find out, and settings of it that have no meaning."""
    fp8 = spec.train.fp8
    if spec.train.precision != "fp8":
        given = {name: value for name, value in dataclasses.asdict(fp8).items() if value != getattr(Fp8Spec(), name)}
        for name, value in given.items():
            yield f"train.fp8.{name}", f"{shown(value)} needs train.precision fp8, which is {spec.train.precision}"
        return
    for name in fp8.bf16_gradients:
        if name not in FP8_LINEARS:
            yield "train.fp8.bf16_gradients", f"{name!r} is no linear of a layer; known are {', '.join(FP8_LINEARS)}"
    if len(set(fp8.bf16_gradients)) < len(fp8.bf16_gradients):
        yield "train.fp8.bf16_gradients", f"{fp8.bf16_gradients} names a linear twice"
    if fp8.gradients != "e4m3" and set(fp8.bf16_gradients) >= set(FP8_LINEARS):
        yield "train.fp8.gradients", f"{fp8.gradients} is of no use where train.fp8.bf16_gradients names every linear"
    if fp8.experts and fp8.gradients != "e4m3":
        yield "train.fp8.experts", f"torch's grouped product takes e4m3 alone, not train.fp8.gradients {fp8.gradients}"
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
            "model.lora.rslora": lora.rslora,
            "model.lora.dora": lora.dora,
            "model.lora.router": lora.router,
            "train.optimizer.loraplus_ratio": spec.train.optimizer.loraplus_ratio,
            "checkpoint.export_merged": spec.checkpoint.export_merged,
        }
        for key, value in given.items():
            if value:
                yield key, f"{value} needs model.lora.rank, which is unset"
        return
    if len(set(lora.targets)) < len(lora.targets):
        yield "model.lora.targets", f"{lora.targets} names a layer twice"
    if ALL_LINEAR in lora.targets and lora.targets != [ALL_LINEAR]:
        yield "model.lora.targets", f"{ALL_LINEAR} stands for every linear layer; drop it or the other names"
    if lora.dora and lora.dropout:
        yield (
            "model.lora.dora",
            f"with model.lora.dropout {shown(lora.dropout)} each layer's own product would have to be computed a "
            "second time, of dropped inputs; set model.lora.dropout to 0",
        )
    if spec.model.init == "random":
        yield "model.init", "random with model.lora.rank: adapters need weights to adapt, and only they are saved"
    if spec.checkpoint.export_merged and not spec.checkpoint.export:
        yield "checkpoint.export_merged", "needs checkpoint.export: true"
