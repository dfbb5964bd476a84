"""Products of experts' matrices in fp8: forward and for gradients of inputs, as of dense linears (sft.kernels.linear).

Each row of tokens has a scale, and each row of each expert's matrix. On a GPU the product is torch's grouped one, which
takes E4M3 alone and exists on Hopper and Blackwell. Gradients of weights are not in fp8.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sft.kernels import fp8
from sft.kernels.autograd import Context
from sft.kernels.grouped_experts import expert_products, expert_weight_gradients, looped_products
from sft.kernels.linear import GradientForm

Forms = tuple[GradientForm, ...]
"""How gradients enter the products for gradients of inputs: of experts' first matrices, and of their second ones."""


def fp8_expert_products(rows: Tensor, weight: Tensor, ends: Tensor, gradients: GradientForm = "e4m3") -> Tensor:
    """Return the product of each expert's rows with its matrix in fp8, [rows, out], of weight [experts * out, in].

    rows are [rows, in], sorted by expert; `ends` int32 [experts] holds for each expert the row behind its last one.
    """
    output: Tensor = _Fp8ExpertProducts.apply(rows, weight, ends, gradients)
    return output


def forward_products(rows: Tensor, weight: Tensor, ends: Tensor, *, in_fp8: bool) -> Tensor:
    """Return the product of each expert's rows with its matrix, [rows, out], of weight [experts * out, in]."""
    if not in_fp8:
        return expert_products(rows, _matrices(weight, ends), ends)
    return _product(rows, "e4m3", fp8.quantize(weight), ends)


def input_gradients(grad: Tensor, weight: Tensor, ends: Tensor, form: GradientForm) -> Tensor:
    """Return the product of each expert's rows of contiguous `grad` [rows, out] with its matrix transposed."""
    if form == "bf16":
        return expert_products(grad, _matrices(weight, ends).transpose(1, 2), ends)
    return _product(grad, form, fp8.quantize_transposed(weight, len(ends)), ends)


def _matrices(weight: Tensor, ends: Tensor) -> Tensor:
    return weight.view(len(ends), -1, weight.size(1))


def _product(rows: Tensor, form: fp8.Format, weight: fp8.Rows, ends: Tensor) -> Tensor:
    """Return rows [rows, in] by the experts' matrices [experts * out, in], transposed."""
    if not len(rows):  # other ranks wait for one that no token goes to
        return rows.new_zeros(0, len(weight.values) // len(ends))
    low = fp8.quantize(rows.contiguous(), form)
    values, scales = _matrices(weight.values, ends), weight.scales.view(len(ends), -1)
    if low.values.is_cuda:
        return grouped_product(low, values, scales, ends, rows.dtype)
    exact = looped_products(low.values.float() * low.scales, values.float() * scales.unsqueeze(-1), ends)
    return exact.to(rows.dtype)


def grouped_product(a: fp8.Rows, b: Tensor, scales: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Return torch's grouped product of a [rows, in] and b [experts, out, in] with scales [experts, out], [rows, out].

    Both are in E4M3, and `in` and `out` multiples of 16.
    """
    result: Tensor = torch._scaled_grouped_mm(
        a.values, b.transpose(1, 2), a.scales.squeeze(1), scales, offs=ends, out_dtype=dtype, use_fast_accum=True
    )
    return result


class _FormContext(Context, Protocol):
    gradients: GradientForm


class _Fp8ExpertProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FormContext, rows: Tensor, weight: Tensor, ends: Tensor, gradients: GradientForm) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        ctx.gradients = gradients
        return forward_products(rows, weight, ends, in_fp8=True)

    @staticmethod
    def backward(ctx: _FormContext, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            rows_grad = input_gradients(grad, weight, ends, ctx.gradients)
        if ctx.needs_input_grad[1]:
            weight_grad = expert_weight_gradients(weight, len(ends), grad, rows.contiguous(), ends)
        return rows_grad, weight_grad, None, None
