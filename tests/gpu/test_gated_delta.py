"""Linear attention on one CUDA device: flash-linear-attention's kernels, and torch's own operations, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sft.kernels.gated_delta import Kernel, documents_of, fla_problem, gated_convolution, gated_delta_rule
from tests.gpu.test_kernels import assert_equal, drawn, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

LENGTHS = [(700, 130, 64, 37, 1), (64,), (2048, 5)]
KERNELS: list[Kernel] = ["torch", "fla"]


def need(kernel: Kernel) -> None:
    because = fla_problem() if kernel == "fla" else None
    if because is not None:
        pytest.skip(because)


def inputs(tokens: int, heads: tuple[int, int], dims: tuple[int, int]) -> list[Tensor]:
    """In bf16, with slow decays, under which what is not reset between documents is there long after."""
    shapes = [(tokens, heads[0], dims[0]), (tokens, heads[0], dims[0]), (tokens, heads[1], dims[1])]
    parts = [drawn(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    decay, beta = (drawn(tokens, heads[1], seed=seed).sigmoid() for seed in (3, 4))
    return [*parts, -0.05 * decay, beta]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "dims"), [((16, 32), (128, 128)), ((4, 4), (64, 128))])
def test_rule(heads: tuple[int, int], dims: tuple[int, int], lengths: tuple[int, ...], kernel: Kernel) -> None:
    """Outputs and the gradients of all inputs."""
    need(kernel)
    documents = documents_of(lengths, torch.device("cuda"))

    def rule(*parts: Tensor) -> Tensor:
        return gated_delta_rule(*parts, documents, kernel=kernel)[0]

    def exact(*parts: Tensor) -> Tensor:
        return gated_delta_rule(*parts, documents)[0]

    assert_equal(rule, exact, inputs(sum(lengths), heads, dims), tolerance=2e-2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_convolution(lengths: tuple[int, ...], kernel: Kernel) -> None:
    need(kernel)
    documents = documents_of(lengths, torch.device("cuda"))
    assert_equal(
        lambda x, weight: gated_convolution(x, weight, documents, kernel=kernel),
        lambda x, weight: gated_convolution(x, weight, documents),
        [drawn(sum(lengths), 768), drawn(768, 4, seed=1)],
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_documents_do_not_meet(kernel: Kernel) -> None:
    """Another one in the middle changes no bit of the others, nor of their gradients."""
    need(kernel)
    lengths = (300, 200, 500)
    first, last = lengths[0], sum(lengths[:2])
    documents = documents_of(lengths, torch.device("cuda"))
    parts = inputs(sum(lengths), (4, 8), (64, 64))
    changed = [part.clone() for part in parts]
    for part in changed:
        part[first:last] = part[first:last].flip(0)

    def rule(*rows: Tensor) -> Tensor:
        return gated_delta_rule(*rows, documents, kernel=kernel)[0]

    found, other = (results(rule, [part.clone().requires_grad_() for part in own]) for own in (parts, changed))
    for a, b in zip(found, other, strict=True):
        assert torch.equal(a[:first], b[:first]) and torch.equal(a[last:], b[last:])
    assert not torch.equal(found[0][first:last], other[0][first:last])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_state_is_gone_on_with(kernel: Kernel) -> None:
    """As answers are made: token by token behind a prompt."""
    need(kernel)
    parts = inputs(70, (4, 8), (64, 64))
    device = torch.device("cuda")
    whole, last = gated_delta_rule(*parts, documents_of((70,), device), kernel=kernel)
    _, state = gated_delta_rule(*(part[:65] for part in parts), documents_of((65,), device), kernel=kernel)
    outputs = []
    for token in range(65, 70):
        own = [part[token : token + 1] for part in parts]
        output, state = gated_delta_rule(*own, documents_of((1,), device), state, kernel=kernel)
        outputs.append(output)
    found, expected = torch.cat(outputs).double(), whole[65:].double()
    assert (found - expected).norm() / expected.norm() < 2e-2
    assert (state - last).norm() / last.norm() < 2e-2
