"""The loss that never holds all logits, against torch in fp64: in blocks, with a padded vocabulary, over ranks."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sft.kernels import linear_cross_entropy as module
from sft.kernels.linear_cross_entropy import VocabPart, linear_cross_entropy
from sft.kernels.loss_form import LossForm
from tests.ranks import run_ranks

VOCAB, HIDDEN, ROWS = 37, 16, 11


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, HIDDEN, generator=draw, dtype=dtype) for rows in (ROWS, VOCAB))
    labels = torch.randint(0, VOCAB, (ROWS,), generator=draw)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, torch.rand(ROWS, generator=draw)


def expected(softcap: float | None = None, smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return torch's loss and gradients of hidden states and weight, times 3."""
    hidden, weight, labels, loss_weights = inputs()
    logits = hidden @ weight.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    total = (losses * loss_weights).sum()
    (3 * total).backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("rows_at_a_time", [1, 4, ROWS])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_torch(
    smoothing: float, softcap: float | None, rows_at_a_time: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding rows of the vocabulary have no share in the sum and get no gradient."""
    total, hidden_grad, weight_grad = expected(softcap, smoothing)
    hidden, weight, labels, loss_weights = inputs()
    wide = F.pad(weight.detach(), (0, 0, 0, padding), value=9.0).requires_grad_()
    monkeypatch.setattr(module, "BLOCK_BYTES", rows_at_a_time * (VOCAB + padding) * 8)
    form = LossForm(softcap, smoothing, VOCAB)
    found = linear_cross_entropy(hidden, wide, labels, loss_weights, VocabPart(0, VOCAB), form)
    (3 * found).backward()
    assert wide.grad is not None
    torch.testing.assert_close(found.double(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad, hidden_grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(wide.grad[:VOCAB], weight_grad, rtol=1e-5, atol=1e-6)
    assert not wide.grad[VOCAB:].any()


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_weight_gradient_goes_to_its_buffer(tied: bool, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are added to the buffer. Where the weight is the embedding too, the lookup returns it to autograd."""
    _, hidden_grad, weight_grad = expected()
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * VOCAB * 8)
    hidden, weight, labels, loss_weights = inputs()
    before = torch.ones(weight.shape, dtype=torch.bfloat16 if half else torch.float32)
    weight.main_grad, weight.grad_added_to_main_grad = before, True  # type: ignore[attr-defined]
    linear_cross_entropy(hidden, weight, labels, loss_weights, VocabPart(0, VOCAB, tied=tied)).backward()
    found = weight.main_grad.double()  # type: ignore[attr-defined]
    tolerance = 1e-2 if half else 1e-6
    torch.testing.assert_close(found, 1 + weight_grad / 3, rtol=10 * tolerance, atol=tolerance)
    torch.testing.assert_close(hidden.grad, hidden_grad / 3, rtol=1e-6, atol=1e-7)
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert (weight.grad is None) is tied


def test_the_first_gradient_of_a_step_replaces_what_is_in_the_buffer() -> None:
    """The buffer is zeroed by then and need not be read."""
    hidden, weight, labels, loss_weights = inputs()
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(weight.shape), False  # type: ignore[attr-defined]
    linear_cross_entropy(hidden, weight, labels, loss_weights, VocabPart(0, VOCAB)).backward()
    torch.testing.assert_close(weight.main_grad.double(), expected()[2] / 3, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]


def test_a_scaled_loss_is_refused_where_gradients_are_in_the_buffer_already() -> None:
    hidden, weight, labels, loss_weights = inputs()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False  # type: ignore[attr-defined]
    total = linear_cross_entropy(hidden, weight, labels, loss_weights, VocabPart(0, VOCAB))
    with pytest.raises(RuntimeError, match="was scaled"):
        (3 * total).backward()


def test_no_two_chunks_of_logits_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[weakref.ref[torch.UntypedStorage]] = []
    statistics = module._statistics

    def watched(logits: torch.Tensor, *args: Any) -> Any:
        assert all(chunk() is None for chunk in chunks)
        chunks.append(weakref.ref(logits.untyped_storage()))
        return statistics(logits, *args)

    monkeypatch.setattr(module, "_statistics", watched)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * VOCAB * 8)
    hidden, weight, labels, loss_weights = inputs()
    linear_cross_entropy(hidden, weight, labels, loss_weights, VocabPart(0, VOCAB)).backward()
    assert len(chunks) == 3


def test_no_targets_give_gradients_of_zero() -> None:
    """A micro-batch without targets must still trigger the hooks that wait for every parameter's gradient."""
    hidden, weight, labels, loss_weights = (
        tensor.detach()[:0] if tensor.shape[0] == ROWS else tensor for tensor in inputs()
    )
    hidden.requires_grad_()
    total = linear_cross_entropy(hidden, weight, labels, loss_weights, VocabPart(0, VOCAB))
    total.backward()
    assert total == 0
    assert weight.grad is not None and not weight.grad.any()


def test_frozen_weight_and_evaluation_compute_no_gradients() -> None:
    hidden, weight, labels, loss_weights = inputs()
    linear_cross_entropy(hidden, weight.detach(), labels, loss_weights, VocabPart(0, VOCAB)).backward()
    torch.testing.assert_close(hidden.grad, expected()[1] / 3, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        total = linear_cross_entropy(hidden, weight, labels, loss_weights, VocabPart(0, VOCAB))
    assert total.grad_fn is None
    torch.testing.assert_close(total.double(), expected()[0], rtol=1e-6, atol=0)


def over_ranks(softcap: float | None, smoothing: float) -> tuple[Any, Any, Any]:
    """Return, on a rank, the loss, the summed gradient of the hidden states, and that of this rank's weight rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, labels, loss_weights = inputs()
    rows = -(-VOCAB // size)
    own = F.pad(weight.detach(), (0, 0, 0, rows * size - VOCAB))[rank * rows : (rank + 1) * rows].requires_grad_()
    part = VocabPart(rank * rows, min(VOCAB - rank * rows, rows), dist.group.WORLD)
    total = linear_cross_entropy(hidden, own, labels, loss_weights, part, LossForm(softcap, smoothing, VOCAB))
    (3 * total).backward()
    assert hidden.grad is not None and own.grad is not None
    dist.all_reduce(hidden.grad)
    return total.item(), hidden.grad.numpy(), own.grad[: part.width].numpy()


@pytest.mark.parity
@pytest.mark.parametrize(("softcap", "smoothing"), [(None, 0.0), (2.0, 0.0), (None, 0.2), (2.0, 0.2)])
def test_vocabulary_over_ranks(softcap: float | None, smoothing: float) -> None:
    """Seen to fail, smoothed, with the mean over a rank's own part of the vocabulary."""
    total, hidden_grad, weight_grad = expected(softcap, smoothing)
    found = run_ranks(2, over_ranks, softcap, smoothing, init=True)
    for own, hidden, _ in found:
        assert own == pytest.approx(float(total), rel=1e-6)
        torch.testing.assert_close(torch.from_numpy(hidden), hidden_grad, rtol=1e-6, atol=1e-7)
    weights = torch.cat([torch.from_numpy(weight) for *_, weight in found])
    torch.testing.assert_close(weights, weight_grad, rtol=1e-5, atol=1e-6)
