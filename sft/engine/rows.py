"""What the model must know of a micro-batch's rows, beside their tokens."""

from __future__ import annotations

from sft.data.batches.batch import MicroBatch
from sft.megatron.layers.noisy_embedding import TokenSeeds
from sft.megatron.layers.packed_rows import packed_sequences, padded_rows
from sft.megatron.parallel.context import shared_rows
from sft.megatron.parallel.documents import RouterStep, Rows


def rows_of(batch: MicroBatch, routers: RouterStep | None) -> Rows | None:
    """Return what the layers must know, or None where it is nothing. A model without experts has no `routers`."""
    documents = None if routers is None else routers.documents(batch)
    if batch.context_share is not None:
        return shared_rows(batch.context_share, documents, batch.seq_lengths)
    if batch.cu_seqlens is None or batch.seq_lengths is None:
        return padded_rows(batch.tokens.size(1), documents)
    return packed_sequences(batch.cu_seqlens, batch.seq_lengths, batch.position_ids.flatten(), documents)


def token_seeds(batch: MicroBatch) -> TokenSeeds | None:
    """Return what the noise on embeddings is made of, or None without noise."""
    if batch.example_seeds is None or batch.example_lengths is None:
        return None
    return TokenSeeds(batch.example_seeds, batch.position_ids, batch.example_lengths)
