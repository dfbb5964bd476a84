"""A mixture of experts on one CUDA device: in bf16 against fp64, the same bits twice, and without waiting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels.clamped_experts import Unit, _weighted, _weighted_backward, clamped_experts, clamped_unit
from sft.kernels.expert_bias import add_expert_bias
from sft.kernels.expert_mlp import swiglu_experts
from sft.kernels.fp8_experts import fp8_expert_products
from sft.kernels.grouped_experts import Assignment, assign, looped_products, sort_rows, sum_of_experts, to_experts
from sft.kernels.linear import fp8_linear
from tests.gpu.test_kernels import assert_equal, drawn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

EXPERTS, CHOSEN, HIDDEN, WIDTH = 16, 4, 512, 384
UNIT: Unit = (1.702, 3.0)
"""A limit that few values are near: what bf16 rounds across it has another gradient."""


def choice(tokens: int) -> Assignment:
    """An uneven choice: the first experts get most tokens, and the last none."""
    draw = torch.Generator("cuda").manual_seed(3)
    scores = torch.rand(tokens, EXPERTS, device="cuda", generator=draw)
    scores *= torch.linspace(1, 0.3, EXPERTS, device="cuda")
    scores[:, -1] = -1
    return assign(scores.topk(CHOSEN).indices, EXPERTS)


def inputs(tokens: int) -> list[Tensor]:
    """Tokens, weights, and the experts' matrices one below the other, of sizes that keep the outputs near 1."""
    weights = torch.rand(tokens, CHOSEN, device="cuda", generator=torch.Generator("cuda").manual_seed(4))
    up = drawn(EXPERTS * 2 * WIDTH, HIDDEN) / HIDDEN**0.5
    return [drawn(tokens, HIDDEN), weights, up, drawn(EXPERTS * HIDDEN, WIDTH) / WIDTH**0.5]


@pytest.mark.parametrize("tokens", [1, 45, 3000])
def test_experts(tokens: int) -> None:
    assignment = choice(tokens)

    def ours(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows, by_row = to_experts(x, assignment), sort_rows(weights.flatten(), assignment)
        return sum_of_experts(swiglu_experts(rows, by_row, up, down, assignment.ends), assignment)

    def plain(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows = x.repeat_interleave(CHOSEN, 0)[assignment.source]
        mixed = looped_products(rows, up.view(EXPERTS, -1, HIDDEN), assignment.ends)
        gate, other = mixed.chunk(2, dim=-1)
        rows = looped_products(F.silu(gate) * other, down.view(EXPERTS, HIDDEN, -1), assignment.ends)
        return (rows[assignment.place].view(-1, CHOSEN, HIDDEN) * weights.unsqueeze(-1)).sum(1)

    assert_equal(ours, plain, inputs(tokens), tolerance=1e-2)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() not in ((9, 0), (10, 0)),
    reason="torch has a grouped product in fp8 for Hopper and Blackwell",
)
@pytest.mark.parametrize("tokens", [1, 45, 3000])
def test_experts_in_fp8(tokens: int) -> None:
    """Groups of any number of rows, and the last expert has none. Both ways round the same values."""
    ends = choice(tokens).ends
    x, weights, up, down = inputs(tokens)
    rows, by_row = x.repeat_interleave(CHOSEN, 0), weights.flatten()

    def at_once(*given: Tensor) -> Tensor:
        return swiglu_experts(*given, ends, fp8_gradients=("e4m3", "e4m3"))

    def by_expert(rows: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        own = zip(*(each.split(ends.diff(prepend=ends.new_zeros(1)).tolist()) for each in (rows, weights)), strict=True)
        matrices = zip(up.view(EXPERTS, -1, HIDDEN), down.view(EXPERTS, HIDDEN, -1), strict=True)
        outputs = []
        for (part, weight), (first, second) in zip(own, matrices, strict=True):
            gate, other = (part @ first.t()).chunk(2, dim=-1)
            outputs.append((F.silu(gate) * other * weight.unsqueeze(-1)) @ second.t())
        return torch.cat(outputs)

    tolerance = 0.1 if tokens > 1 else 0.2  # the gradient of four weights is four sums, not thousands
    assert_equal(at_once, by_expert, [rows, by_row, up, down], tolerance=tolerance)


def test_each_expert_in_fp8_is_a_linear_in_fp8() -> None:
    """Torch's two products of the same rounded values."""
    ends = choice(3000).ends
    rows, weight = drawn(int(ends[-1]), HIDDEN), drawn(EXPERTS * WIDTH, HIDDEN) / HIDDEN**0.5
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = zip(rows.split(sizes), weight.view(EXPERTS, WIDTH, HIDDEN), strict=True)
    expected = torch.cat([fp8_linear(part, matrix.contiguous()) for part, matrix in parts if len(part)])
    torch.testing.assert_close(fp8_expert_products(rows, weight, ends), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("tokens", [1, 45, 3000])
def test_biases_of_experts(tokens: int) -> None:
    """The last expert has no rows."""
    assignment = choice(tokens)
    experts = torch.repeat_interleave(torch.arange(EXPERTS, device="cuda"), assignment.counts())
    x = drawn(len(assignment.source), 2 * WIDTH)
    assert_equal(
        lambda x, bias: add_expert_bias(x, bias, assignment.ends),
        lambda x, bias: x + bias[experts],
        [x, drawn(EXPERTS, 2 * WIDTH)],
    )


@pytest.mark.parametrize("adds_bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 45, 3000])
def test_clamped_experts(tokens: int, adds_bias: bool) -> None:
    assignment = choice(tokens)
    experts = torch.repeat_interleave(torch.arange(EXPERTS, device="cuda"), assignment.counts())
    x, weights, up, down = inputs(tokens)

    def ours(x: Tensor, weights: Tensor, *biased: Tensor) -> Tensor:
        rows, by_row = to_experts(x, assignment), sort_rows(weights.flatten(), assignment)
        pairs = (biased[0], biased[1]), (biased[2], biased[3])
        return sum_of_experts(
            clamped_experts(rows, by_row, *pairs, assignment.ends, UNIT, adds_bias=adds_bias), assignment
        )

    def plain(x: Tensor, weights: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        rows = x.repeat_interleave(CHOSEN, 0)[assignment.source]
        mixed = looped_products(rows, up.view(EXPERTS, -1, HIDDEN), assignment.ends)
        unit = clamped_unit(mixed + up_bias.view(EXPERTS, -1)[experts], UNIT)
        rows = looped_products(unit, down.view(EXPERTS, HIDDEN, -1), assignment.ends)
        # A part that adds no bias has its gradient all the same.
        bias = down_bias.view(EXPERTS, -1)[experts]
        rows = rows + (bias if adds_bias else bias - bias.detach())
        return (rows[assignment.place].view(-1, CHOSEN, HIDDEN) * weights.unsqueeze(-1)).sum(1)

    biases = drawn(EXPERTS * 2 * WIDTH, seed=5) / 4, drawn(EXPERTS * HIDDEN, seed=6)
    assert_equal(ours, plain, [x, weights, up, biases[0], down, biases[1]], tolerance=2e-2)


def test_the_clamped_units_kernel_clamps_as_torch_does() -> None:
    """Values at a limit pass their gradient on, those beyond it none; fp32, where no rounding moves them."""
    unit = (1.702, 1.0)
    x = torch.tensor([[1.0, 1.1, -3.0, 0.4, 1.0, -1.0, 1.5, -1.5]], device="cuda").repeat(2, 1)
    weights, grad = torch.tensor([0.5, 2.0], device="cuda"), torch.randn(2, 4, device="cuda")
    exact, factor = x.clone().requires_grad_(), weights.clone().requires_grad_()
    expected = clamped_unit(exact, unit) * factor.unsqueeze(-1)
    expected.backward(grad)
    torch.testing.assert_close(_weighted(x, weights, unit), expected)
    gated, mixed_grad, weights_grad = _weighted_backward(grad, x.clone(), weights, unit)
    torch.testing.assert_close(gated, expected)
    torch.testing.assert_close(mixed_grad, exact.grad)
    torch.testing.assert_close(weights_grad, factor.grad)


def test_clamped_experts_give_the_same_bits_twice_and_wait_for_nothing() -> None:
    assignment = choice(700)
    x, weights, up, down = inputs(700)
    by_row = sort_rows(weights.flatten(), assignment)
    biases = drawn(EXPERTS * 2 * WIDTH, seed=5), drawn(EXPERTS * HIDDEN, seed=6)

    def run() -> list[Tensor]:
        own = [tensor.clone().requires_grad_() for tensor in (to_experts(x, assignment), by_row, up, down, *biases)]
        pairs = (own[2], own[4]), (own[3], own[5])
        output = clamped_experts(own[0], own[1], *pairs, assignment.ends, UNIT)
        output.float().square().sum().backward()
        return [output.detach(), *(tensor.grad for tensor in own if tensor.grad is not None)]

    first = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(first) == 7
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_a_buffer(dtype: torch.dtype) -> None:
    """Of two micro-batches, the first of which overwrites zeros."""
    assignment = choice(700)
    x, weights, up, down = inputs(700)
    weight = torch.nn.Parameter(up)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(up, dtype=dtype), False  # type: ignore[attr-defined]
    by_row = sort_rows(weights.flatten(), assignment)
    for _ in range(2):
        swiglu_experts(
            to_experts(x, assignment), by_row, weight, down, assignment.ends
        ).float().square().sum().backward()
    exact = up.double().requires_grad_()
    mixed = looped_products(to_experts(x.double(), assignment), exact.view(EXPERTS, -1, HIDDEN), assignment.ends)
    gate, other = mixed.chunk(2, dim=-1)
    outputs = looped_products(F.silu(gate) * other, down.double().view(EXPERTS, HIDDEN, -1), assignment.ends)
    (outputs * by_row.double().unsqueeze(-1)).square().sum().backward()
    assert exact.grad is not None
    error = (weight.main_grad.double() - 2 * exact.grad).norm() / (2 * exact.grad).norm()
    assert error < 1e-2
    assert weight.main_grad.view(EXPERTS, -1)[-1].count_nonzero() == 0


def test_two_runs_give_the_same_bits_without_waiting_for_the_device() -> None:
    assignment = choice(3000)
    x, weights, up, down = inputs(3000)

    def run() -> tuple[Tensor, ...]:
        own = [tensor.clone().requires_grad_() for tensor in (x, weights, up, down)]
        again = choice(3000)
        rows, by_row = to_experts(own[0], again), sort_rows(own[1].flatten(), again)
        output = sum_of_experts(swiglu_experts(rows, by_row, own[2], own[3], again.ends), again)
        output.float().square().sum().backward()
        return output.detach(), *(tensor.grad for tensor in own if tensor.grad is not None)

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(first) == 5
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))
    assert assignment.ends.tolist() == choice(3000).ends.tolist()
