"""topology: how the model is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from launcher.contract.spec.rules import AtLeast


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologySpec:
    """How the model is spread over ranks. The data parallel size is derived: world size / (tp * pp * cp).

    `topology: auto` instead of this section takes the simplest of the layouts that fit and are about as fast as the
    fastest, with train.micro_batch_size and train.recompute where the config does not set them; `launcher plan` shows
    it.
    """

    tensor_parallel: Annotated[int, AtLeast(1)] = 1
    """Ranks that share each layer's matrices, all on one node."""
    pipeline_parallel: Annotated[int, AtLeast(1)] = 1
    """Pipeline stages."""
    virtual_pipeline: Annotated[int, AtLeast(1)] = 1
    """Model chunks on each stage (interleaved schedule); 1 is the plain 1F1B schedule."""
    layers_per_stage: Annotated[list[int], AtLeast(1)] = field(default_factory=list)
    """How many layers each stage has, first to last, e.g. [9, 9, 8, 6]. With virtual_pipeline it has a number for each
    model chunk, in the model's order: the first chunk of every stage, then the second of every stage. Empty: balanced
    by what layers and output layer cost, so that the slowest stage is as fast as possible."""
    context_parallel: Annotated[int, AtLeast(1)] = 1
    """Ranks that share each row, for long ones: each holds two slices of it and gathers keys and values for attention.
    data.seq_length must be a multiple of twice this."""
    expert_parallel: Annotated[int, AtLeast(1)] = 1
    """Ranks that share the experts of each layer, which each hold whole or, with expert_tensor_parallel, in part. They
    are taken from the data, context and tensor parallel ranks: the number of ranks does not grow."""
    expert_tensor_parallel: Annotated[int | None, AtLeast(1)] = None
    """Ranks that share each expert's matrices; by default tensor_parallel."""
    sequence_parallel: bool = False
    """Spread norms and residuals over the tensor parallel ranks, too."""
    check_memory: bool = True
    """Refuse a run that the memory model says cannot fit; see docs/explanation/planning.md for how good it is."""
