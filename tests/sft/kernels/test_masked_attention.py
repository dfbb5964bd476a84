"""Windows and capped scores against their definition, position by position, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sft.kernels import masked_attention
from sft.kernels.masked_attention import attention_in_blocks, causal_mask, last_keys

HEADS, GROUPS, DIM, KEYS = 6, 2, 4, 9
CAP = 0.7


def drawn(queries: int = KEYS) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, HEADS, queries, DIM), (2, GROUPS, KEYS, DIM), (2, GROUPS, KEYS, DIM)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("queries", "window", "seen"),
    [
        (3, None, [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
        (3, 2, [[1, 2], [2, 3], [3, 4]]),
        (5, 3, [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]),
        (2, 1, [[3], [4]]),
        (2, 99, [[0, 1, 2, 3], [0, 1, 2, 3, 4]]),
    ],
)
def test_a_query_sees_itself_and_what_its_window_reaches(
    queries: int, window: int | None, seen: list[list[int]]
) -> None:
    mask = causal_mask(queries, 5, window, torch.device("cpu"))
    assert [row.nonzero().flatten().tolist() for row in mask] == seen


def test_keys_that_no_query_sees_are_left_out() -> None:
    keys = torch.arange(9.0)[:, None]
    assert last_keys(keys, 2, 3).flatten().tolist() == [5, 6, 7, 8]
    assert last_keys(keys, 1, 1).flatten().tolist() == [8]
    assert last_keys(keys, 9, 3).flatten().tolist() == list(range(9))
    assert last_keys(keys, 1, 99).flatten().tolist() == list(range(9))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [KEYS, 4, 1])
@pytest.mark.parametrize("block", [512, 2])
def test_attention_in_blocks_by_definition(
    block: int, queries: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients. The cap comes before the mask: 0.7 and not infinity is the highest score."""
    monkeypatch.setattr(masked_attention, "BLOCK", block)
    found, exact = drawn(queries), drawn(queries)
    output = attention_in_blocks(*found, cap=CAP, window=window, scale=0.9)
    query, key, value = exact
    mask = causal_mask(queries, KEYS, window, torch.device("cpu"))
    shared = [tensor.repeat_interleave(HEADS // GROUPS, dim=1) for tensor in (key, value)]
    scores = CAP * (torch.einsum("bhqd,bhkd->bhqk", query, shared[0]) * 0.9 / CAP).tanh()
    weights = scores.exp() * mask
    expected = torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), shared[1])
    torch.testing.assert_close(output, expected)
    for result in (output, expected):
        result.square().sum().backward()
    for own, other in zip(found, exact, strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_the_scale_is_one_over_the_root_of_the_head_unless_stated() -> None:
    tensors = drawn()
    assert torch.equal(attention_in_blocks(*tensors, cap=CAP), attention_in_blocks(*tensors, cap=CAP, scale=DIM**-0.5))


def test_half_precision_keeps_its_type_and_sums_in_fp32() -> None:
    wide = [tensor.detach() for tensor in drawn()]
    query, key, value = (tensor.bfloat16() for tensor in wide)
    half = attention_in_blocks(query, key, value, cap=CAP)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), attention_in_blocks(*wide, cap=CAP), atol=2e-2, rtol=2e-2)


def test_blocks_computed_again_drop_the_same_weights() -> None:
    """The output is linear in the values, so that their product with their gradient is the output's with its own."""
    torch.manual_seed(0)
    query, key, value = drawn()
    output = attention_in_blocks(query, key, value, cap=CAP, dropout=0.5)
    weights = torch.randn_like(output)
    torch.rand(7)  # moves the generator on, as other layers do
    output.backward(weights)
    assert value.grad is not None
    torch.testing.assert_close((value * value.grad).sum(), (output * weights).sum())
