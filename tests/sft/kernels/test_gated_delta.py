"""The gated delta rule in chunks is the rule token by token, and documents do not meet."""

from __future__ import annotations

import dataclasses
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.contract.errors import ModelError
from launcher.contract.spec import RunSpec
from sft.hf.checks import check_model_settings
from sft.kernels import gated_delta
from sft.kernels.gated_delta import CHUNK, documents_of, gated_convolution, gated_delta_rule
from sft.megatron.kernel_choice import choose_kernels
from sft.models.architecture import Architecture
from sft.models.registry import read_architecture
from tests.sft.hf_cases import run_spec, save_config

KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 4, 6, 5
LENGTHS = [(1,), (5,), (CHUNK,), (3 * CHUNK + 7,), (70, 200, 5, CHUNK, 130), (2, 2, 2)]
CPU = torch.device("cpu")


def drawn(tokens: int, seed: int = 0) -> list[Tensor]:
    """Query, key, value, decay and beta, in fp64. Decays are slow: what is not reset would be there long after."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(tokens, KEY_HEADS, KEY_DIM), (tokens, KEY_HEADS, KEY_DIM), (tokens, HEADS, VALUE_DIM)]
    heads = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    decay, beta = (torch.rand(tokens, HEADS, generator=draw, dtype=torch.float64) for _ in range(2))
    return [part.requires_grad_() for part in (*heads, -0.05 * decay, beta)]


def by_token(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, for one document: outputs and last state."""
    query, key = (
        (heads / (heads.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(HEADS // KEY_HEADS, dim=1)
        for heads in (query, key)
    )
    state, outputs = torch.zeros(HEADS, KEY_DIM, VALUE_DIM, dtype=torch.float64), []
    for token in range(len(value)):
        state = state * decay[token].exp()[:, None, None]
        known = torch.einsum("hkv,hk->hv", state, key[token])
        change = beta[token][:, None] * (value[token] - known)
        state = state + torch.einsum("hk,hv->hkv", key[token], change)
        outputs.append(torch.einsum("hkv,hk->hv", state, query[token]) * KEY_DIM**-0.5)
    return torch.stack(outputs), state


def pieces(parts: list[Tensor], lengths: tuple[int, ...]) -> list[list[Tensor]]:
    return [list(own) for own in zip(*(part.split(lengths) for part in parts), strict=True)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunks_compute_the_rule(lengths: tuple[int, ...]) -> None:
    """Outputs, states and all gradients, document by document, in fp64."""
    parts = drawn(sum(lengths))
    output, states = gated_delta_rule(*parts, documents_of(lengths, CPU))
    expected, last = zip(*(by_token(*own) for own in pieces(parts, lengths)), strict=True)
    torch.testing.assert_close(output, torch.cat(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(states, torch.stack(last), rtol=0, atol=1e-12)

    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((output * weight).sum() + states.sum(), parts)
    exact = torch.autograd.grad((torch.cat(expected) * weight).sum() + torch.stack(last).sum(), parts)
    for own, reference in zip(found, exact, strict=True):
        torch.testing.assert_close(own, reference, rtol=0, atol=1e-10)


def test_a_state_is_gone_on_with() -> None:
    """In two calls, as answers are made, with documents that are not in the order of their lengths."""
    lengths, first = (9, 80, 30), (4, 70, 30)
    parts = [part.detach() for part in drawn(sum(lengths))]
    whole, last = gated_delta_rule(*parts, documents_of(lengths, CPU))
    own = pieces(parts, lengths)
    begin = [torch.cat([own[i][k][: first[i]] for i in range(3)]) for k in range(5)]
    _, state = gated_delta_rule(*begin, documents_of(first, CPU))
    rest = [torch.cat([own[i][k][first[i] :] for i in range(2)]) for k in range(5)]
    output, ends = gated_delta_rule(*rest, documents_of((5, 10), CPU), state[:2])
    expected = torch.cat([part[first[i] :] for i, part in enumerate(whole.split(lengths)[:2])])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ends, last[:2], rtol=0, atol=1e-12)


def test_documents_do_not_meet() -> None:
    """Another one in the middle changes no bit of the others, and no gradient reaches it."""
    lengths = (40, 90, 70)
    first, last = lengths[0], sum(lengths[:2])
    parts, others = drawn(sum(lengths)), drawn(sum(lengths), seed=5)
    changed = [torch.cat([a[:first], b[first:last], a[last:]]) for a, b in zip(parts, others, strict=True)]
    documents = documents_of(lengths, CPU)
    output, other = (gated_delta_rule(*own, documents)[0] for own in (parts, changed))
    assert torch.equal(output[:first], other[:first]) and torch.equal(output[last:], other[last:])
    assert not torch.equal(output[first:last], other[first:last])
    for gradient in torch.autograd.grad(output[last:].square().sum(), parts):
        assert not gradient[:last].any()
        assert gradient[last:].any()


@pytest.mark.parametrize("lengths", [(1,), (3, 2, 1, 9), (30,)], ids=str)
def test_the_convolution_sees_its_document_alone(lengths: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(sum(lengths), 7, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    output = gated_convolution(x, weight, documents_of(lengths, CPU))
    rows = [F.conv1d(F.pad(row.T[None], (3, 0)), weight[:, None], groups=7)[0].T for row in x.split(lengths)]
    expected = F.silu(torch.cat(rows))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(own.square().sum(), (x, weight)) for own in (output, expected)), strict=True)
    for own, reference in pairs:
        torch.testing.assert_close(own, reference, rtol=0, atol=1e-12)


def test_half_precision_is_computed_in_fp32() -> None:
    parts = [part.detach().float() for part in drawn(150)]
    documents = documents_of((100, 50), CPU)
    exact, _ = gated_delta_rule(*parts, documents)
    rounded = [part.bfloat16() for part in parts[:3]]
    output, state = gated_delta_rule(*rounded, *parts[3:], documents)
    wide, _ = gated_delta_rule(*(part.float() for part in rounded), *parts[3:], documents)
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(output, wide.bfloat16())
    assert (exact - wide).abs().max() > 0


def settings(tmp_path: Path, case: str, **train: object) -> tuple[RunSpec, Architecture]:
    spec = run_spec(save_config(case, tmp_path), 1)
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, **train))  # type: ignore[arg-type]
    return spec, read_architecture(tmp_path)


def choice(tmp_path: Path, case: str, *, on_gpu: bool, **train: object) -> str:
    return choose_kernels(*settings(tmp_path, case, **train), on_gpu=on_gpu).describe()


def test_the_log_says_what_computes_linear_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And why it is not the package's kernels. Asked for by name, they are refused for the same reason."""
    case = "qwen3_5_text"
    assert "linear attention" not in choice(tmp_path, "llama", on_gpu=False)
    assert "linear attention torch's (fla needs a GPU)" in choice(tmp_path, case, on_gpu=False)
    assert "torch's (fla does not compute in fp32)" in choice(tmp_path, case, on_gpu=True, precision="fp32")
    half = {"on_gpu": True, "precision": "bf16"}
    assert "torch's (train.deterministic)" in choice(tmp_path, case, **half, deterministic=True)  # type: ignore[arg-type]
    monkeypatch.setattr(gated_delta, "fla_problem", lambda: "it is not installed")
    assert "torch's (it is not installed)" in choice(tmp_path, case, **half)  # type: ignore[arg-type]
    assert "linear attention torch's, " in choice(tmp_path, case, **half, linear_attention="torch")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="linear_attention fla cannot be used: it is not installed; set it to auto"):
        choice(tmp_path, case, **half, linear_attention="fla")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"linear_attention torch: a llama model has no linear attention"):
        check_model_settings(*settings(tmp_path, "llama", linear_attention="torch"))
    monkeypatch.setattr(gated_delta, "fla_problem", lambda: None)
    assert "linear attention fla, " in choice(tmp_path, case, **half)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "triton", "tilelang", "refused"),
    [
        ((9, 0), "3.6.0", False, True),
        ((9, 0), "3.6.0", True, False),
        ((9, 0), "3.7.1", False, False),
        ((9, 0), "3.3.1", False, False),
        ((10, 0), "3.6.0", False, False),
    ],
)
def test_kernels_that_triton_compiles_wrongly_are_not_used(
    capability: tuple[int, int], triton: str, tilelang: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package raises an error about it, but only in the backward pass of the first step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(gated_delta.importlib.metadata, "version", lambda name: triton)
    found = {"fla": True, "tilelang": tilelang}
    monkeypatch.setattr(gated_delta.importlib.util, "find_spec", lambda name: found[name] or None)
    monkeypatch.setattr(gated_delta, "_broken_fla", lambda: None)
    problem = gated_delta.fla_problem()
    assert (problem is not None and "install 3.7.1 or newer, or tilelang" in problem) == refused


def test_where_documents_lie() -> None:
    lengths = (3, 130, 64)
    documents = documents_of(lengths, CPU)
    assert documents.places.tolist() == [place for length in lengths for place in range(length)]
    assert [offsets.tolist() for offsets in documents.offsets] == [[0, *accumulate(lengths)]] * 2
    assert documents.steps == (3, 1, 1)
    assert documents.order.tolist() == [2, 0, 1]
