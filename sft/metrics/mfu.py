"""Model FLOPs utilization (MFU, arXiv:2204.02311): useful operations over those that the GPUs' dense peak allows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from launcher.contract.flops import mfu, training_flops_of
from launcher.contract.hardware import match_gpu
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import LoraSpec, RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilization:
    """What MFU is computed from, beside a step's tokens and time."""

    shape: ModelShape
    gpus: int
    peak_tflops: float
    lora: LoraSpec = field(default_factory=LoraSpec)
    """If it has a rank, only adapters are trained."""

    def of(self, tokens: int, squared_lengths: int, seconds: float) -> float:
        """Return the MFU of steps that took `seconds` for these totals of their global batches (StepBatch)."""
        flops = training_flops_of(self.shape, tokens, squared_lengths, self.lora)
        return mfu(flops, seconds, self.peak_tflops, self.gpus)


def utilization(spec: RunSpec, shape: ModelShape, world_size: int) -> Utilization | None:
    """Return what MFU is computed from, or None where it has no meaning.

    That is on CPU, on a GPU whose peak is not known, and in fp32. In fp8 it is relative to the bf16 peak, so that the
    two can be compared.
    """
    if spec.resources.gpus_per_node == 0 or spec.train.precision == "fp32":
        return None
    kind = match_gpu(torch.cuda.get_device_name())
    if kind is None:
        return None
    return Utilization(shape=shape, gpus=world_size, peak_tflops=kind.bf16_tflops, lora=spec.model.lora)
