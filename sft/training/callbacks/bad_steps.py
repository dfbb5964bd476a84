"""Handle bad steps: a loss or gradient norm that is NaN or infinite or, if asked for, a spike of the norm.

The device decides whether a step is bad and keeps the optimizer from applying it (sft.megatron.optim.optimizer), so a
bad update never happens, whatever the policy. The host learns of it one step later, by an asynchronous copy: it never
waits, and one more step is done by then, unless what the step left is to be saved, copied or evaluated: then it waits,
so that no checkpoint holds what a rewind takes back, and no restart goes on from a copy behind a step whose verdict was
lost. `train.on_bad_step` decides what follows. All ranks decide alike, since loss and norm are the same on all.

`rewind` takes back the weights and not the step count. A spike tends to come from the updates before it, and the same
examples from the same weights would give the same spike again. So the examples between the checkpoint and now are left
out, and the learning rate goes on as scheduled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from launcher.contract.rundir import append_line, checkpoint_step
from launcher.contract.spec import RunSpec
from sft.checkpoint.contents import BadStepState
from sft.engine.module import SFTGPT
from sft.engine.results import StepResult
from sft.metrics.run_log import RunLog
from sft.runtime import lightning as pl
from sft.training.strategy import MegatronStrategy

MAX_IN_A_ROW = 10
"""Number of bad steps in a row that ends the run."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """The numbers of a step on their way to the host."""

    step: int
    values: Tensor
    """[3]: 1.0 for a bad step or 0.0, the loss, the gradient norm."""
    arrived: torch.cuda.Event | None
    """Recorded behind the copy; None where the values are in host memory anyway."""

    @classmethod
    def of(cls, result: StepResult) -> _Pending:
        """Begin to copy the numbers of a step."""
        values = torch.stack([result.bad.double(), result.loss.double(), result.grad_norm.double()])
        if not values.is_cuda:
            return cls(result.step, values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(result.step, host, arrived)

    def read(self) -> tuple[bool, float, float]:
        """Wait for the copy and return whether the step was bad, its loss and its gradient norm."""
        if self.arrived is not None:
            self.arrived.synchronize()
        bad, loss, norm = self.values.tolist()
        return bad > 0, loss, norm


class GuardCallback(pl.Callback):
    """Checks each step one step late, records the examples of bad steps, and applies the policy."""

    def __init__(self, spec: RunSpec, log: RunLog, example_ids: Callable[[int], Sequence[int | str]]) -> None:
        self._policy = spec.train.on_bad_step
        kept = spec.checkpoint.every, spec.checkpoint.copy_every, spec.train.eval_every
        self._kept_every = [every for every in kept if every]
        self._log = log
        self._example_ids = example_ids
        self._pending: _Pending | None = None
        self._in_a_row = 0
        self.failure: str | None = None
        """Why training must end, once it must."""
        self.rewound = False
        """Whether weights were taken back at this step. Newer checkpoints than theirs hold what was taken back."""

    @property
    def state_key(self) -> str:
        return BadStepState.KEY

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._module = cast(SFTGPT, pl_module)

    def state_dict(self) -> dict[str, object]:
        return BadStepState(self._module.judge.state()).to_json()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._module.judge.restore(BadStepState.from_json(state_dict).gradient_norms)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        result = self._module.last_step
        if result is None:
            raise RuntimeError("a batch ended without a step")
        self.rewound = False
        before, self._pending = self._pending, _Pending.of(result)
        first_bad = before.step if before is not None and self._examine(before) else None
        if first_bad is not None or self._is_kept(result.step):
            # Check the step just done as well: a rewind would discard its weights.
            bad = self._examine_rest()
            first_bad = result.step if first_bad is None and bad else first_bad
        if first_bad is not None:
            self._follow(cast(MegatronStrategy, trainer.strategy), result.step, first_bad)

    def settle(self, strategy: MegatronStrategy, step: int) -> None:
        """Check the step just done at once, because training ends with it: no later step would see the verdict."""
        if self._examine_rest():
            self._follow(strategy, step, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._examine_rest()

    def _is_kept(self, step: int) -> bool:
        """Return whether what this step left is saved, copied or evaluated, as after the last one."""
        return step == self._log.max_steps or any(step % every == 0 for every in self._kept_every)

    def _follow(self, strategy: MegatronStrategy, step: int, first_bad: int) -> None:
        """Do after `step` what the policy says of bad steps from `first_bad` on."""
        if self._in_a_row >= MAX_IN_A_ROW:
            self.failure = f"{self._in_a_row} bad steps in a row"
        elif self._policy == "stop":
            self.failure = "a bad step, and train.on_bad_step is stop"
        elif self._policy == "rewind":
            self._rewind(strategy, step, first_bad)

    def _examine_rest(self) -> bool:
        pending, self._pending = self._pending, None
        return pending is not None and self._examine(pending)

    def _examine(self, pending: _Pending) -> bool:
        """Return whether the step was bad, and record it if so."""
        bad, loss, norm = pending.read()
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if bad:
            self._record(pending.step, loss, norm)
        return bad

    def _record(self, step: int, loss: float, norm: float) -> None:
        finite = math.isfinite(loss) and math.isfinite(norm)
        reason = "spike" if finite else "not finite"
        examples = list(self._example_ids(step - 1))
        numbers = {"loss": _json_number(loss), "grad_norm": _json_number(norm)}
        if self._log.is_writer:
            append_line(self._log.paths.bad_steps, {"step": step, "reason": reason, **numbers, "examples": examples})
        self._log.say(
            f"step {step}: {reason} (loss {loss:.4g}, gradient norm {norm:.4g}); its update was not applied, and the "
            f"ids of its {len(examples)} examples are in {self._log.paths.bad_steps.name}"
        )
        self._log.event("bad_step", step=step, reason=reason, policy=self._policy, examples=len(examples), **numbers)

    def _rewind(self, strategy: MegatronStrategy, step: int, first_bad: int) -> None:
        """Load the newest checkpoint from before the bad step. Without one, the run continues without its update."""
        complete = strategy.control.from_leader([str(path) for path in self._log.paths.complete_checkpoints()])
        earlier = [Path(path) for path in complete if checkpoint_step(Path(path)) < first_bad]
        if not earlier:
            self._log.say(f"step {step}: there is no checkpoint from before step {first_bad} to go back to")
            return
        source, _ = strategy.load_weights(earlier[-1])
        self.rewound = True
        self._log.say(f"step {step}: weights and optimizer are those of {source.name} again; the data go on")
        self._log.event("rewound", step=step, checkpoint=source.name)


def _json_number(value: float) -> float | None:
    """Return None in place of a number that JSON does not have."""
    return value if math.isfinite(value) else None
