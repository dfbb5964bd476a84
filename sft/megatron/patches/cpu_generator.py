"""The random state of a CPU rank: Megatron-core's tracker of generators sets the CUDA generator's alone."""

from __future__ import annotations

import megatron.core.tensor_parallel.random as random
import torch

from sft.megatron.patches.patch import Patch


def _set_cpu_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _apply() -> None:
    if torch.cuda.is_available():
        return
    if "_set_cuda_rng_state" not in random.CudaRNGStatesTracker.fork.__wrapped__.__code__.co_names:
        raise RuntimeError(f"Megatron-core's random tracker no longer calls _set_cuda_rng_state; {__name__} is stale")
    random._set_cuda_rng_state = _set_cpu_rng_state


PATCH = Patch(
    name="cpu_generator",
    why="the CUDA generator is looked up by index, and restoring a forked state does nothing, without an error",
    targets=(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
    ),
    test="sft/megatron/patches/test_class_patches.py::test_forked_generator_state_is_restored",
    apply=_apply,
)
