"""The Triton kernels without a GPU, in Triton's interpreter: in fp32 the numbers of torch's own operations.

Masks, addresses and arithmetic are seen here. Whether kernels compile, are fast, and round as they should in half
precision and fp8 is for a GPU (tests/gpu).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sft.kernels import adamw, fp8, norm
from sft.kernels.clamped_experts import clamped_experts
from sft.kernels.embedding import lookup
from sft.kernels.expert_mlp import swiglu_experts
from sft.kernels.gated import gated
from sft.kernels.grouped_experts import assign, sum_of_experts
from sft.kernels.linear import gated_mlp
from sft.kernels.linear_cross_entropy import VocabPart, linear_cross_entropy
from sft.kernels.loss_form import LossForm
from sft.kernels.rope import rotate_heads, split_and_rotate
from tests.sft.kernels.test_adamw import SETTINGS, adamw_rows

pytest.importorskip("triton", reason="Triton is not installed; torch for CUDA brings it")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu compiles the kernels here"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of what is computed behind masks, and stored nowhere
]

Operation = Callable[..., "Tensor | tuple[Tensor, ...]"]

EXPERTS = 3
CHOSEN = assign(torch.tensor([[0, 2], [2, 0], [0, 2], [0, 2], [2, 0]]), EXPERTS)
"""Of five tokens. One expert has none."""
ANGLES = torch.rand(9, 3, generator=torch.Generator().manual_seed(4)) * 9
POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1, 8])
IDS = torch.tensor([[3, 1, 3], [0, 6, 3]])
LABELS = torch.tensor([0, 6, 3, 3, 1])
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def loss(softcap: float | None, smoothing: float) -> Operation:
    form = LossForm(softcap=softcap, smoothing=smoothing, vocabulary=7)
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, LABELS, WEIGHTS, VocabPart(0, 7), form)


def rotated(positions: Tensor | None) -> Operation:
    return lambda x: rotate_heads(x, ANGLES.cos(), ANGLES.sin(), positions)


def split(positions: Tensor | None) -> Operation:
    return lambda mixed: split_and_rotate(mixed, 2, 3, ANGLES, positions, 1.5)


_TWO = (drawn(5, 40, seed=1), drawn(5, 40))
CASES: dict[str, tuple[Operation, Sequence[Tensor]]] = {
    "norm": (lambda x, w: norm.rms_norm(x, w, 1e-5), [drawn(5, 2, 40), drawn(40)]),
    "norm_centered": (lambda x, w: norm.rms_norm(x, w, 1e-5, centered=True), [drawn(5, 2, 40), drawn(40)]),
    "norm_of_a_sum": (
        lambda b, x, w: norm.add_and_fork(b, x, w, 1e-5),
        [drawn(5, 40, seed=1), drawn(5, 40), drawn(40)],
    ),
    "swiglu": (lambda x: gated(x * 1, "silu"), [drawn(5, 2, 40)]),
    "geglu": (lambda x: gated(x * 1, "gelu_tanh"), [drawn(5, 2, 40)]),
    "mlp": (lambda x, up, down: gated_mlp(x, up, down, "silu"), [drawn(5, 12), drawn(40, 12), drawn(12, 20)]),
    "rotated_heads": (rotated(None), [drawn(7, 2, 5, 8)]),
    "rotated_heads_packed": (rotated(POSITIONS), [drawn(7, 1, 5, 6)]),
    "split_and_rotated": (split(None), [drawn(7, 2, 2 * 5 * 8)]),
    "split_and_rotated_packed": (split(POSITIONS), [drawn(7, 1, 2 * 5 * 6)]),
    "lookup": (lambda table: lookup(table, IDS, partial=False), [drawn(7, 40)]),
    "lookup_of_a_part": (lambda table: lookup(table, IDS - 2, partial=True), [drawn(3, 40)]),
    "loss": (loss(None, 0.0), [drawn(5, 12), drawn(8, 12)]),
    "loss_capped_and_smoothed": (loss(3.0, 0.1), [drawn(5, 12), drawn(8, 12)]),
    "experts": (
        lambda rows, w, up, down: swiglu_experts(rows, w, up, down, CHOSEN.ends),
        [drawn(10, 12), drawn(10), drawn(EXPERTS * 16, 12), drawn(EXPERTS * 12, 8)],
    ),
    "experts_clamped": (
        lambda rows, w, up, a, down, b: clamped_experts(rows, w, (up, a), (down, b), CHOSEN.ends, (1.7, 2.0)),
        [drawn(10, 12), drawn(10), drawn(EXPERTS * 16, 12), drawn(EXPERTS * 16), drawn(EXPERTS * 12, 8), drawn(36)],
    ),
    "sum_of_experts": (lambda rows: sum_of_experts(rows, CHOSEN), [drawn(10, 40)]),
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have operations choose their kernels, as they do for tensors of a GPU."""

    def choose() -> None:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=1))

    return choose


def results(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of all inputs."""
    own = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = operation(*own)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    torch.autograd.backward(outputs, [drawn(*output.shape, seed=9) if output.dim() else None for output in outputs])
    return [*(output.detach() for output in outputs), *(tensor.grad for tensor in own if tensor.grad is not None)]


@pytest.mark.parametrize("case", CASES)
def test_kernel_is_torchs_own_operations(case: str, kernels: Callable[[], None]) -> None:
    operation, inputs = CASES[case]
    expected = results(operation, inputs)
    assert len(expected) > len(inputs)
    kernels()
    for found, exact in zip(results(operation, inputs), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overwrite", [True, False])
def test_weight_gradients_of_experts(overwrite: bool) -> None:
    from sft.kernels.triton import experts  # after the check that Triton is here

    grad, rows, before = drawn(10, 16), drawn(10, 12), drawn(EXPERTS, 16, 12)
    found = before.clone()
    experts.add_weight_gradients(found, grad, rows, CHOSEN.ends, overwrite=overwrite)
    for expert, (first, end) in enumerate(zip([0, *CHOSEN.ends.tolist()], CHOSEN.ends.tolist(), strict=False)):
        exact = grad[first:end].t() @ rows[first:end] + (0 if overwrite else before[expert])
        torch.testing.assert_close(found[expert], exact, rtol=1e-5, atol=1e-5)


def test_transposes_of_several_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before values are rounded to fp8, which the interpreter does wrongly next to powers of two."""
    from sft.kernels.triton import fp8 as triton_fp8

    monkeypatch.setattr(triton_fp8, "empty_rows", lambda x, *size: (torch.empty(size), torch.empty(size[0], 1)))
    weight = drawn(EXPERTS * 70, 300) * torch.linspace(0.1, 3, 300)
    values, scales = triton_fp8.transposed(weight, triton_fp8.column_peaks(weight, EXPERTS), EXPERTS)
    torch.testing.assert_close(scales, fp8.quantize_transposed(weight, EXPERTS).scales, rtol=1e-6, atol=0)
    exact = weight.view(EXPERTS, 70, 300).transpose(1, 2).reshape(-1, 70)
    torch.testing.assert_close(values * scales, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_update(shift: int) -> None:
    from sft.kernels.triton import adamw as triton_adamw

    sizes = (1, 4100, 256)
    rows, expected = adamw_rows("cpu", sizes, shift), adamw_rows("cpu", sizes, shift)
    corrections = adamw.bias_corrections(torch.full((len(sizes),), 7.0), SETTINGS.betas)
    scale, skip = torch.tensor([2.5]), torch.tensor([0.0])
    adamw.update(expected, corrections, scale, skip, SETTINGS)
    triton_adamw.update(triton_adamw.Table(rows), corrections, scale, skip, SETTINGS)
    for own, exact in zip(rows, expected, strict=True):
        for found, tensor in zip(own, exact, strict=True):
            torch.testing.assert_close(found, tensor, rtol=1e-2 if found.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
