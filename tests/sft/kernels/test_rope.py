"""Rotation of heads: by the position of each token, and for packed rows by those in their documents."""

from __future__ import annotations

import pytest
import torch

from sft.kernels.rope import rotate, rotate_heads, split_and_rotate

HALF, DIM = 3, 8
ANGLES = torch.rand(7, HALF, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("packed", [False, True])
def test_a_token_turns_by_the_angles_of_its_position(packed: bool) -> None:
    s, b = (7, 1) if packed else (4, 2)
    x = torch.randn(s, b, 5, DIM, generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0]) if packed else None
    turned = rotate_heads(x, ANGLES.cos(), ANGLES.sin(), positions)
    for token in range(s):
        angles = ANGLES[token if positions is None else int(positions[token])]
        torch.testing.assert_close(turned[token], rotate(x[token], angles.cos(), angles.sin()))
    assert torch.equal(turned[..., 2 * HALF :], x[..., 2 * HALF :])
    assert not torch.equal(turned[1], x[1])


def test_heads_split_and_rotated_at_once_are_those_rotated_alone() -> None:
    groups, queries = 2, 3
    mixed = torch.randn(4, 2, groups * (queries + 2) * DIM, generator=torch.Generator().manual_seed(3))
    query, key, value = split_and_rotate(mixed, groups, queries, ANGLES, None, magnitude=1.5)
    heads = mixed.view(4, 2, groups, queries + 2, DIM)
    cos, sin = ANGLES.cos() * 1.5, ANGLES.sin() * 1.5
    torch.testing.assert_close(query, rotate_heads(heads[..., :queries, :].flatten(2, 3), cos, sin, None))
    torch.testing.assert_close(key, rotate_heads(heads[..., queries, :], cos, sin, None))
    assert torch.equal(value, heads[..., queries + 1, :])
