"""Experts' products in fp8: for each expert those of a dense linear in fp8, and what torch's grouped product takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sft.kernels import fp8
from sft.kernels.clamped_experts import clamped_experts, clamped_unit
from sft.kernels.expert_bias import add_expert_bias
from sft.kernels.expert_mlp import swiglu_experts, weighted_swiglu
from sft.kernels.fp8_experts import fp8_expert_products, grouped_product
from sft.kernels.grouped_experts import looped_products
from sft.kernels.linear import GradientForm, fp8_linear

EXPERTS, HIDDEN, WIDTH = 4, 32, 16
SIZES = [3, 0, 5, 1]
ENDS = torch.tensor(SIZES).cumsum(0).to(torch.int32)
ROWS = sum(SIZES)
FORMS: list[GradientForm] = ["e4m3", "bf16"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()
    return values.requires_grad_()


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Compare values and, for a random gradient of them, the gradients of the inputs."""
    upstream = drawn(*expected.shape, seed=9).detach()
    ours, theirs = (torch.autograd.grad(values, inputs, upstream) for values in (found, expected))
    for own, other in zip((found, *ours), (expected, *theirs), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("form", FORMS)
def test_each_expert_computes_as_a_linear(form: GradientForm) -> None:
    rows, weight = drawn(ROWS, HIDDEN), drawn(EXPERTS * WIDTH, HIDDEN)
    own = zip(rows.split(SIZES), weight.view(EXPERTS, WIDTH, HIDDEN), strict=True)
    expected = torch.cat([fp8_linear(part, matrix.contiguous(), form) for part, matrix in own if len(part)])
    found = fp8_expert_products(rows, weight, ENDS, form)
    assert_same(found, expected, [rows, weight])
    assert not torch.equal(found, looped_products(rows, weight.view(EXPERTS, WIDTH, HIDDEN), ENDS))


@pytest.mark.parametrize("forms", [("e4m3", "e4m3"), ("bf16", "e4m3"), ("e4m3", "bf16")])
def test_all_at_once_computes_the_same(forms: tuple[GradientForm, GradientForm]) -> None:
    rows, weights = drawn(ROWS, HIDDEN), torch.rand(ROWS, generator=torch.Generator().manual_seed(1)).requires_grad_()
    up, down = drawn(EXPERTS * 2 * WIDTH, HIDDEN), drawn(EXPERTS * HIDDEN, WIDTH)
    mixed = fp8_expert_products(rows, up, ENDS, forms[0])
    expected = fp8_expert_products(weighted_swiglu(mixed, weights), down, ENDS, forms[1])
    found = swiglu_experts(rows, weights, up, down, ENDS, fp8_gradients=forms)
    assert_same(found, expected, [rows, weights, up, down])


def test_experts_with_biases_compute_the_same() -> None:
    """The weights multiply the unit in one and the output in the other, so fp8 rounds other values of them."""
    rows, weights = drawn(ROWS, HIDDEN), torch.rand(ROWS, generator=torch.Generator().manual_seed(1)).requires_grad_()
    up, down = drawn(EXPERTS * 2 * WIDTH, HIDDEN), drawn(EXPERTS * HIDDEN, WIDTH)
    biases = drawn(EXPERTS * 2 * WIDTH), drawn(EXPERTS * HIDDEN)
    mixed = add_expert_bias(fp8_expert_products(rows, up, ENDS), biases[0].view(EXPERTS, -1), ENDS)
    output = fp8_expert_products(clamped_unit(mixed, (1.7, 2.0)), down, ENDS)
    expected = add_expert_bias(output, biases[1].view(EXPERTS, -1), ENDS) * weights.unsqueeze(-1)
    both = (up, biases[0]), (down, biases[1])
    found = clamped_experts(rows, weights, *both, ENDS, (1.7, 2.0), fp8_gradients=("e4m3", "e4m3"))
    exact = clamped_experts(rows, weights, *both, ENDS, (1.7, 2.0))
    error = (found - expected).norm() / expected.norm()
    assert error < 0.3 * (exact - expected).norm() / expected.norm()


def test_gradients_of_weights_go_to_their_buffer() -> None:
    rows, weight = drawn(ROWS, HIDDEN), drawn(EXPERTS * WIDTH, HIDDEN)
    (expected,) = torch.autograd.grad(fp8_expert_products(rows, weight, ENDS).sum(), weight)
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for _ in range(2):
        fp8_expert_products(rows, weight, ENDS).sum().backward()
    torch.testing.assert_close(weight.main_grad, 2 * expected.float(), rtol=1e-2, atol=1e-2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_without_tokens_takes_part(form: GradientForm) -> None:
    rows, weight = drawn(0, HIDDEN), drawn(EXPERTS * WIDTH, HIDDEN)
    found = fp8_expert_products(rows, weight, torch.zeros_like(ENDS), form)
    assert found.shape == (0, WIDTH)
    for gradient in torch.autograd.grad(found.sum(), [rows, weight]):
        assert not gradient.any()


def test_a_transpose_of_each_matrix_has_scales_of_its_own() -> None:
    weight = drawn(EXPERTS * WIDTH, HIDDEN).detach()
    found = fp8.quantize_transposed(weight, EXPERTS)
    each = [fp8.quantize_transposed(matrix) for matrix in weight.split(WIDTH)]
    assert torch.equal(found.values.float(), torch.cat([one.values for one in each]).float())
    assert torch.equal(found.scales, torch.cat([one.scales for one in each]))


def test_torchs_grouped_product_takes_what_we_give_it() -> None:
    """Strides, types and shapes of scales, which torch looks at without computing."""
    low = fp8.Rows(
        torch.empty(ROWS, HIDDEN, dtype=torch.float8_e4m3fn, device="meta"), torch.empty(ROWS, 1, device="meta")
    )
    weight = torch.empty(EXPERTS, WIDTH, HIDDEN, dtype=torch.float8_e4m3fn, device="meta")
    scales = torch.empty(EXPERTS, WIDTH, device="meta")
    found = grouped_product(low, weight, scales, ENDS.to("meta"), torch.bfloat16)
    assert (found.shape, found.dtype) == ((ROWS, WIDTH), torch.bfloat16)
    with pytest.raises(RuntimeError, match="E4M3"):
        wide = fp8.Rows(low.values.to(torch.float8_e5m2), low.scales)
        grouped_product(wide, weight, scales, ENDS.to("meta"), torch.bfloat16)
