"""What a benchmark gives, and the clock and counters it is made with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from launcher.contract.flops import mfu, training_flops
from launcher.contract.hardware import match_gpu
from launcher.contract.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One contender on one workload, over all measured steps. Rates are those of one GPU."""

    contender: str
    settings: dict[str, object]
    steps: int
    step_ms: float
    real_tokens_per_second: float
    slots_per_second: float
    """Places of rows, padding included."""
    supervised_tokens_per_second: float
    tflops: float
    """Useful operations a second and GPU, by launcher/contract/flops.py, in units of 10^12."""
    mfu: float | None
    """None on a card whose peak is not known."""
    peak_memory_gib: float
    """Of tensors."""
    reserved_memory_gib: float
    """Of what torch's allocator held at its peak."""
    card_memory_gib: float
    """Of the whole GPU behind the last step."""
    expected_tokens_per_second: float | None
    """The planner's prediction of real_tokens_per_second; None for other trainers and GPUs that it does not know."""
    loss: float
    """Of the last step: contenders that train the same must be near each other."""
    phases_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a step by phase, over all measured steps."""
    breakdown_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a step by kind of kernel, over the profiled steps behind them."""
    largest_kernels_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a step in the kernels that take most of it."""


class StepClock:
    """Times steps by the host's clock between synchronisations, over many steps at once: nothing waits inside.

    It begins behind `warmup` steps and stops by itself `steps` later, so that what a trainer does at its end is not
    counted.
    """

    def __init__(self, warmup: int, steps: int, gpus_per_replica: int = 1) -> None:
        self._warmup = warmup
        self._steps = steps
        self._gpus = gpus_per_replica
        self._done = 0
        self._began = self._elapsed = 0.0
        self.slots = self.supervised = 0
        self.lengths: list[int] = []

    @property
    def begins(self) -> bool:
        """Whether the step at hand is the first that counts."""
        return self._done == self._warmup

    @property
    def over(self) -> bool:
        """Whether all steps that count are done."""
        return self._done == self._warmup + self._steps

    def before_step(self) -> None:
        """Call first in a step."""
        if self.begins:
            synchronize()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self._began = time.perf_counter()

    def after_step(self, lengths: list[int], slots: int, supervised: int) -> None:
        """Call last in a step: input tokens of its examples, places of its rows, its targets."""
        if self._done >= self._warmup:
            self.lengths += lengths
            self.slots += slots
            self.supervised += supervised
        self._done += 1
        if self.over:
            synchronize()
            self._elapsed = time.perf_counter() - self._began

    def result(
        self,
        contender: str,
        settings: dict[str, object],
        shape: ModelShape,
        loss: float,
        expected: float | None = None,
    ) -> Result:
        """What was measured since the warm-up, with the peak memory of the GPU that had most.

        Raises RuntimeError before the last step has ended.
        """
        if not self.over:
            raise RuntimeError(f"{self._done - self._warmup} steps were timed, not {self._steps}")
        seconds = self._elapsed * self._gpus
        flops = training_flops(shape, self.lengths)
        kind = match_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        peak = _highest(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
        reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        free, whole = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        return Result(
            contender=contender,
            settings=settings,
            steps=self._steps,
            step_ms=round(self._elapsed / self._steps * 1e3, 2),
            real_tokens_per_second=round(sum(self.lengths) / seconds, 1),
            slots_per_second=round(self.slots / seconds, 1),
            supervised_tokens_per_second=round(self.supervised / seconds, 1),
            tflops=round(flops / seconds / 1e12, 1),
            mfu=None if kind is None else round(mfu(flops, seconds, kind.bf16_tflops), 4),
            peak_memory_gib=round(peak / 2**30, 2),
            reserved_memory_gib=round(_highest(reserved) / 2**30, 2),
            card_memory_gib=round(_highest(whole - free) / 2**30, 2),
            expected_tokens_per_second=expected,
            loss=round(loss, 4),
        )


def _highest(value: int) -> float:
    """Over all ranks, where there are some."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = torch.tensor(float(value), device=device)
    dist.all_reduce(whole, op=dist.ReduceOp.MAX)
    return whole.item()


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
