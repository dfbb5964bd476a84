"""Rows shared by two ranks, on one CUDA device: both parts by the kernel, with gathered keys, against whole attention.

What goes between ranks is tested on a CPU (tests/parity/test_context_parallel.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import sft.megatron.layers.core_attention
from sft.data.batches.context_slice import ContextShare, share_rows
from sft.kernels.attention import Kernel, has_flash4
from sft.megatron.parallel.context import shared_rows
from tests.gpu.test_packing import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),  # from within flash-attn-4's compiler
]

DEVICE = "cuda"
LENGTHS = (37, 1, 200, 64, 18)
"""A row of 320 in slices of 80: the third sequence meets three of them."""
ROWS: dict[str, tuple[int, tuple[int, ...] | None]] = {"packed": (1, LENGTHS), "padded": (3, None)}
HEADS, GROUPS, DIM = 8, 2, 64
Inputs = list[Tensor]


def inputs(rows: int) -> Inputs:
    """Query, key and value of whole rows, [s, b, heads, dim]."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(sum(LENGTHS), rows, count, DIM) for count in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, device=DEVICE, generator=draw).bfloat16().requires_grad_() for shape in shapes]


def shares(rows: int, lengths: tuple[int, ...] | None) -> list[ContextShare]:
    weights = np.zeros((rows, sum(LENGTHS)), dtype=np.float32)
    return [share_rows(weights, lengths, rank, 2).to(DEVICE) for rank in range(2)]


def in_two_parts(tensors: Inputs, parts: list[ContextShare], kernel: Kernel, window: int | None = None) -> Tensor:
    """[s, b, heads * dim] of whole rows, computed as two ranks would."""
    layer = attention(window=window)
    layer._kernel = kernel
    query, key, value = tensors
    chunks: dict[int, Tensor] = {}
    for part in parts:
        own = torch.cat([query[each.begin : each.end] for each in part.slices])
        found = layer(own, key, value, None, packed_seq_params=shared_rows(part))
        chunks |= {each.begin: piece for each, piece in zip(part.slices, found.chunk(2), strict=True)}
    return torch.cat([chunks[begin] for begin in sorted(chunks)])


def whole(tensors: Inputs, lengths: tuple[int, ...] | None, window: int | None) -> Tensor:
    """The same in fp32, sequence by sequence."""
    layer, rows = attention(window=window), sum(LENGTHS)
    cut = (rows,) if lengths is None else lengths
    query, key, value = tensors
    return layer._one_by_one(query, key, value, cut, cut).flatten(2)


@pytest.fixture(autouse=True)
def keys_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda key, value: (key, value)  # noqa: E731
    monkeypatch.setattr(sft.megatron.layers.core_attention, "gather_rows", both)


@pytest.fixture(params=["flash2", "flash4"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """torch's, and the faster one where it is installed."""
    chosen: Kernel = request.param
    if chosen == "flash4" and not has_flash4():
        pytest.skip("flash-attn-4 is not installed")
    return chosen


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("window", [None, 2, 50])
def test_parts_agree_with_whole_rows(window: int | None, form: str, kernel: Kernel) -> None:
    """Output and gradients, against fp32."""
    rows, lengths = ROWS[form]
    found = inputs(rows)
    exact = [tensor.detach().float().requires_grad_() for tensor in found]
    outputs = [in_two_parts(found, shares(rows, lengths), kernel, window), whole(exact, lengths, window)]
    for output in outputs:
        output.float().square().sum().backward()
    torch.testing.assert_close(outputs[0].float(), outputs[1], atol=2e-2, rtol=2e-2)
    for half, wide in zip(found, exact, strict=True):
        assert half.grad is not None and wide.grad is not None
        error = (half.grad.float() - wide.grad).norm() / wide.grad.norm()
        assert error < 1e-2


def test_no_gradient_reaches_a_neighbour(kernel: Kernel) -> None:
    tensors = inputs(1)
    first, second = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    in_two_parts(tensors, shares(1, LENGTHS), kernel)[first:second].float().sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad[first:second].any()
        assert not tensor.grad[:first].any()
        assert not tensor.grad[second:].any()


def test_parts_wait_for_nothing() -> None:
    """No number goes from the device to the host."""
    tensors, parts = inputs(1), shares(1, LENGTHS)
    in_two_parts(tensors, parts, "flash2")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        in_two_parts(tensors, parts, "flash2").float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
