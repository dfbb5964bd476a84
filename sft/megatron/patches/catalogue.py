"""All changes to Megatron-core, in the order in which they are applied.

Import this after Megatron-core itself, as sft.megatron.core does: the modules of the patches import it, too.
"""

from __future__ import annotations

from sft.megatron.patches import (
    adamw_state,
    bucket_padding,
    checkpoint_fp8,
    communicators,
    cpu_generator,
    embedding,
    empty_optimizer,
    gradient_norm,
    inference,
    master_step,
    offloaded_inputs,
    reduce_order,
    results_queue,
    rotary_angles,
    weight_gradient,
    write_errors,
)

PATCHES = (
    cpu_generator.PATCH,
    adamw_state.PATCH,
    bucket_padding.PATCH,
    empty_optimizer.PATCH,
    results_queue.PATCH,
    gradient_norm.PATCH,
    reduce_order.PATCH,
    *write_errors.PATCHES,
    weight_gradient.PATCH,
    checkpoint_fp8.PATCH,
    communicators.PATCH,
    embedding.PATCH,
    master_step.PATCH,
    offloaded_inputs.PATCH,
    rotary_angles.PATCH,
    inference.PATCH,
)
