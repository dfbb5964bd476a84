"""Rotary angles under context parallelism.

Megatron-core cuts the table of angles by rank: once for rows of one sequence; sequence by sequence for packed rows,
where it takes each sequence to be cut in 2 * cp chunks; and in inference too, where every rank has whole sequences.
Here the table stays whole, and each rank takes the angles of its tokens by their positions.
"""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel

from sft.megatron.patches.patch import FIRST, Patch


def keep_angles_whole(model: GPTModel) -> None:
    """Let the model's RoPE give the table of all positions on every rank."""
    model.rotary_pos_emb.cp_group = None


PATCH = Patch(
    name="rotary_angles",
    why="packed rows that ranks share would be rotated by the angles of other positions",
    targets=("megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.forward",),
    test="parity/test_context_parallel.py::test_angles_would_be_cut_by_rank",
    since=FIRST,
)
