"""topology: how the model is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from launcher.contract.spec.rules import AtLeast


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologySpec:
    """How the model is spread over ranks. Data parallel size is derived: world size / (tp * pp * cp).

    The word auto in place of this section takes the fastest layout that fits, with train.micro_batch_size and
    train.recompute, as `launcher plan` lists them.
    """

    tensor_parallel: Annotated[int, AtLeast(1)] = 1
    """Ranks that share each layer's matrices; within one node."""
    pipeline_parallel: Annotated[int, AtLeast(1)] = 1
    """Pipeline stages."""
    virtual_pipeline: Annotated[int, AtLeast(1)] = 1
    """Model chunks on each stage (interleaved schedule); 1 is the plain 1F1B schedule."""
    context_parallel: Annotated[int, AtLeast(1)] = 1
    """Ranks that share each row, for long ones: two chunks of it each, and keys and values gathered for attention.
    data.seq_length must be a multiple of twice as many."""
    sequence_parallel: bool = False
    """Spread norms and residuals over the tensor parallel ranks as well."""
    check_memory: bool = True
    """Refuse a run that the memory model says cannot fit; see docs/explanation/planning.md for how good it is."""
