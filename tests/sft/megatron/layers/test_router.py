"""The router chooses as transformers' own do, by groups and biases too, and what it is not trained in stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV2Config, Ernie4_5_MoeConfig, Glm4MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from sft.megatron.core import TransformerConfig
from sft.megatron.layers.router import Router
from sft.megatron.parallel.documents import Documents, RouterStep
from sft.models.architecture import Experts

HIDDEN, EXPERTS, CHOSEN = 16, 12, 4
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def router(**values: Any) -> Router:
    config = SimpleNamespace(
        hidden_size=HIDDEN, params_dtype=torch.float32, sequence_parallel=False, layernorm_epsilon=1e-6
    )
    torch.manual_seed(1)
    experts = Experts(**{"count": EXPERTS, "chosen": CHOSEN, "width": 8, "normalized": True, **values})
    made = Router(cast(TransformerConfig, config), experts)
    with torch.no_grad():
        made.weight.normal_(0, 0.3)
        if made.bias is not None:
            made.bias.normal_(0, 0.1)
    return made


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("groups", "chosen_groups"), [(1, 1), (4, 2), (3, 1), (6, 4)])
def test_sigmoid_scores_by_groups_and_bias(groups: int, chosen_groups: int, normalized: bool) -> None:
    """Seen to fail without the bias, with its values in the weights, and with groups ranked by their best expert."""
    ours = router(
        scores="sigmoid",
        selection_bias=True,
        groups=groups,
        chosen_groups=chosen_groups,
        normalized=normalized,
        scaling=2.5,
    )
    config = Glm4MoeConfig(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        n_group=groups,
        topk_group=chosen_groups,
        norm_topk_prob=normalized,
        routed_scaling_factor=2.5,
    )
    theirs = Glm4MoeTopkRouter(config)
    theirs.load_state_dict({"weight": ours.weight.detach(), "e_score_correction_bias": ours.bias})
    tokens = torch.randn(50, HIDDEN, requires_grad=True)
    weights, chosen = ours(tokens)
    _, expected, expected_chosen = theirs(tokens)
    order, expected_order = chosen.argsort(-1), expected_chosen.argsort(-1)
    assert torch.equal(chosen.gather(-1, order), expected_chosen.gather(-1, expected_order))
    sums = {"rtol": 1e-6, "atol": 1e-8}  # transformers adds up the weights in another order
    torch.testing.assert_close(weights.gather(-1, order), expected.gather(-1, expected_order), **sums)
    factors = torch.randn(50, CHOSEN)
    (gradient,) = torch.autograd.grad((weights.gather(-1, order) * factors).sum(), tokens)
    (wanted,) = torch.autograd.grad((expected.gather(-1, expected_order) * factors).sum(), tokens)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("groups", "chosen_groups"), [(4, 2), (12, 5), (3, 1)])
def test_groups_by_their_best_expert(groups: int, chosen_groups: int) -> None:
    """DeepSeek-V2's; seen to fail with groups ranked by their two best."""
    ours = router(normalized=False, groups=groups, chosen_groups=chosen_groups, best_of_group=1, scaling=2.5)
    theirs = DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=HIDDEN,
            num_attention_heads=2,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            topk_method="group_limited_greedy",
            n_group=groups,
            topk_group=chosen_groups,
            routed_scaling_factor=2.5,
        )
    )
    theirs.load_state_dict({"weight": ours.weight.detach()})
    tokens = torch.randn(50, HIDDEN)
    weights, chosen = ours(tokens)
    _, expected, expected_chosen = theirs(tokens)
    order, expected_order = chosen.argsort(-1), expected_chosen.argsort(-1)
    assert torch.equal(chosen.gather(-1, order), expected_chosen.gather(-1, expected_order))
    torch.testing.assert_close(weights.gather(-1, order), expected.gather(-1, expected_order))


@pytest.mark.parametrize("bound", [1e-12, 0.4])
def test_sums_that_are_bounded_below(bound: float) -> None:
    """ERNIE's: about half of these sums are below 0.4, and their tokens' weights then depend on one score each."""
    ours = router(selection_bias=True, smallest_sum=bound)
    config = Ernie4_5_MoeConfig(hidden_size=HIDDEN, moe_num_experts=EXPERTS, moe_k=CHOSEN, moe_norm_min=bound)
    theirs = Ernie4_5_MoeTopKRouter(config)
    assert ours.bias is not None
    bias = ours.bias.view(1, -1)
    theirs.load_state_dict({"weight": ours.weight.detach(), "moe_statics.e_score_correction_bias": bias})
    tokens = torch.randn(50, HIDDEN, requires_grad=True)
    weights, chosen = ours(tokens)
    _, expected, expected_chosen = theirs(tokens)
    assert torch.equal(chosen, expected_chosen)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-8)
    assert bool((weights.sum(-1) < 0.99).any()) == (bound == 0.4)
    factors = torch.randn(50, CHOSEN)
    (gradient,) = torch.autograd.grad((weights * factors).sum(), tokens)
    (wanted,) = torch.autograd.grad((expected * factors).sum(), tokens)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_the_bias_is_a_buffer_in_fp32() -> None:
    ours = router(scores="sigmoid", selection_bias=True)
    assert {name for name, _ in ours.named_parameters()} == {"weight"}
    assert ours.state_dict()["bias"].dtype == torch.float32
    assert "bias" not in router().state_dict()


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"read on the host: {func}"
        return func(*args, **(kwargs or {}))


def test_what_routers_record_stays_on_the_device() -> None:
    """Padding is left out, and whatever a pass without gradients chose: its layer is computed once more."""
    ours = router()
    numbers = torch.tensor([1, 1, 2, 0, 0])
    step = RouterStep(aux_scale=0.0, recorded=True, sequence_parallel=False)
    ours.documents = Documents(numbers, torch.tensor([0, 2, 1]), step)
    tokens = torch.randn(5, HIDDEN)
    with _NoReads():
        with torch.no_grad():
            ours(tokens)
        _, chosen = ours(tokens)
        ours.eval()(tokens)
        sums, peak = ours.record.take(tokens.device)
    logits = (tokens[:3] @ ours.weight.T).detach()
    assert torch.equal(sums[:EXPERTS], torch.bincount(chosen[:3].flatten(), minlength=EXPERTS).double())
    assert float(sums[EXPERTS]) == pytest.approx(float(torch.distributions.Categorical(logits=logits).entropy().sum()))
    assert float(peak) == pytest.approx(float(logits.max()))
    assert not ours.record.take(tokens.device)[0].any()
