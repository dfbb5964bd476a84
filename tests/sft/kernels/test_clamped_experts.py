"""Experts with biases and a clamped unit: transformers' unit, and all at once against one operation after another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sft.kernels.clamped_experts import Unit, clamped_experts, clamped_unit
from sft.kernels.expert_bias import add_expert_bias
from sft.kernels.grouped_experts import expert_products
from tests.sft.kernels.test_expert_bias import ENDS, drawn

EXPERTS, HIDDEN, WIDTH = 4, 5, 3
UNIT: Unit = (1.702, 1.0)
Biased = tuple[Tensor, Tensor]


@pytest.mark.parametrize("unit", [(1.702, 7.0), (1.2, 0.5)])
def test_the_clamped_unit_is_transformers(unit: Unit) -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    slope, limit = unit
    config = GptOssConfig(
        hidden_size=2, intermediate_size=2, num_local_experts=1, swiglu_alpha=slope, swiglu_limit=limit
    )
    mixed = 4 * drawn(5, 8)
    found, exact = (mixed.clone().requires_grad_() for _ in range(2))
    ours = clamped_unit(found, unit)
    theirs = GptOssExperts(config)._apply_gate(torch.stack(exact.chunk(2, dim=-1), dim=-1).flatten(-2))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for output in (ours, theirs):
        output.square().sum().backward()
    torch.testing.assert_close(found.grad, exact.grad, rtol=1e-12, atol=0)


def inputs() -> list[Tensor]:
    """Rows, their weights, and matrices and biases, of which some units are clamped and some are not."""
    up, down = drawn(EXPERTS * 2 * WIDTH, HIDDEN), drawn(EXPERTS * HIDDEN, WIDTH)
    tensors = [drawn(6, HIDDEN), drawn(6).abs(), up, drawn(EXPERTS * 2 * WIDTH), down, drawn(EXPERTS * HIDDEN)]
    return [tensor.requires_grad_() for tensor in tensors]


def one_by_one(rows: Tensor, weights: Tensor, up: Biased, down: Biased, *, adds_bias: bool) -> Tensor:
    first, second = (matrices.view(EXPERTS, -1, matrices.size(1)) for matrices, _ in (up, down))
    mixed = add_expert_bias(expert_products(rows, first, ENDS), up[1].view(EXPERTS, -1), ENDS)
    product = expert_products(clamped_unit(mixed, UNIT), second, ENDS)
    return add_expert_bias(product, down[1].view(EXPERTS, -1), ENDS, here=adds_bias) * weights.unsqueeze(-1)


@pytest.mark.parametrize("adds_bias", [True, False])
def test_at_once_and_one_by_one(adds_bias: bool) -> None:
    """Output and all gradients, those of the weights of rows among them. The second expert has no rows."""
    found, exact = inputs(), inputs()
    outputs = []
    for run, (rows, weights, *others) in ((clamped_experts, found), (one_by_one, exact)):
        pairs = (others[0], others[1]), (others[2], others[3])
        own = (ENDS, UNIT) if run is clamped_experts else ()
        outputs.append(run(rows, weights, *pairs, *own, adds_bias=adds_bias))
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for own, other in zip(found, exact, strict=True):
        assert other.grad is not None and other.grad.any()
        torch.testing.assert_close(own.grad, other.grad)


def test_frozen_experts_get_no_gradients() -> None:
    rows, weights, *frozen = inputs()
    up, up_bias, down, down_bias = (tensor.detach() for tensor in frozen)
    clamped_experts(rows, weights, (up, up_bias), (down, down_bias), ENDS, UNIT).sum().backward()
    assert rows.grad is not None and rows.grad.any()
    assert up.grad is up_bias.grad is down.grad is down_bias.grad is None


def test_a_rank_without_rows_computes_nothing() -> None:
    _, _, up, up_bias, down, down_bias = inputs()
    nothing = torch.zeros(EXPERTS, dtype=torch.int32)
    rows, weights = drawn(0, HIDDEN).requires_grad_(), drawn(0).requires_grad_()
    output = clamped_experts(rows, weights, (up, up_bias), (down, down_bias), nothing, UNIT)
    output.sum().backward()
    assert output.shape == (0, HIDDEN)
    assert down_bias.grad is not None and not down_bias.grad.any()
