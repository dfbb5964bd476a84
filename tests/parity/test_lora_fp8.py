"""LoRA over fp8: the frozen product is in fp8, adapters are in bf16, whatever the kernels and the topology."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.contract.spec import LoraSpec
from sft.engine.module import SFTGPT
from sft.megatron.layers.lora import Adapters
from sft.training.trainer import train
from tests.parity.runs import curve, run_training
from tests.parity.test_lora import adapted, expected_curve, lora_run
from tests.ranks import run_ranks
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity

LORA = LoraSpec(rank=4, alpha=6.0)
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return the values that E4M3 keeps of each row, in fp32, with the row's largest at 448."""
    scale = x.float().abs().amax(dim=1, keepdim=True) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale


class FrozenProduct(torch.autograd.Function):
    """The definition: both factors of each product rounded by rows, forward and for the gradient of the input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return rounded(x) @ rounded(weight).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return rounded(grad) @ rounded(weight.t().contiguous()).t(), None


def errors_of_linears(config: Path) -> dict[str, float]:
    """Runs on a rank: how far output and gradients of each linear of a layer are from the definition."""
    found: dict[str, float] = {}
    wrap = SFTGPT.wrap_chunks

    def spy(self: SFTGPT) -> None:
        for name in LINEARS:
            found.update(_errors(name, self.gpt[0].decoder.layers[1].get_submodule(name)))
        wrap(self)

    SFTGPT.wrap_chunks = spy  # type: ignore[method-assign]
    train(config)
    return found


def _errors(name: str, linear: Any) -> dict[str, float]:
    torch.manual_seed(5)
    adapters: Adapters = linear.lora
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(std=0.2)
    weight = linear.weight.detach()
    x = torch.randn(24, 1, weight.shape[1]).bfloat16().requires_grad_()
    grad = torch.randn(24, 1, weight.shape[0]).bfloat16()
    output, _ = linear(x)
    output.backward(grad)
    own = {"output": output, "x": x.grad, **{part: value.grad for part, value in adapters.named_parameters()}}
    assert weight.grad is None

    again = x.detach()[:, 0].requires_grad_()
    copies = {part: value.detach().float().requires_grad_() for part, value in adapters.named_parameters()}
    # The order of B's rows in the linear has tests of its own.
    up = torch.func.functional_call(_UpWeight(adapters), {f"of.{part}": v for part, v in copies.items()}, ())
    wide = again.float()
    down = adapters.scale * torch.cat([wide @ copies[f"{target}.lora_A"].t() for target in adapters], -1)
    expected = FrozenProduct.apply(wide, weight) + down @ up.t()
    expected.backward(grad[:, 0].float())
    theirs = {"output": expected, "x": again.grad, **{part: value.grad for part, value in copies.items()}}
    return {
        f"{name} {part}": float((own[part].reshape(value.shape).float() - value).norm() / value.norm())
        for part, value in theirs.items()
        if value is not None
    }


class _UpWeight(torch.nn.Module):
    def __init__(self, of: Adapters) -> None:
        super().__init__()
        self.of = of

    def forward(self) -> torch.Tensor:
        return self.of.up_weight()


def test_each_linear_is_the_definition(tmp_path: Path, model: Path, chat: Path) -> None:
    paths = lora_run(tmp_path, model, chat, LORA, ranks=1, max_steps=1, precision="fp8", kernels="plain")
    (found,) = run_ranks(1, errors_of_linears, paths.config)
    assert len(found) == 4 * 2 + 7 * 2  # output and input gradient of each linear, A and B of each target
    assert max(found.values()) < 1e-2, found


@pytest.mark.parametrize(
    ("kernels", "ranks", "topology"),
    [
        ("plain", 1, {}),
        ("fused", 1, {}),
        pytest.param("fused", 2, {"tensor_parallel": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
    ],
    ids=["plain", "fused", "fused_tp2_sp"],
)
def test_training_stays_near_fp32(
    kernels: str, ranks: int, topology: dict[str, Any], tmp_path: Path, model: Path, chat: Path
) -> None:
    expected = expected_curve(tmp_path / "fp32", model, chat, lambda spec: adapted(model, LORA, spec.train.seed))
    settings = {"precision": "fp8", "kernels": kernels, "packing": True}
    paths = lora_run(
        tmp_path, model, chat, LORA, ranks=ranks, topology=topology, max_steps=len(expected.losses), **settings
    )
    run_training(paths, ranks)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=2e-2)
    assert norms[0] == pytest.approx(expected.grad_norms[0], rel=2e-2)  # later ones are of other adapters
    assert losses != pytest.approx(expected.losses, rel=1e-5)  # fp8 was there
