"""The gradient norm without Transformer Engine and Apex."""

from __future__ import annotations

import pytest
import torch

import sft.megatron.core  # noqa: F401  (makes megatron.core importable below)
from sft.megatron.patches import gradient_norm


def test_gradient_norm_is_exact_where_megatron_cores_is_not() -> None:
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    gradients = [torch.randn(49152 * 576, generator=torch.Generator().manual_seed(0)) * 1e-3, torch.ones(3)]
    exact = float(sum(gradient.double().square().sum() for gradient in gradients).sqrt())  # type: ignore[union-attr]
    flag = torch.zeros(1, dtype=torch.int)
    assert float(clip_grads.l2_norm_impl(0, flag, [gradients], False)[0]) == pytest.approx(exact, rel=1e-7)
    if not torch.cuda.is_available():
        stock = float(local_multi_tensor_l2_norm(0, flag, [gradients], False)[0])
        assert stock == pytest.approx(exact, rel=1e-2)
        assert stock != pytest.approx(exact, rel=1e-4)


def test_gradient_norm_is_replaced_only_where_it_is_the_fallback() -> None:
    from megatron.core.optimizer import clip_grads

    assert clip_grads.l2_norm_impl is gradient_norm.l2_norm
