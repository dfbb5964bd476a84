"""Model FLOP utilization of the steps of a run: useful operations over what its GPUs could do at their dense peak."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from launcher.contract.flops import mfu, training_flops_of
from launcher.contract.hardware import match_gpu
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilization:
    """What MFU is computed from, besides a step's tokens and time."""

    shape: ModelShape
    gpus: int
    peak_tflops: float

    def of(self, tokens: int, squared_lengths: int, seconds: float) -> float:
        """MFU of steps that took `seconds` for these numbers of the global batches (see `launcher.contract.flops`)."""
        return mfu(training_flops_of(self.shape, tokens, squared_lengths), seconds, self.peak_tflops, self.gpus)


def utilization(spec: RunSpec, shape: ModelShape, world_size: int) -> Utilization | None:
    """What MFU is computed from; None where it has no meaning.

    That is on CPU, on a GPU whose peak is not known, in fp32, and with LoRA, which computes no gradients of the weights
    that the convention counts. In fp8 it is the part of the bf16 peak, so that the two can be compared.
    """
    if spec.resources.gpus_per_node == 0 or spec.model.lora.rank is not None or spec.train.precision == "fp32":
        return None
    kind = match_gpu(torch.cuda.get_device_name())
    return None if kind is None else Utilization(shape=shape, gpus=world_size, peak_tflops=kind.bf16_tflops)
