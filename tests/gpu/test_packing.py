"""Packed rows on one CUDA device: the variable-length kernel, its fallback, and training through both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft.megatron.layers.core_attention import CoreAttention
from sft.megatron.layers.packed_rows import packed_sequences
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.tiny_model import FLASH4_HEAD_DIM, make_chat_rows, make_tiny_model, write_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

LENGTHS = (37, 1, 200, 64, 18)
ROW = sum(LENGTHS)
HALF = [torch.bfloat16, torch.float16]


def attention(dropout: float = 0.0, **own: Any) -> CoreAttention:
    # With sequence parallel, dropout draws from the generator that is set: no stream of Megatron-core is needed.
    config: Any = SimpleNamespace(attention_dropout=dropout, sequence_parallel=True)
    return CoreAttention(config, 1, None, "self", **own)


def inputs(dtype: torch.dtype, heads: int = 8, groups: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    shapes = [(ROW, count, 64) for count in (heads, groups, groups)]
    return [torch.randn(shape, device="cuda", generator=draw).to(dtype).requires_grad_() for shape in shapes]


def packed() -> Any:
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    return packed_sequences(torch.tensor([0, *ends], dtype=torch.int32, device="cuda"), LENGTHS)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_sinks_agree_with_fp32(rows: int, window: int | None) -> None:
    """Packed (0) and padded rows, with windows and without, all by the kernel for many sequences."""
    found = [tensor.detach().requires_grad_() for tensor in inputs(torch.bfloat16)]
    if rows:
        found = [tensor.detach().unsqueeze(1).repeat(1, rows, 1, 1).requires_grad_() for tensor in found]
    exact = [tensor.detach().float().requires_grad_() for tensor in found]
    layers = [attention(window=window) for _ in range(2)]
    for layer, dtype in zip(layers, (torch.bfloat16, torch.float32), strict=True):
        layer.sinks = torch.nn.Parameter(torch.linspace(-1, 4, 8, device="cuda", dtype=dtype))
    where = None if rows else packed()
    outputs = [
        layer(*tensors, None, packed_seq_params=where) for layer, tensors in zip(layers, (found, exact), strict=True)
    ]
    for output in outputs:
        output.float().square().sum().backward()
    torch.testing.assert_close(outputs[0].float(), outputs[1], atol=2e-2, rtol=2e-2)
    pairs = zip([*found, layers[0].sinks], [*exact, layers[1].sinks], strict=True)
    for half, wide in pairs:
        assert half.grad is not None and wide.grad is not None
        assert (half.grad.float() - wide.grad).norm() / wide.grad.norm() < 1e-2


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("own", [{}, {"window": 50}, {"softcap": 1.5}, {"window": 50, "softcap": 1.5}], ids=str)
def test_kernel_agrees_with_sequences_one_by_one(own: dict[str, Any], dtype: torch.dtype, groups: int) -> None:
    """Output and gradients, against fp32, with KV heads that are shared and with one for each query head."""
    found, exact = inputs(dtype, groups=groups), inputs(torch.float32, groups=groups)
    with torch.no_grad():
        for wide, half in zip(exact, found, strict=True):
            wide.copy_(half)
    outputs = [attention(**own)(*tensors, None, packed_seq_params=packed()) for tensors in (found, exact)]
    for output in outputs:
        output.float().square().sum().backward()
    torch.testing.assert_close(outputs[0].float(), outputs[1], atol=2e-2, rtol=2e-2)
    for half, wide in zip(found, exact, strict=True):
        assert half.grad is not None and wide.grad is not None
        error = (half.grad.float() - wide.grad).norm() / wide.grad.norm()
        assert error < 1e-2


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("rows", [1, 3])
def test_padded_rows_agree_with_fp32(rows: int, window: int | None) -> None:
    """Rows longer than the window go through the kernel for many sequences."""
    found = [tensor.detach().unsqueeze(1).repeat(1, rows, 1, 1) for tensor in inputs(torch.bfloat16)]
    found = [(tensor * torch.arange(1, rows + 1, device="cuda")[:, None, None]).requires_grad_() for tensor in found]
    exact = [tensor.detach().float().requires_grad_() for tensor in found]
    outputs = [attention(window=window)(*tensors, None) for tensors in (found, exact)]
    for output in outputs:
        output.float().square().sum().backward()
    torch.testing.assert_close(outputs[0].float(), outputs[1], atol=5e-2, rtol=2e-2)
    for half, wide in zip(found, exact, strict=True):
        assert half.grad is not None and wide.grad is not None
        assert (half.grad.float() - wide.grad).norm() / wide.grad.norm() < 1e-2


@pytest.mark.parametrize("window", [None, 50])
def test_trap_4_no_gradient_reaches_a_neighbour_in_the_kernel(window: int | None) -> None:
    """Exactly 0, as on a CPU (tests/parity/test_packing.py)."""
    tensors = inputs(torch.bfloat16)
    output = attention(window=window)(*tensors, None, packed_seq_params=packed())
    first, second = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    output[first:second].float().sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad[first:second].any()
        assert not tensor.grad[:first].any()
        assert not tensor.grad[second:].any()


def test_dropout_takes_sequences_one_by_one() -> None:
    """The kernel has none."""
    tensors = inputs(torch.bfloat16)
    layer = attention(dropout=0.5).train()
    first, second = (layer(*tensors, None, packed_seq_params=packed()) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(*(layer.eval()(*tensors, None, packed_seq_params=packed()) for _ in range(2)))


@pytest.mark.parametrize("window", [None, 50])
def test_attention_waits_for_nothing(window: int | None) -> None:
    """No number goes from the device to the host: the step would stop at each layer."""
    tensors, where = inputs(torch.bfloat16), packed()
    attention(window=window)(*tensors, None, packed_seq_params=where)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(window=window)(*tensors, None, packed_seq_params=where).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_packed_training_follows_reference(precision: str, tolerance: float, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", head_dim=FLASH4_HEAD_DIM)
    chat = write_jsonl(tmp_path / "chat.jsonl", make_chat_rows(100, seed=3))
    expected = reference_curve(tmp_path / "reference", model, chat, steps=15, lr=1e-3)
    paths = make_run(
        tmp_path, model, chat, ranks=1, gpus_per_node=1, max_steps=15, lr=1e-3, precision=precision, packing=True
    )
    run_training(paths, 1)
    assert curve(paths)[0] == pytest.approx(expected.losses, rel=tolerance)
