"""What the layers must know of rows that hold several sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sft.megatron.core import PackedSeqParams


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Where the sequences of a packed row lie."""

    seq_lengths: tuple[int, ...] = ()
    """Their lengths, on the host, where reading them makes nobody wait for the device."""
    positions: Tensor | None = None
    """Position of each token in its own sequence, [t]."""


def packed_sequences(
    cu_seqlens: Tensor | None, seq_lengths: tuple[int, ...] | None, positions: Tensor | None = None
) -> PackedSequences | None:
    """Return what the layers must know of a packed row, or None for rows of one sequence each."""
    if cu_seqlens is None or seq_lengths is None:
        return None
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(seq_lengths),
        max_seqlen_kv=max(seq_lengths),
        seq_lengths=seq_lengths,
        positions=positions,
    )
