"""What the layers must know of rows that are padded or packed. Those that ranks share are in parallel.context."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sft.megatron.parallel.documents import Documents, Rows


@dataclass
class PackedSequences(Rows):
    """Where the sequences of a packed row lie."""

    seq_lengths: tuple[int, ...] = ()
    """Their lengths, on the host, where reading them makes nobody wait for the device."""
    positions: Tensor | None = None
    """Position of each token in its own sequence, [t]."""


def padded_rows(length: int, documents: Documents | None) -> Rows | None:
    """Return what the layers must know of rows of one sequence each, of this length, or None where it is nothing.

    The format says that tensors keep the dimension of rows.
    """
    if documents is None:
        return None
    return Rows(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length, documents=documents)


def packed_sequences(
    cu_seqlens: Tensor,
    seq_lengths: tuple[int, ...],
    positions: Tensor | None = None,
    documents: Documents | None = None,
) -> PackedSequences:
    """Return what the layers must know of a packed row."""
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(seq_lengths),
        max_seqlen_kv=max(seq_lengths),
        seq_lengths=seq_lengths,
        positions=positions,
        documents=documents,
    )
