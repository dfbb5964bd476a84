"""Recomputation of an output (`CheckpointWithoutOutput`) without Transformer Engine."""

from __future__ import annotations

import functools

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

from sft.megatron.patches.patch import Patch


def _apply() -> None:
    stock = CheckpointWithoutOutput.__init__

    @functools.wraps(stock)
    def fixed(self: CheckpointWithoutOutput, fp8: object = None) -> None:
        stock(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = fixed


PATCH = Patch(
    name="checkpoint_fp8",
    why="its own default for fp8, False, is taken for a recipe, and Transformer Engine asked whether fp8 is on. Layers "
    "that are not fused need it to recompute norms",
    targets=("megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__",),
    test="sft/megatron/patches/test_class_patches.py::test_no_fp8_recipe_would_be_taken_for_one",
    apply=_apply,
)
