"""The gradient norm where neither Transformer Engine nor Apex computes it."""

from __future__ import annotations

import megatron.core.optimizer.clip_grads as clip_grads
import torch

from sft.megatron.patches.patch import Patch


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm of all tensors together, on their device."""
    if tensors[0].is_cuda:  # tree reductions: fp32 is accurate enough there
        norms = torch.stack(torch._foreach_norm(tensors))
    else:
        norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
    norm: torch.Tensor = torch.linalg.vector_norm(norms).float()
    return norm


def l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Return the norm, [1], of all tensors together, in the calling form of Apex's `multi_tensor_l2norm`."""
    return total_norm(tensor_lists[0]).reshape(1), None


def _apply() -> None:
    if clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm":  # neither Transformer Engine nor Apex
        clip_grads.l2_norm_impl = l2_norm


PATCH = Patch(
    name="gradient_norm",
    why="the norm is taken tensor by tensor with torch.norm, each result fetched to the host. A CPU sums in fp32 one "
    "after another: 1.6e-3 too small for the embedding of a 135M model, and clipping is off as much. A GPU waits once "
    "for each parameter",
    targets=("megatron.core.optimizer.clip_grads:l2_norm_impl",),
    test="sft/megatron/patches/test_gradient_norm.py::test_gradient_norm_is_exact_where_megatron_cores_is_not",
    apply=_apply,
)
