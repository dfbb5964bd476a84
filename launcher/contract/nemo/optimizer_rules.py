"""Rules for NeMo's section `model.optim`: AdamW and its schedule."""

from __future__ import annotations

from launcher.contract.nemo.entries import Entries, number_of, value_of, whole_number_of
from launcher.contract.nemo.rule import Refused, Translation

_OPTIMIZER = "train.optimizer."
_SCHEDULE = "model.optim.sched."


def clip_grad(value: object, entries: Entries) -> Translation:
    """Translate the largest gradient norm, for which null means no clipping."""
    return Translation({f"{_OPTIMIZER}clip_grad": value or 0.0})


def optimizer(value: object, entries: Entries) -> Translation:
    """Translate NeMo's names for AdamW, which say whether its states are distributed."""
    if value in ("distributed_fused_adam", "mcore_distributed_optim"):
        return Translation({f"{_OPTIMIZER}distributed": True})
    if value in ("fused_adam", "adamw", "megatron_fused_adam"):
        return Translation({f"{_OPTIMIZER}distributed": False})
    if value == "adam" and not value_of(entries, "model.optim.weight_decay", 0):
        return Translation({f"{_OPTIMIZER}distributed": False}, "AdamW without weight decay is Adam")
    raise Refused(f"{value!r} is not supported; AdamW is (fused_adam, distributed_fused_adam)")


def betas(value: object, entries: Entries) -> Translation:
    """Translate Adam's two decay rates."""
    if value is None:
        return Translation(note="not set")
    if not isinstance(value, list) or len(value) != 2:
        raise Refused(f"{value!r} is not a list of two numbers")
    return Translation({f"{_OPTIMIZER}beta1": value[0], f"{_OPTIMIZER}beta2": value[1]})


def schedule(value: object, entries: Entries) -> Translation:
    """Translate CosineAnnealing: warm-up, cosine to min_lr, then constant_steps at min_lr.

    Formulas: NeMo 2.7.3, nemo/core/optim/lr_scheduler.py, WarmupAnnealHoldPolicy and CosineAnnealing.
    """
    if value != "CosineAnnealing":
        raise Refused(f"{value!r} is not supported; CosineAnnealing is, and no sched for a constant learning rate")
    for name in ("warmup_ratio", "constant_ratio"):
        if value_of(entries, f"{_SCHEDULE}{name}") is not None:
            raise Refused(f"{name} is not supported; give {name.replace('ratio', 'steps')}")
    rate = number_of(entries, "model.optim.lr", 0.0)
    floor = number_of(entries, f"{_SCHEDULE}min_lr", 0.0)
    if floor > rate:
        raise Refused(f"min_lr {floor} is above lr {rate}")
    warmup = whole_number_of(entries, f"{_SCHEDULE}warmup_steps", 0)
    hold = whole_number_of(entries, f"{_SCHEDULE}constant_steps", 0)
    steps = value_of(entries, f"{_SCHEDULE}max_steps") or value_of(entries, "trainer.max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise Refused("needs trainer.max_steps or a max_steps of its own")
    settings: dict[str, object] = {f"{_OPTIMIZER}warmup_steps": warmup, f"{_OPTIMIZER}min_lr": floor}
    if warmup and not hold:  # NeMo's warm-up starts at 0 only where there are constant steps
        settings[f"{_OPTIMIZER}initial_lr"] = rate / (warmup + 1)
    return _decay(settings, floor=floor, warmup=warmup, hold=hold, steps=steps)


def _decay(settings: dict[str, object], *, floor: float, warmup: int, hold: int, steps: int) -> Translation:
    """Add what follows the warm-up."""
    end = steps - hold
    if end > warmup:
        return Translation(settings | {f"{_OPTIMIZER}schedule": "cosine", f"{_OPTIMIZER}decay_steps": end})
    nothing = f"constant_steps {hold} leave no step of {steps} to decay"
    if warmup == 0:
        constant = {f"{_OPTIMIZER}lr": floor, f"{_OPTIMIZER}schedule": "constant"}
        return Translation(constant, f"{nothing}: all run at min_lr")
    linear = {f"{_OPTIMIZER}schedule": "linear", f"{_OPTIMIZER}decay_steps": warmup + 1}
    return Translation(settings | linear, f"{nothing}: min_lr follows the warm-up at once")
