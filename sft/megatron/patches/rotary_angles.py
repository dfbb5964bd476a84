"""A table of rotary angles that is the whole one on every rank, by the architecture's frequencies.

Megatron-core has Llama 3's scaling with its numbers built in, and under context parallelism it cuts the table by rank:
once for rows of one sequence; sequence by sequence for packed rows, where it takes each sequence to be cut in 2 * cp
chunks; and in inference too, where every rank has whole sequences. Here the table stays whole, and each rank takes the
angles of its tokens by their positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel

from sft.megatron.patches.patch import Patch
from sft.models.rope import Rope


def use_whole_table(model: GPTModel, rotations: Sequence[tuple[Rope, int]]) -> None:
    """Let the model's RoPE give the angles of all positions on every rank.

    `rotations` are rotary positions with the size of their heads, whose angles are side by side.
    """
    rotary = model.rotary_pos_emb
    rotary.cp_group = None
    frequencies = torch.cat([rope.inverse_frequencies(head_dim) for rope, head_dim in rotations])
    rotary.inv_freq = frequencies.to(rotary.inv_freq.device)


PATCH = Patch(
    name="rotary_angles",
    why="packed rows that ranks share would be rotated by the angles of other positions",
    targets=("megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.forward",),
    test="parity/test_context_parallel.py::test_angles_would_be_cut_by_rank",
)
