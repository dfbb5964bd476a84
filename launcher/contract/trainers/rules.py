"""Rules that take several keys of a trainer together: batch, schedule, length, precision, names and adapters."""

from __future__ import annotations

from pathlib import PurePath

from launcher.contract.nemo.entries import Entries, number_of, value_of, whole_number_of
from launcher.contract.nemo.rule import Refused, Rule, Translation
from launcher.contract.trainers.word import as_number, gpus_of, whole

_OPTIMIZER = "train.optimizer."
_KWARGS = "lr_scheduler_kwargs."


def batch(packed: tuple[str, ...], lengths: tuple[str, ...], default: int) -> Rule:
    """Return the rule for the examples in one forward pass of one GPU.

    `packed` are the keys that pack examples, `lengths` those of the row length, which is `default` without them. A
    packed batch counts rows, of so many tokens each.
    """

    def rule(value: object, entries: Entries) -> Translation:
        micro = whole(value)
        steps, gpus = whole_number_of(entries, "gradient_accumulation_steps", 1), gpus_of(entries)
        rows = micro * steps * gpus
        settings: dict[str, object] = {"train.micro_batch_size": micro}
        product = f"{micro} x gradient_accumulation_steps {steps} x {gpus} GPUs (--gpus)"
        if not any(value_of(entries, key) for key in packed):
            return Translation(settings | {"train.global_batch_size": rows}, product)
        length = next((key for key in lengths if value_of(entries, key) is not None), lengths[0])
        tokens = rows * whole_number_of(entries, length, default)
        more = {"train.global_batch_unit": "tokens", "train.global_batch_size": tokens}
        return Translation(settings | more, f"{product} rows of {length} tokens")

    return rule


def warmup_steps(value: object, entries: Entries) -> Translation:
    """Translate the warm-up: steps or, below 1, a share of all steps."""
    if _scheduler(entries) == "constant":
        return Translation(note="the schedule constant has no warm-up there; constant_with_warmup has")
    number = as_number(value or 0)
    if 0 < number < 1:
        return Translation({f"{_OPTIMIZER}warmup_ratio": number})
    return Translation({f"{_OPTIMIZER}warmup_steps": int(number)})


def warmup_ratio(value: object, entries: Entries) -> Translation:
    """Translate the warm-up as a share of all steps, over which steps win."""
    if value is None or _scheduler(entries) == "constant":
        return Translation(note="no warm-up")
    if number_of(entries, "warmup_steps", 0) > 0:
        return Translation(note="warmup_steps counts")
    return Translation({f"{_OPTIMIZER}warmup_ratio": float(as_number(value))})


def schedule(value: object, entries: Entries) -> Translation:
    """Translate the schedule with its lr_scheduler_kwargs."""
    name = str(value or "linear")
    if name not in _SCHEDULES:
        raise Refused(f"{value!r} does not exist here; these do: {', '.join(_SCHEDULES)}")
    ours, used = _SCHEDULES[name]
    given = {key.removeprefix(_KWARGS) for key in entries if key.startswith(_KWARGS)}
    if given - set(used):
        raise Refused(f"lr_scheduler_kwargs {', '.join(sorted(given - set(used)))} of {name} have no counterpart")
    settings: dict[str, object] = {f"{_OPTIMIZER}schedule": ours}
    if name == "cosine_with_restarts":
        settings[f"{_OPTIMIZER}cycles"] = whole_number_of(entries, f"{_KWARGS}num_cycles", 1)
    if name == "polynomial":
        settings[f"{_OPTIMIZER}power"] = number_of(entries, f"{_KWARGS}power", 1.0)
        settings[f"{_OPTIMIZER}min_lr"] = number_of(entries, f"{_KWARGS}lr_end", 1e-7)
    if name == "cosine_with_min_lr":
        settings[f"{_OPTIMIZER}min_lr"] = _lowest(entries, "min_lr_rate")
    if name == "warmup_stable_decay":
        settings |= _stable(entries)
    return Translation(settings)


_SCHEDULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "linear": ("linear", ()),
    "cosine": ("cosine", ()),
    "constant": ("constant", ()),
    "constant_with_warmup": ("constant", ()),
    "cosine_with_restarts": ("cosine_with_restarts", ("num_cycles",)),
    "polynomial": ("polynomial", ("power", "lr_end")),
    "inverse_sqrt": ("inverse_sqrt", ()),
    "cosine_with_min_lr": ("cosine", ("min_lr", "min_lr_rate")),
    "warmup_stable_decay": ("wsd", ("num_decay_steps", "decay_type", "min_lr_ratio")),
}
"""transformers' schedule -> ours, and those of its arguments that have a counterpart."""


def _stable(entries: Entries) -> dict[str, object]:
    """Return our settings for transformers' warm-up, stable phase and decay."""
    steps = value_of(entries, f"{_KWARGS}num_decay_steps")
    if steps is None:
        raise Refused("warmup_stable_decay needs num_decay_steps in lr_scheduler_kwargs")
    return {
        f"{_OPTIMIZER}wsd_steps": whole(steps),
        f"{_OPTIMIZER}wsd_decay": value_of(entries, f"{_KWARGS}decay_type", "cosine"),
        f"{_OPTIMIZER}min_lr": _lowest(entries, "min_lr_ratio"),
    }


def _lowest(entries: Entries, share: str) -> float:
    """Return the lowest learning rate, given as such or as a share of the highest."""
    lowest = value_of(entries, f"{_KWARGS}min_lr")
    if lowest is not None:
        return float(as_number(lowest))
    ratio, rate = number_of(entries, f"{_KWARGS}{share}", 0.0), number_of(entries, "learning_rate", 0.0)
    if ratio and not rate:
        raise Refused(f"{share} is a share of learning_rate, which is not in the file")
    return share_of(rate, ratio)


def share_of(rate: float, ratio: float) -> float:
    """Return a share of a learning rate, without the digits that only binary fractions have."""
    return float(f"{rate * ratio:.12g}")


def _scheduler(entries: Entries) -> object:
    return value_of(entries, "lr_scheduler_type", value_of(entries, "lr_scheduler"))


def epochs(value: object, entries: Entries) -> Translation:
    """Translate the number of epochs, unless the file limits the steps."""
    if number_of(entries, "max_steps", -1) > 0:
        return Translation(note="max_steps counts")
    return Translation({"train.epochs": as_number(value)})


def max_steps(value: object, entries: Entries) -> Translation:
    """Translate the number of steps, of which -1 means no limit."""
    number = as_number(value if value is not None else -1)
    return Translation({"train.max_steps": number}) if number > 0 else Translation(note="no limit")


def steps_between(key: str, strategy: str, what: str) -> Rule:
    """Return the rule for a number of steps, which counts where `strategy` says so or nothing."""

    def rule(value: object, entries: Entries) -> Translation:
        chosen = value_of(entries, strategy, value_of(entries, strategy.replace("eval_", "evaluation_"), "steps"))
        if value is None or chosen != "steps":
            return Translation(note=f"{strategy} is {chosen}: no {what} by steps")
        if 0 < as_number(value) < 1:
            raise Refused(f"{value} is a share of all steps; give steps")
        return Translation({key: whole(value)})

    return rule


def strategy(key: str, steps: str) -> Rule:
    """Return the rule for when something happens, which is read with the number of `steps`."""

    def rule(value: object, entries: Entries) -> Translation:
        if value in ("no", "steps", None, False):
            return Translation(note=f"read with {steps}" if value == "steps" else "not between first and last step")
        return Translation(note=f"{value}: set {key} in steps; an epoch has examples / train.global_batch_size")

    return rule


def best_model(value: object, entries: Entries) -> Translation:
    """Translate whether the best checkpoint is what comes out at the end."""
    if not value:
        return Translation({"checkpoint.export_step": "newest"})
    metric = value_of(entries, "metric_for_best_model", "loss")
    if metric not in ("loss", "eval_loss"):
        raise Refused(f"metric_for_best_model {metric!r}: only eval_loss exists, and metrics of evaluation.metric")
    return Translation({"checkpoint.keep_best": 1})


def output_directory(value: object, entries: Entries) -> Translation:
    """Translate the run's directory, which is run_root/name here."""
    if value is None:
        return Translation(note="not set")
    path = PurePath(str(value))
    return Translation({"run_root": str(path.parent), "name": path.name}, "run directories are run_root/name")


def reporters(value: object, entries: Entries) -> Translation:
    """Translate the loggers."""
    names = [str(name) for name in value] if isinstance(value, list) else [str(value or "none")]
    known: dict[str, dict[str, object]] = {
        "none": {},
        "all": {"logging.tensorboard": True},
        "tensorboard": {"logging.tensorboard": True},
        "mlflow": {"logging.mlflow": "local"},
        "wandb": {"logging.wandb": value_of(entries, "wandb_project", value_of(entries, "project", "huggingface"))},
    }
    settings: dict[str, object] = {}
    for name in names:
        settings |= known.get(name, {})
    unknown = [name for name in names if name not in known]
    return Translation(
        settings, f"no logger for {', '.join(unknown)}; metrics.jsonl has every number" if unknown else ""
    )


def flag(on: dict[str, object], off: dict[str, object] | None = None) -> Rule:
    """Return the rule that gives these settings for true, and those for false."""

    def rule(value: object, entries: Entries) -> Translation:
        if value in (True, "auto", "true", "all"):
            return Translation(on)
        if value in (False, None, "false"):
            return Translation(off or {})
        raise Refused(f"{value!r} is not true or false")

    return rule


def betas(position: int) -> Rule:
    """Return the rule for one of Adam's decay rates, 1 or 2."""
    return lambda value, entries: Translation({} if value is None else {f"{_OPTIMIZER}beta{position}": value})


def optimizer(value: object, entries: Entries) -> Translation:
    """Translate the optimizer, which is AdamW in one of its implementations."""
    if str(value) in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw", "None"):
        return Translation(note="AdamW in full precision")
    if str(value) in ("paged_adamw_32bit", "adamw_anyprecision", "paged_adamw"):
        return Translation(note="AdamW, whose states are sharded over data parallel ranks instead of paged")
    raise Refused(f"{value!r} is not supported; AdamW with 32-bit states is (adamw_torch)")


def max_grad_norm(value: object, entries: Entries) -> Translation:
    """Translate the largest gradient norm, for which 0 means no clipping in both."""
    return Translation({} if value is None else {f"{_OPTIMIZER}clip_grad": float(as_number(value))})


def hub_or_files(key: str, split: str) -> Rule:
    """Return the rule for data named by hub id or path, with the key of their split."""

    def rule(value: object, entries: Entries) -> Translation:
        if value is None:
            return Translation(note="not set")
        part = value_of(entries, split)
        settings: dict[str, object] = {key: [str(value)]}
        return Translation(settings | ({"data.hub.split": part} if part not in (None, "train") else {}))

    return rule


def held_out_share(value: object, entries: Entries) -> Translation:
    """Translate the part of the training data that is held out: a share below 1, or a number of rows."""
    number = as_number(value or 0)
    if not number:
        return Translation(note="nothing is held out")
    return Translation({"data.validation_split": f"{number * 100:g}%" if number < 1 else str(number)})
