"""What a checkpoint directory holds, and trainer.json as a value.

    step-00000010/
      sharded/        Megatron-core's distributed checkpoint: weights, optimizer, random generators
      trainer.json    a TrainerState
      COMPLETE        written last: size and checksum of every file

This module imports neither torch nor Megatron-core: an export reads trainer.json without them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from launcher.contract.errors import CheckpointError
from launcher.contract.spec import TrainSpec
from launcher.contract.stages import even_split
from launcher.contract.topology import Topology

SHARDED = "sharded"
TRAINER = "trainer.json"
FORMAT = 3
"""Version of the directory's layout; 2 has checksums, 3 says what the data were."""

Json = Mapping[str, object]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Comparison:
    """By what evaluations are compared. Earlier checkpoints do not say it: None there."""

    metric: str | None = None
    mode: str | None = None
    """Whether it is better "min" or "max"."""
    measured_on: str | None = None
    """The files that it was measured on."""

    @classmethod
    def from_json(cls, values: Json) -> Comparison:
        """Read its fields from a callback's state. ValueError where they are something else."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(None if values.get(name) is None else _checked(values, name, str) for name in names))

    def agrees(self, other: Comparison) -> bool:
        """Return whether values of both can be compared, as far as both say."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return all(None in pair or pair[0] == pair[1] for pair in pairs)


@dataclass(frozen=True, slots=True)
class RankedStep:
    """An evaluation that is among the best of its run."""

    step: int
    value: float


@dataclass(frozen=True, slots=True)
class BestSteps:
    """The best evaluations of a run, best first: the state of the checkpoint callback."""

    KEY = "checkpoints"

    run: str
    """Directory of the run that they belong to."""
    best: tuple[RankedStep, ...]
    compared: Comparison = Comparison()

    def to_json(self) -> dict[str, object]:
        """Return the form in which trainer.json has it."""
        best = [dataclasses.asdict(ranked) for ranked in self.best]
        return {"run": self.run, "best": best} | dataclasses.asdict(self.compared)

    @classmethod
    def from_json(cls, values: Json) -> BestSteps:
        """Read what `to_json` gave. ValueError where it is something else."""
        best = _checked(values, "best", list)
        ranked = (RankedStep(_checked(item, "step", int), _checked(item, "value", float)) for item in best)
        return cls(_checked(values, "run", str), tuple(ranked), Comparison.from_json(values))


@dataclass(frozen=True, slots=True)
class EarlyStoppingState:
    """What early stopping has seen: the state of the evaluation callback."""

    KEY = "evaluation"

    best: float | None = None
    """Best value so far; None before the first."""
    best_step: int = 0
    waited: int = 0
    """Evaluations since then."""
    compared: Comparison = Comparison()

    def to_json(self) -> dict[str, object]:
        """Return the form in which trainer.json has it."""
        seen = {"best": self.best, "best_step": self.best_step, "waited": self.waited}
        return seen | dataclasses.asdict(self.compared)

    @classmethod
    def from_json(cls, values: Json) -> EarlyStoppingState:
        """Read what `to_json` gave. ValueError where it is something else."""
        best = None if values.get("best") is None else _checked(values, "best", float)
        step, waited = _checked(values, "best_step", int), _checked(values, "waited", int)
        return cls(best, step, waited, Comparison.from_json(values))


@dataclass(frozen=True, slots=True)
class BadStepState:
    """The running mean of gradient norms: the state of the callback for bad steps."""

    KEY = "guard"

    gradient_norms: list[float]

    def to_json(self) -> dict[str, object]:
        """Return the form in which trainer.json has it."""
        return {"gradient_norms": self.gradient_norms}

    @classmethod
    def from_json(cls, values: Json) -> BadStepState:
        """Read what `to_json` gave. ValueError where it is something else."""
        return cls(_checked(values, "gradient_norms", list))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """All that a checkpoint holds beside tensors and random generators."""

    lightning: Mapping[str, object]
    """Lightning's counters, with the states of the callbacks among them."""
    topology: Mapping[str, object]
    """The fields of the Topology it was saved under."""
    data_key: Mapping[str, object]
    """Identifies the data and their order."""
    versions: Mapping[str, str] = field(default_factory=dict)
    rate_groups: Sequence[str] = ()
    """What gave parameters learning rates of their own: the optimizer's states are in groups by it."""
    adapters: Mapping[str, object] | None = None
    """What its adapters are, by config key; empty where all weights are trained, None in earlier checkpoints."""
    model: Mapping[str, object] | None = None
    """What the model computes (`sft.models.numerics`); None in earlier checkpoints."""
    optimizer: Mapping[str, object] | None = None
    """What `optimizer_form` gave; None in earlier checkpoints."""
    base_weights: str | None = None
    """Identifies the frozen weights that its adapters belong to; None without adapters, and in earlier checkpoints."""

    def to_json(self) -> str:
        """Return the content of trainer.json."""
        values = dataclasses.asdict(self)
        if not self.rate_groups:
            del values["rate_groups"]
        for name in ("adapters", "model", "optimizer", "base_weights"):
            if values[name] is None:
                del values[name]
        return json.dumps({"format": FORMAT} | values, indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainerState:
        """Read the content of trainer.json. ValueError says what is wrong with it."""
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        if values.get("format") != FORMAT:
            raise ValueError(f"format {values.get('format')}, and this version reads {FORMAT}")
        lightning, topology, key = (_checked(values, name, dict) for name in ("lightning", "topology", "data_key"))
        versions = values.get("versions") or {}
        if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
            raise ValueError(f"versions is {versions!r}")
        groups = values.get("rate_groups") or []
        if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
            raise ValueError(f"rate_groups is {groups!r}")
        adapters, model, optimizer = (
            None if values.get(name) is None else _checked(values, name, dict)
            for name in ("adapters", "model", "optimizer")
        )
        base = None if values.get("base_weights") is None else _checked(values, "base_weights", str)
        return cls(
            lightning=lightning,
            topology=topology,
            data_key=key,
            versions=versions,
            rate_groups=groups,
            adapters=adapters,
            model=model,
            optimizer=optimizer,
            base_weights=base,
        )

    @classmethod
    def read(cls, checkpoint: Path) -> TrainerState:
        """Read trainer.json of a checkpoint. CheckpointError names the file."""
        path = checkpoint / TRAINER
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be used: {error}; remove {checkpoint.name} to go on from an older checkpoint"
            ) from error

    def is_of(self, topology: Topology) -> bool:
        """Return whether it was saved under this topology."""
        # Earlier checkpoints do not name the ranks that share experts; and their stages had equally many layers.
        split = topology.layers_per_stage
        later = {
            "expert_parallel": 1,
            "expert_tensor_parallel": self.topology.get("tensor_parallel"),
            "layers_per_stage": list(even_split(sum(split), len(split))),
        }
        return {**later, **self.topology} == dataclasses.asdict(topology) | {"layers_per_stage": list(split)}

    @property
    def early_stopping(self) -> EarlyStoppingState:
        """What early stopping has seen, which may be no evaluation."""
        values = self._callback(EarlyStoppingState.KEY)
        return EarlyStoppingState() if values is None else EarlyStoppingState.from_json(values)

    @property
    def best(self) -> BestSteps:
        """The best evaluations of the run, of which there may be none."""
        values = self._callback(BestSteps.KEY)
        return BestSteps("", ()) if values is None else BestSteps.from_json(values)

    def _callback(self, key: str) -> Json | None:
        callbacks = self.lightning.get("callbacks", {})
        return cast("Json | None", callbacks.get(key)) if isinstance(callbacks, Mapping) else None


def optimizer_form(train: TrainSpec) -> dict[str, object]:
    """Return what decides the form in which the optimizer's states are stored, by config key."""
    if train.optimizer.distributed:
        return {"train.optimizer.distributed": True}
    # Without sharding, master weights are stored where there are some, and have no place to be loaded into elsewhere.
    precision = "fp32" if train.precision == "fp32" else "bf16 or fp8"
    return {"train.optimizer.distributed": False, "train.precision": precision}


def _checked(values: object, name: str, kind: type[T]) -> T:
    """Return a value of an object, or raise ValueError where it is not of type `kind`. Ints are floats, too."""
    value = values.get(name) if isinstance(values, Mapping) else None
    if isinstance(value, kind) or (kind is float and isinstance(value, int)):
        return cast("T", value)
    raise ValueError(f"{name} is {value!r}")
