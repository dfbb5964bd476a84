"""The update against torch's AdamW, and a skipped step, which changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sft.kernels import adamw

SETTINGS = adamw.Settings(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def adamw_rows(device: str, sizes: Sequence[int], shift: int = 0) -> list[adamw.Row]:
    """Return random tensors, the same every time, that begin `shift` elements after an aligned address."""
    draw = torch.Generator(device).manual_seed(0)
    rows = []
    for size in sizes:
        weight, grad, mean, square = (
            torch.randn(size + shift, generator=draw, device=device)[shift:] for _ in range(4)
        )
        copy = torch.empty(size + shift, dtype=torch.bfloat16, device=device)[shift:].copy_(weight)
        rows.append(adamw.Row(weight, grad, mean, square.abs_(), copy))
    return rows


def test_equals_torch_and_rounds_the_copies() -> None:
    rows = adamw_rows("cpu", (1, 300))
    exact = [torch.nn.Parameter(row.weight.double()) for row in rows]
    optimizer = torch.optim.AdamW(exact, **SETTINGS._asdict())
    for parameter, row in zip(exact, rows, strict=True):
        parameter.grad = row.grad.double() / 2.5
        moments = {"exp_avg": row.mean.double(), "exp_avg_sq": row.square.double()}
        optimizer.state[parameter] = {"step": torch.tensor(6.0), **moments}
    optimizer.step()
    corrections = adamw.bias_corrections(torch.full((2,), 7.0), SETTINGS.betas)
    adamw.update(rows, corrections, torch.tensor(2.5), torch.tensor(0.0), SETTINGS)
    for parameter, row in zip(exact, rows, strict=True):
        state = optimizer.state[parameter]
        for own, other in ((row.weight, parameter), (row.mean, state["exp_avg"]), (row.square, state["exp_avg_sq"])):
            torch.testing.assert_close(own.double(), other.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(row.copy, row.weight.bfloat16())


def test_a_step_to_be_skipped_changes_nothing() -> None:
    rows = adamw_rows("cpu", (1, 300))
    before = [tensor.clone() for row in rows for tensor in row]
    for row in rows:
        row.grad.fill_(torch.nan)
    corrections = adamw.bias_corrections(torch.full((2,), 7.0), SETTINGS.betas)
    adamw.update(rows, corrections, torch.tensor(1.0), torch.tensor(1.0), SETTINGS)
    kept = [tensor for row in rows for tensor in row]
    assert all(torch.equal(old, new) for old, new in zip(before, kept, strict=True) if not new.isnan().any())
    assert sum(bool(tensor.isnan().any()) for tensor in kept) == len(rows)  # the gradients alone
