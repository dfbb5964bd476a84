"""Each kernel on one CUDA device: output and gradients in bf16 against fp64 by torch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels import adamw, attention, fp8, norm
from sft.kernels.embedding import lookup
from sft.kernels.gated import Gate, gated
from sft.kernels.linear import GradientForm, fp8_linear, gated_mlp
from sft.kernels.linear_cross_entropy import VocabPart, linear_cross_entropy
from sft.kernels.loss_form import LossForm
from sft.kernels.masked_attention import attention_in_blocks, causal_mask
from sft.kernels.products import add_product
from sft.kernels.rope import rotate_heads, split_and_rotate
from sft.megatron.core import TransformerConfig
from sft.megatron.layers.core_attention import CoreAttention
from tests.sft.kernels.test_adamw import adamw_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

TOLERANCE = 5e-3
"""Of the relative error in norm: one rounding to bf16 is about 1.7e-3."""
Operation = Callable[..., "Tensor | tuple[Tensor, ...]"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(shape, device="cuda", generator=draw).bfloat16()


def assert_equal(kernel: Operation, plain: Operation, inputs: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
    """Outputs and the gradients of all inputs, from drawn gradients of the outputs."""
    found = results(kernel, [tensor.clone().requires_grad_() for tensor in inputs])
    exact = results(plain, [tensor.double().requires_grad_() for tensor in inputs])
    for own, reference in zip(found, exact, strict=True):
        error = (own.double() - reference).norm() / reference.norm()
        assert error < tolerance, [float(error), tuple(own.shape)]  # NaN fails too


def results(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    outputs = operation(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    grads = [drawn(*output.shape, seed=9).to(output.dtype) for output in outputs]
    torch.autograd.backward(outputs, grads)
    return [*(output.detach() for output in outputs), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


@pytest.mark.parametrize("width", [96, 2048, 3072])
@pytest.mark.parametrize("rows", [1, 37, 3000])
@pytest.mark.parametrize("centered", [False, True])
def test_norm(centered: bool, rows: int, width: int) -> None:
    x, branch, weight = drawn(rows, 1, width), drawn(rows, 1, width, seed=1), drawn(width)
    one = 1 if centered else 0

    def plain(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(x + branch, (width,), weight + one, 1e-5), x + branch

    def kernel(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return norm.add_and_fork(branch, x, weight, 1e-5, centered=centered)

    assert_equal(kernel, plain, [x, branch, weight])

    def alone(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(x, (width,), weight + one, 1e-5), x * 1

    assert_equal(lambda x, weight: norm.fork(x, weight, 1e-5, centered=centered), alone, [x, weight])
    # A norm that is no fork: there is no gradient past it.
    assert_equal(
        lambda x, weight: norm.rms_norm(x, weight, 1e-5, centered=centered), lambda *both: alone(*both)[0], [x, weight]
    )


def activated(values: Tensor, gate: Gate) -> Tensor:
    return F.silu(values) if gate == "silu" else F.gelu(values, approximate="tanh")


@pytest.mark.parametrize("width", [40, 1024, 8200])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gated(gate: Gate, width: int) -> None:
    def plain(x: Tensor) -> Tensor:
        values, up = x.chunk(2, dim=-1)
        return activated(values, gate) * up

    assert_equal(lambda x: gated(x * 1, gate), plain, [drawn(33, 2, 2 * width)])


@pytest.mark.parametrize(
    ("heads", "dim", "turned"), [((8, 4), 64, 64), ((8, 3), 128, 128), ((3, 1), 96, 96), ((2, 2), 64, 32)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_rope(heads: tuple[int, int], dim: int, turned: int, packed: bool) -> None:
    groups, queries = heads
    s, b = (70, 1) if packed else (35, 2)
    angles = torch.rand(70, turned // 2, device="cuda") * 70
    positions = torch.cat([torch.arange(50), torch.arange(20)]).cuda() if packed else None

    def plain(mixed: Tensor) -> tuple[Tensor, ...]:
        where = None if positions is None else positions.cpu()
        on_host = split_and_rotate(mixed.cpu(), groups, queries, angles.double().cpu(), where, 1.5)
        return tuple(tensor.cuda() for tensor in on_host)

    def kernel(mixed: Tensor) -> tuple[Tensor, ...]:
        return split_and_rotate(mixed, groups, queries, angles, positions, 1.5)

    assert_equal(kernel, plain, [drawn(s, b, groups * (queries + 2) * dim)])


@pytest.mark.parametrize(("heads", "dim", "turned"), [(32, 128, 128), (4, 256, 64), (3, 96, 96), (1, 20, 10)])
@pytest.mark.parametrize("packed", [False, True])
def test_rotated_heads(heads: int, dim: int, turned: int, packed: bool) -> None:
    s, b = (70, 1) if packed else (35, 2)
    angles = torch.rand(70, turned // 2, device="cuda") * 70
    positions = torch.cat([torch.arange(50), torch.arange(20)]).cuda() if packed else None

    def plain(x: Tensor) -> Tensor:
        on_host, where = angles.double().cpu(), None if positions is None else positions.cpu()
        return rotate_heads(x.cpu(), on_host.cos(), on_host.sin(), where).cuda()

    assert_equal(lambda x: rotate_heads(x, angles.cos(), angles.sin(), positions), plain, [drawn(s, b, heads, dim)])


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_a_norm_computed_again_has_the_same_bits(centered: bool, forked: bool) -> None:
    x, branch, weight = (drawn(*shape).requires_grad_() for shape in ((300, 1, 2048), (300, 1, 2048), (2048,)))
    if forked:
        normed, past = norm.add_and_fork(branch, x, weight, 1e-5, centered=centered)
    else:
        normed, past = norm.fork(x, weight, 1e-5, centered=centered)
    kept = normed.detach().clone()
    result = normed * 2
    norm.forget(normed, past, weight, 1e-5, result, centered=centered)
    assert normed.untyped_storage().nbytes() == 0
    result.sum().backward()
    assert torch.equal(normed, kept)


def test_a_norm_brings_its_rows_in_fp8() -> None:
    """What quantizing it would give."""
    normed, _ = norm.add_and_fork(drawn(300, 1, 2048), drawn(300, 1, 2048), drawn(2048), 1e-5, in_fp8=True)
    assert isinstance(normed, fp8.WithRows)
    found, expected = normed.rows, fp8.quantize(normed.values.view(300, 2048))
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales)


def test_peaks_of_a_weight_are_found_once_a_step() -> None:
    weight = drawn(96, 64).requires_grad_()
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    first = fp8.quantize_transposed(weight)
    weight.data.mul_(2)
    assert torch.equal(fp8.quantize_transposed(weight).scales, 2 * first.scales)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    weight.data.mul_(0.5)  # would be wrong in a step, and shows what is kept
    assert torch.equal(fp8.quantize_transposed(weight).scales, 2 * first.scales)


@pytest.mark.parametrize("width", [96, 3072])
@pytest.mark.parametrize("partial", [False, True])
def test_lookup(partial: bool, width: int) -> None:
    """Gradients in a buffer of fp32, of places that come once, never, and in more than half of the row."""
    ids = torch.randint(0, 50, (2, 400), device="cuda")
    ids[:, 150:] = 7
    weight = drawn(40 if partial else 50, width).requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(weight.shape, device="cuda"), False  # type: ignore[attr-defined]
    grad = drawn(2, 400, width)
    found = lookup(weight, ids, partial=partial)
    here = (ids < len(weight)).unsqueeze(-1)
    torch.testing.assert_close(found, F.embedding(ids.where(ids < len(weight), 0), weight) * here)
    found.backward(grad)
    exact = torch.ones(50, width, dtype=torch.float64, device="cuda")
    exact.index_add_(0, ids.flatten(), grad.flatten(0, 1).double())
    torch.testing.assert_close(weight.main_grad.double(), exact[: len(weight)], rtol=1e-5, atol=1e-4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_adamw(shift: int) -> None:
    """Against torch's own operations on the same rows, which tests/sft/kernels holds to torch's AdamW."""
    from sft.kernels.triton import adamw as triton_adamw

    sizes = (16, 2048, 100_000) if not shift else (1, 2047, 100_000)
    rows, expected = (adamw_rows("cuda", sizes, shift) for _ in range(2))
    corrections = torch.tensor([[1 - 0.9**7, 1 - 0.95**7]] * len(rows), device="cuda")
    scale, skip = torch.full((), 2.5, device="cuda"), torch.zeros((), device="cuda")
    settings = adamw.Settings(1e-2, 0.1, (0.9, 0.95), 1e-8)
    table = triton_adamw.Table(rows)
    assert table.aligned is not bool(shift)
    triton_adamw.update(table, corrections, scale, skip, settings)
    adamw.update(expected, corrections, scale, skip, settings)
    for found, reference in zip(rows, expected, strict=True):
        for own, other in zip(found[:4], reference[:4], strict=True):
            torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.copy, found.weight.bfloat16())
    before = [tensor.clone() for row in rows for tensor in row]
    triton_adamw.update(table, corrections, scale, skip + 1, settings)
    assert all(map(torch.equal, before, (tensor for row in rows for tensor in row)))


@pytest.mark.parametrize("vocab", [1000, 32003])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_linear_cross_entropy(
    smoothing: float, softcap: float | None, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.kernels.linear_cross_entropy.BLOCK_BYTES", 2 * vocab * 100)
    labels = torch.randint(0, vocab - 3, (257,), device="cuda")
    weights = torch.rand(257, device="cuda")

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.t())[:, :-3]  # the last three rows only fill up
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return (F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing) * weights).sum()

    def kernel(hidden: Tensor, weight: Tensor) -> Tensor:
        form = LossForm(softcap, smoothing, vocab - 3)
        return linear_cross_entropy(hidden, weight, labels, weights, VocabPart(0, vocab - 3), form)

    assert_equal(kernel, plain, [drawn(257, 128), drawn(vocab, 128) * 0.2])


@pytest.mark.filterwarnings("default::DeprecationWarning")  # from within flash-attn-4's compiler
@pytest.mark.parametrize("kernel_name", ["flash2", "flash4"])
@pytest.mark.parametrize("window", [None, 2, 100, 5000])
@pytest.mark.parametrize(
    ("heads", "dim"), [((8, 2), 64), ((24, 8), 128), ((6, 2), 96), ((4, 4), 32), ((4, 4), 80), ((4, 1), 256)]
)
def test_packed_attention(heads: tuple[int, int], dim: int, window: int | None, kernel_name: attention.Kernel) -> None:
    if kernel_name == "flash4" and not attention.has_flash4():
        pytest.skip("flash-attn-4 is not installed")
    if kernel_name == "flash4" and not attention.flash4_takes(dim):
        pytest.skip(f"flash4 is never given heads of {dim}: sft/kernels/attention.py")
    lengths = [700, 130, 64, 37, 1]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value)]
        masks = [causal_mask(length, length, window, query.device) for length in lengths]
        attended = [
            F.scaled_dot_product_attention(*part, attn_mask=mask, enable_gqa=True)
            for mask, *part in zip(masks, *parts, strict=True)
        ]
        return torch.cat(attended, dim=2)[0].transpose(0, 1)

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.flash(query, key, value, offsets, max(lengths), None, kernel_name, window=window)

    shapes = [(sum(lengths), count, dim) for count in (heads[0], heads[1], heads[1])]
    assert_equal(kernel, plain, [drawn(*shape, seed=seed) for seed, shape in enumerate(shapes)])


@pytest.mark.filterwarnings("default::DeprecationWarning")  # from within flash-attn-4's compiler
@pytest.mark.parametrize("kernel_name", ["flash2", "flash4"])
@pytest.mark.parametrize("window", [None, 1, 50, 128])
@pytest.mark.parametrize(("heads", "dim"), [((64, 8), 64), ((6, 6), 128)])
def test_packed_attention_with_sinks(
    heads: tuple[int, int], dim: int, window: int | None, kernel_name: attention.Kernel
) -> None:
    """Those of gpt-oss, of which some take most of a row's sum. Gradients are those of the sinks, too."""
    if kernel_name == "flash4" and not attention.flash4_has_gradients_of("learnable_sink"):
        pytest.skip("flash-attn-4 is not installed, or a version without them")
    lengths = [700, 130, 64, 37, 1]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")

    def plain(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        parts = [tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)]
        attended = [attention_in_blocks(*part, sinks=sinks, window=window) for part in zip(*parts, strict=True)]
        return torch.cat(attended, dim=1).transpose(0, 1)

    def kernel(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return attention.flash(query, key, value, offsets, max(lengths), None, kernel_name, window=window, sinks=sinks)

    shapes = [(sum(lengths), count, dim) for count in (heads[0], heads[1], heads[1])]
    inputs = [drawn(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    # The backward pass takes the output rounded to bf16. Where a token sees itself alone, what is left of the gradients
    # after the softmax's correction is small beside what they are the difference of: 0.9 % by arithmetic. Sinks of few
    # heads are sums of random signs, off by up to 0.6 %.
    assert_equal(kernel, plain, [*inputs, 3 * drawn(heads[0])], tolerance=1.5e-2 if window == 1 else 1e-2)


@pytest.mark.filterwarnings("default::DeprecationWarning")  # from within flash-attn-4's compiler
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "dim"), [((32, 16), 128), ((8, 2), 64)])
@pytest.mark.parametrize("softcap", [50.0, 1.0])
def test_packed_attention_with_capped_scores(
    softcap: float, heads: tuple[int, int], dim: int, window: int | None
) -> None:
    """Those of Gemma 2 27B, and a cap that most scores are near."""
    if not attention.flash4_has_gradients_of("softcap"):
        pytest.skip("flash-attn-4 is not installed, or a version without them")
    lengths = [700, 130, 64, 37, 1]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)]
        attended = [
            attention_in_blocks(*part, cap=softcap, window=window, scale=0.2) for part in zip(*parts, strict=True)
        ]
        return torch.cat(attended, dim=1).transpose(0, 1)

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.flash(query, key, value, offsets, max(lengths), 0.2, "flash4", window=window, softcap=softcap)

    shapes = [(sum(lengths), count, dim) for count in (heads[0], heads[1], heads[1])]
    assert_equal(kernel, plain, [drawn(*shape, seed=seed) for seed, shape in enumerate(shapes)], tolerance=1e-2)


def test_products_are_added_in_fp32() -> None:
    a, b = drawn(300, 64), drawn(300, 96)
    out = torch.randn(64, 96, device="cuda")
    exact = out.double() + a.t().double() @ b.double()
    add_product(out, a.t(), b)
    assert (out.double() - exact).norm() / exact.norm() < 1e-5


def test_weight_gradients_go_to_a_buffer_of_half_precision_too() -> None:
    a, b = drawn(300, 64), drawn(300, 96)
    out = drawn(64, 96)
    exact = out.double() + a.t().double() @ b.double()
    add_product(out, a.t(), b)
    assert (out.double() - exact).norm() / exact.norm() < TOLERANCE


def plain_mlp(gate: Gate) -> Operation:
    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        values, linear = (x @ up.t()).chunk(2, dim=-1)
        return (activated(values, gate) * linear) @ down.t()

    return mlp


@pytest.mark.parametrize("width", [48, 1024, 8192])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_mlp_as_one_operation(gate: Gate, width: int) -> None:
    weights = [drawn(2 * width, 96) * 0.1, drawn(96, width) * 0.1]
    inputs = [drawn(33, 2, 96), *weights]
    assert_equal(lambda x, up, down: gated_mlp(x, up, down, gate), plain_mlp(gate), inputs, tolerance=1e-2)


@pytest.mark.parametrize("shape", [(1, 16), (37, 96), (300, 5000)])
def test_rows_in_fp8(shape: tuple[int, int]) -> None:
    """Each row and column to a sixteenth of its own values, however large others are; a row of zeros stays one."""
    x = drawn(*shape) * torch.logspace(-3, 3, shape[0], device="cuda")[:, None].bfloat16()
    x[shape[0] // 2] = 0
    for found, exact in ((fp8.quantize(x), x), (fp8.quantize_transposed(x), x.t())):
        own = found.values.float() * found.scales
        unit = found.scales * 2.0**-9  # the smallest number that is not 0
        assert ((own - exact.float()).abs() <= exact.float().abs() / 16 + unit).all()
    wide = fp8.quantize(x, "e5m2")
    assert wide.values.dtype == torch.float8_e5m2
    error = (wide.values.float() * wide.scales - x.float()).abs()
    assert (error <= x.float().abs() / 8 + wide.scales * 2.0**-16).all()


FP8_TOLERANCE = 6e-2
"""A product of two rounded factors is off by 3.75e-2 in norm; an MLP has two in a row."""


FORMS: tuple[GradientForm, ...] = ("e4m3", "e5m2", "bf16")


@pytest.mark.parametrize("form", FORMS)
def test_linear_in_fp8(form: GradientForm) -> None:
    weight = drawn(160, 96) * 0.1
    tolerance = 2 * FP8_TOLERANCE if form == "e5m2" else FP8_TOLERANCE  # which has one bit less
    assert_equal(
        lambda x, weight: fp8_linear(x, weight, form),
        lambda x, weight: x @ weight.t(),
        [drawn(33, 2, 96), weight],
        tolerance=tolerance,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [48, 8192])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_mlp_in_fp8(gate: Gate, width: int, form: GradientForm) -> None:
    inputs = [drawn(33, 2, 96), drawn(2 * width, 96) * 0.1, drawn(96, width) * 0.1]

    def in_fp8(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return gated_mlp(x, up, down, gate, fp8_gradients=(form, form))

    assert_equal(in_fp8, plain_mlp(gate), inputs, tolerance=2e-1 if form == "e5m2" else 1e-1)


@pytest.mark.parametrize("length", [64, 3000])
def test_large_heads_need_no_matrix_of_scores(length: int) -> None:
    """Of heads that FlashAttention does not take: scores alone would be 8 * 3000^2 numbers of 2 bytes, 137 MiB."""
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=8, attention_dropout=0.0)
    module = CoreAttention(config, 1, None, "self", scale=0.05)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        return (
            F.scaled_dot_product_attention(*parts, is_causal=True, scale=0.05, enable_gqa=True)
            .permute(2, 0, 1, 3)
            .flatten(2)
        )

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found: Tensor = module(query, key, value, None)
        if query.dtype == torch.bfloat16:
            assert torch.cuda.max_memory_allocated() - before < 5 * 8 * length * 512 * 2 + 2**20
        return found

    assert_equal(kernel, plain, [drawn(length, 1, heads, 512, seed=seed) for seed, heads in enumerate((8, 2, 2))])
