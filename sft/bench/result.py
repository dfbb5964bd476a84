"""The result of a benchmark, and the clock and counters that make it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from launcher.contract.flops import mfu, training_flops
from launcher.contract.hardware import match_gpu
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import LoraSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One contender on one workload, over all timed steps. Rates are per GPU."""

    contender: str
    settings: dict[str, object]
    steps: int
    step_ms: float
    real_tokens_per_second: float
    """Input tokens of examples."""
    slots_per_second: float
    """The same with padding."""
    supervised_tokens_per_second: float
    tflops: float
    """Useful operations per second, by launcher/contract/flops.py, in units of 10^12."""
    mfu: float | None
    """None on a GPU whose peak is not known."""
    peak_memory_gib: float
    """Peak memory of tensors."""
    reserved_memory_gib: float
    """Peak memory that torch's allocator held."""
    card_memory_gib: float
    """Memory in use on the whole GPU after the last step."""
    expected_tokens_per_second: float | None
    """The planner's prediction of real_tokens_per_second. None for other trainers, and on a GPU not known."""
    loss: float
    """Loss of the last step: that of contenders which train the same must be nearly the same."""
    phases_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a step by phase, over all timed steps."""
    breakdown_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a step by kind of kernel, over the profiled steps after them."""
    largest_kernels_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a step in the kernels that take most of it."""


class StepClock:
    """Times many steps at once, by the host's clock, and synchronizes only before the first and after the last.

    It starts after `warmup` steps and stops by itself after `steps` more, so that what a trainer does at its end is not
    counted.
    """

    def __init__(self, warmup: int, steps: int, gpus_per_replica: int = 1) -> None:
        self.warmup = warmup
        self.steps = steps
        self._gpus = gpus_per_replica
        self._done = 0
        self._began = self._elapsed = 0.0
        self.slots = self.supervised = 0
        self.lengths: list[int] = []

    @property
    def begins(self) -> bool:
        """Whether the next step is the first that counts."""
        return self._done == self.warmup

    @property
    def over(self) -> bool:
        """Whether all steps that count are done."""
        return self._done == self.warmup + self.steps

    def before_step(self) -> None:
        """Start the clock if the step is the first that counts. Call it at the beginning of each step."""
        if self.begins:
            synchronize()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self._began = time.perf_counter()

    def after_step(self, lengths: list[int], slots: int, supervised: int) -> None:
        """Count a step: the input tokens of each example, the tokens of its rows with padding, and its targets.

        Stop the clock if it was the last. Call it at the end of each step.
        """
        if self._done >= self.warmup:
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
        *,
        lora_rank: int | None = None,
    ) -> Result:
        """Return what was measured after the warm-up, with the memory of the GPU that had most.

        With `lora_rank` adapters of that rank on all linear layers are what was trained.
        Raise RuntimeError if the last step has not ended.
        """
        if not self.over:
            raise RuntimeError(f"{self._done - self.warmup} steps were timed, not {self.steps}")
        seconds = self._elapsed * self._gpus
        flops = training_flops(shape, self.lengths, LoraSpec(rank=lora_rank))
        kind = match_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        peak = _highest(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
        reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        free, whole = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        return Result(
            contender=contender,
            settings=settings,
            steps=self.steps,
            step_ms=round(self._elapsed / self.steps * 1e3, 2),
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
    """Return the maximum over all ranks."""
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
