"""Split a fused QKV projection into heads and rotate queries and keys by their positions, in one Triton kernel.

A program takes all heads of one token. A rotation is orthogonal, so backward is the same kernel with the angles
negated and sources and targets exchanged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _position_of(token, position_ptr, rows_per_position, HAS_POSITIONS: tl.constexpr):
    if HAS_POSITIONS:  # noqa: SIM108 - decided when the kernel is compiled
        position = tl.load(position_ptr + token)
    else:
        position = token // rows_per_position
    return position


@triton.jit
def _rotate(
    mixed_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, position_ptr, rows_per_position,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = _position_of(token, position_ptr, rows_per_position, HAS_POSITIONS)
    # The projection's heads in order: of each group the queries, then the key, then the value.
    head = tl.arange(0, HEAD_BLOCK)
    group, place = head // (QUERIES + 2), head % (QUERIES + 2)
    exists = head < GROUPS * (QUERIES + 2)
    is_q, is_k, is_v = exists & (place < QUERIES), exists & (place == QUERIES), exists & (place == QUERIES + 1)
    mixed_row = (token * GROUPS * (QUERIES + 2) + head) * DIM
    q_row = (token * GROUPS * QUERIES + group * QUERIES + place) * DIM
    kv_row = (token * GROUPS + group) * DIM

    half = tl.arange(0, HALF_BLOCK)
    within = half < HALF
    cos = tl.load(cos_ptr + position * HALF + half, mask=within, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + half, mask=within, other=0.0)
    # Values go through the same arithmetic, rotated by 0.
    rotated = (is_q | is_k)[:, None]
    cos = tl.where(rotated, cos[None, :], 1.0)
    sin = tl.where(rotated, sin[None, :], 0.0)
    if BACKWARD:
        sin = -sin
    low, high = half[None, :], half[None, :] + HALF
    mask, mask_q, mask_k, mask_v = (
        exists[:, None] & within[None, :], is_q[:, None] & within[None, :],
        is_k[:, None] & within[None, :], is_v[:, None] & within[None, :],
    )  # fmt: skip
    if BACKWARD:
        # Each head is a query, a key or a value: two of the three loads are masked and give 0.
        first = tl.load(q_ptr + q_row[:, None] + low, mask=mask_q, other=0.0).to(tl.float32)
        first += tl.load(k_ptr + kv_row[:, None] + low, mask=mask_k, other=0.0).to(tl.float32)
        first += tl.load(v_ptr + kv_row[:, None] + low, mask=mask_v, other=0.0).to(tl.float32)
        second = tl.load(q_ptr + q_row[:, None] + high, mask=mask_q, other=0.0).to(tl.float32)
        second += tl.load(k_ptr + kv_row[:, None] + high, mask=mask_k, other=0.0).to(tl.float32)
        second += tl.load(v_ptr + kv_row[:, None] + high, mask=mask_v, other=0.0).to(tl.float32)
    else:
        first = tl.load(mixed_ptr + mixed_row[:, None] + low, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(mixed_ptr + mixed_row[:, None] + high, mask=mask, other=0.0).to(tl.float32)
    out_first = (first * cos - second * sin).to(mixed_ptr.dtype.element_ty)
    out_second = (second * cos + first * sin).to(mixed_ptr.dtype.element_ty)
    if BACKWARD:
        tl.store(mixed_ptr + mixed_row[:, None] + low, out_first, mask=mask)
        tl.store(mixed_ptr + mixed_row[:, None] + high, out_second, mask=mask)
    else:
        tl.store(q_ptr + q_row[:, None] + low, out_first, mask=mask_q)
        tl.store(q_ptr + q_row[:, None] + high, out_second, mask=mask_q)
        tl.store(k_ptr + kv_row[:, None] + low, out_first, mask=mask_k)
        tl.store(k_ptr + kv_row[:, None] + high, out_second, mask=mask_k)
        tl.store(v_ptr + kv_row[:, None] + low, out_first, mask=mask_v)
        tl.store(v_ptr + kv_row[:, None] + high, out_second, mask=mask_v)

    if REST_BLOCK > 0:  # the dimensions that a model with a partial rotary factor copies as they are
        rest = tl.arange(0, REST_BLOCK) + 2 * HALF
        left = (rest < DIM)[None, :]
        at = rest[None, :]
        if BACKWARD:
            same = tl.load(q_ptr + q_row[:, None] + at, mask=is_q[:, None] & left, other=0.0)
            same += tl.load(k_ptr + kv_row[:, None] + at, mask=is_k[:, None] & left, other=0.0)
            same += tl.load(v_ptr + kv_row[:, None] + at, mask=is_v[:, None] & left, other=0.0)
            tl.store(mixed_ptr + mixed_row[:, None] + at, same, mask=exists[:, None] & left)
        else:
            same = tl.load(mixed_ptr + mixed_row[:, None] + at, mask=exists[:, None] & left, other=0.0)
            tl.store(q_ptr + q_row[:, None] + at, same, mask=is_q[:, None] & left)
            tl.store(k_ptr + kv_row[:, None] + at, same, mask=is_k[:, None] & left)
            tl.store(v_ptr + kv_row[:, None] + at, same, mask=is_v[:, None] & left)


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, cos_ptr, sin_ptr, position_ptr, rows_per_position,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = _position_of(token, position_ptr, rows_per_position, HAS_POSITIONS)
    head, half = tl.arange(0, HEAD_BLOCK)[:, None], tl.arange(0, HALF_BLOCK)[None, :]
    mask = (head < HEADS) & (half < HALF)
    cos = tl.load(cos_ptr + position * HALF + half, mask=half < HALF, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + half, mask=half < HALF, other=0.0)
    begin = (token * HEADS + head) * DIM
    first = tl.load(x_ptr + begin + half, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + begin + half + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + begin + half, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + begin + half + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=mask)
    if REST_BLOCK > 0:  # the dimensions that a model with a partial rotary factor copies as they are
        rest = tl.arange(0, REST_BLOCK)[None, :] + 2 * HALF
        left = (head < HEADS) & (rest < DIM)
        tl.store(y_ptr + begin + rest, tl.load(x_ptr + begin + rest, mask=left), mask=left)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rows: int) -> Tensor:
    """Return contiguous `x` [tokens, heads, dim] rotated. The other arguments are those of `forward`."""
    tokens, heads, dim = x.shape
    half = cos.shape[1]
    rest, y = dim - 2 * half, torch.empty_like(x)
    _rotate_heads[(tokens,)](
        x, y, cos, sin, cos if positions is None else positions, rows,
        HEADS=heads, DIM=dim, HALF=half,
        HEAD_BLOCK=triton.next_power_of_2(heads), HALF_BLOCK=triton.next_power_of_2(half),
        REST_BLOCK=triton.next_power_of_2(rest) if rest else 0,
        HAS_POSITIONS=positions is not None, num_warps=4,
    )  # fmt: skip
    return y


def forward(
    mixed: Tensor, groups: int, queries: int, cos: Tensor, sin: Tensor, positions: Tensor | None, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, each [tokens, heads, dim], from `mixed` [tokens, groups * (queries + 2) * dim].

    cos and sin are fp32 [positions, half] and rotate the first 2 * half dimensions. `positions` [tokens] are the rows
    of them to take. Without it the tokens are those of [sequence, rows], so that token i has position i // rows.
    """
    tokens, dim = mixed.shape[0], mixed.shape[1] // (groups * (queries + 2))
    q = mixed.new_empty(tokens, groups * queries, dim)
    k, v = (mixed.new_empty(tokens, groups, dim) for _ in range(2))
    _launch(mixed, q, k, v, groups, queries, cos, sin, positions, rows, backward=False)
    return q, k, v


def backward(
    grads: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None, rows: int
) -> Tensor:
    """Return the gradient of `mixed` from those of query, key and value."""
    q, k, v = grads
    tokens, groups, dim = k.shape
    queries = q.shape[1] // groups
    mixed = q.new_empty(tokens, groups * (queries + 2) * dim)
    _launch(mixed, q, k, v, groups, queries, cos, sin, positions, rows, backward=True)
    return mixed


def _launch(
    mixed: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: int, queries: int,
    cos: Tensor, sin: Tensor, positions: Tensor | None, rows: int, *, backward: bool,
) -> None:  # fmt: skip
    dim, half = k.shape[2], cos.shape[1]
    rest = dim - 2 * half
    _rotate[(k.shape[0],)](
        mixed, q, k, v, cos, sin, cos if positions is None else positions, rows,
        GROUPS=groups, QUERIES=queries, DIM=dim, HALF=half,
        HEAD_BLOCK=triton.next_power_of_2(groups * (queries + 2)), HALF_BLOCK=triton.next_power_of_2(half),
        REST_BLOCK=triton.next_power_of_2(rest) if rest else 0,
        HAS_POSITIONS=positions is not None, BACKWARD=backward, num_warps=4,
    )  # fmt: skip
