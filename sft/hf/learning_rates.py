"""Learning rates of some parameters by their Hugging Face names, as multiples of the schedule's.

`train.optimizer.lr_by_name` gives rates by pattern, `train.optimizer.loraplus_ratio` gives B of each adapter another
rate than A. Megatron-core's parameters hold several tensors of the files (q, k and v are one matrix), which can only
learn at one rate: patterns that divide them are refused.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from launcher.contract.spec import LoraSpec, OptimizerSpec
from sft.hf.adapter import all_targets
from sft.hf.expert_adapter import all_expert_targets
from sft.hf.trained_routers import trained_routers
from sft.models.architecture import Architecture

_KEY = "train.optimizer.lr_by_name"


@dataclass(frozen=True, slots=True)
class Rate:
    """The learning rate of some parameters."""

    group: int
    """Number of the setting that gives it: what a checkpoint knows these parameters by, whatever the rate."""
    multiplier: float
    """Times the schedule's."""


def rates(optimizer: OptimizerSpec, lora: LoraSpec, architecture: Architecture) -> dict[str, Rate]:
    """Return the rate of each trained parameter by its name in the whole model, where it has one of its own."""
    found = {}
    for parameter, names in _trained(lora, architecture).items():
        pattern = _pattern(optimizer, names[0])
        if pattern is not None:
            number = list(optimizer.lr_by_name).index(pattern)
            found[parameter] = Rate(number + 1, float(optimizer.lr_by_name[pattern]) / optimizer.lr)
        elif optimizer.loraplus_ratio is not None and _is_beside_a(names[0]):
            found[parameter] = Rate(0, optimizer.loraplus_ratio)
    return found


def rate_groups(optimizer: OptimizerSpec) -> list[str]:
    """Return what gives parameters rates of their own, for people and for comparison with a checkpoint's."""
    return [*(["LoRA+"] if optimizer.loraplus_ratio is not None else []), *optimizer.lr_by_name]


def rate_problems(optimizer: OptimizerSpec, lora: LoraSpec, architecture: Architecture) -> list[str]:
    """Return patterns that name nothing that is trained, or never come first, and those that divide a parameter."""
    trained = _trained(lora, architecture)
    every = [name for names in trained.values() for name in names]
    chosen = {name: _pattern(optimizer, name) for name in every}
    problems = [
        f"{_KEY}: {pattern!r} matches no trained parameter; their names are like {every[0]}"
        for pattern in optimizer.lr_by_name
        if not fnmatch.filter(every, pattern)
    ]
    problems += [
        f"{_KEY}: {pattern!r} stands behind patterns that match all of its parameters, and the first that matches "
        "counts; write it before them"
        for pattern in sorted(set(optimizer.lr_by_name) - set(chosen.values()))
        if fnmatch.filter(every, pattern)
    ]
    if all(float(optimizer.lr_by_name.get(pattern or "", optimizer.lr)) == 0 for pattern in chosen.values()):
        problems.append(f"{_KEY}: every trained parameter has rate 0, so that nothing would be trained")
    for names in trained.values():
        patterns = {name: chosen[name] for name in names}
        if len(set(patterns.values())) > 1:
            shown = ", ".join(
                f"{name} {optimizer.lr_by_name.get(found or '', 'lr')}" for name, found in patterns.items()
            )
            return [*problems, f"{_KEY}: one matrix here has one learning rate, and it holds {shown}; name all of them"]
    return problems


def _is_beside_a(name: str) -> bool:
    """Return whether LoRA+ gives this tensor its own rate: B and magnitudes of an adapter."""
    return ".lora_" in name and ".lora_A." not in name


def _pattern(optimizer: OptimizerSpec, name: str) -> str | None:
    """Return the first pattern that matches, or None."""
    return next((pattern for pattern in optimizer.lr_by_name if fnmatch.fnmatchcase(name, pattern)), None)


def _trained(lora: LoraSpec, architecture: Architecture) -> dict[str, list[str]]:
    """Return the Hugging Face names of what each trained parameter holds."""
    if lora.rank is not None:
        adapters = {name: [tensor] for name, tensor in trained_routers(architecture, lora).items()}
        adapters |= {
            target.parameter(half): [
                f"{architecture.weights.module(module)}.{half}.weight" for module in target.adapted
            ]
            for target in all_expert_targets(architecture, lora)
            for half in ("lora_A", "lora_B")
        }
        return adapters | {
            target.parameter(own): [f"{architecture.weights.module(target.module)}.{name}"]
            for target in all_targets(architecture, lora)
            for own, name in target.parts(lora)
        }
    # `outer` has the output layer even where it is tied: a last stage holds a copy of the embedding.
    maps = architecture.weights.parameters() | dict(architecture.weights.outer)
    trained = {name: part for name, part in maps.items() if not part.frozen}
    return {name: list(dict.fromkeys(piece.name for piece in part.pieces)) for name, part in trained.items()}
