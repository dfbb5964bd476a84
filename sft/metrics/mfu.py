"""Model FLOPs utilization (MFU, arXiv:2204.02311): useful operations over those that the GPUs' dense peak allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from launcher.contract.flops import mfu, training_flops_of
from launcher.contract.hardware import match_gpu
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilization:
    """What MFU is computed from, beside a step's tokens and time."""

    shape: ModelShape
    gpus: int
    peak_tflops: float

    def of(self, tokens: int, squared_lengths: int, seconds: float) -> float:
        """Return the MFU of steps that took `seconds` for these totals of their global batches (StepBatch)."""
        return mfu(training_flops_of(self.shape, tokens, squared_lengths), seconds, self.peak_tflops, self.gpus)


def utilization(spec: RunSpec, shape: ModelShape, world_size: int) -> Utilization | None:
    """Return what MFU is computed from, or None where it has no meaning.

    That is on CPU, on a GPU whose peak is not known, in fp32, and with LoRA, which does not compute the weight
    gradients that the convention counts. In fp8 it is relative to the bf16 peak, so that the two can be compared.
    """
    if spec.resources.gpus_per_node == 0 or spec.model.lora.rank is not None or spec.train.precision == "fp32":
        return None
    kind = match_gpu(torch.cuda.get_device_name())
    return None if kind is None else Utilization(shape=shape, gpus=world_size, peak_tflops=kind.bf16_tflops)
