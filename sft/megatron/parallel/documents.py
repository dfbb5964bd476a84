"""Which document each token belongs to: routers add up by document, and leave padding out.

A document is an example, wherever it lies: alone in a row, in a packed one, or in one that ranks share.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sft.data.batches.batch import MicroBatch
from sft.megatron.core import PackedSeqParams, parallel_state


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterStep:
    """What routers do in an optimizer step, beside choosing experts."""

    aux_scale: float
    """What the summed auxiliary losses of all documents are multiplied by; 0 to leave them out."""
    recorded: bool
    """Whether the step is logged."""
    sequence_parallel: bool

    def documents(self, batch: MicroBatch) -> Documents:
        """Return the documents of this rank's part of a micro-batch."""
        assert batch.documents is not None
        assert batch.document_lengths is not None
        numbers = batch.documents.t()
        if self.sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            numbers = numbers.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        return Documents(numbers.reshape(-1), batch.document_lengths, self)


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of the tokens that a rank routes."""

    numbers: Tensor
    """The document of each token, in the order of hidden states, counted from 1; 0 on padding. [tokens]"""
    lengths: Tensor
    """Tokens of each document, also of those that other ranks route; 0 for padding, which comes first."""
    step: RouterStep


@dataclass
class Rows(PackedSeqParams):  # type: ignore[misc]
    """What the layers must know of the rows of a micro-batch: as they are, of rows that hold one sequence each."""

    documents: Documents | None = None
    """For routers, where the model has some."""
