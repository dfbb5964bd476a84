"""torchtitan's model is that of the named shape: the same logits as transformers' for the same weights, and the loss.

Where torchtitan is not installed, only what is refused is tested.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from sft.bench import torchtitan
from sft.bench.workload import Workload

TINY = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "rope_theta": 500_000.0, "rms_norm_eps": 1e-3,
}  # fmt: skip
RENAMED = {
    "tok_embeddings": "model.embed_tokens", "attention.qkv_linear.wq": "self_attn.q_proj",
    "attention.qkv_linear.wk": "self_attn.k_proj", "attention.qkv_linear.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
CPU = torch.device("cpu")
installed = pytest.mark.skipif(not torchtitan.is_installed(), reason="torchtitan is not installed")


def workload_of(monkeypatch: pytest.MonkeyPatch, **changed: object) -> Workload:
    monkeypatch.setattr("sft.bench.workload.named_model_config", lambda shape: {**TINY, **changed})
    return Workload(shape="tiny", data="full", seq_length=32, rows=2)


def both_models(workload: Workload, kernel: str = "sdpa") -> tuple[Any, Any]:
    """Return torchtitan's model and transformers' with the same weights, norms' weights not all one."""
    found = torchtitan.build_model(workload, kernel, "fp32", CPU)
    for name, parameter in found.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    config = transformers.AutoConfig.for_model(**workload.model_config)
    expected = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    weights = {}
    for name, tensor in found.state_dict().items():
        for old, new in RENAMED.items():
            name = name.replace(f"{old}.weight", f"{new}.weight")
        weights[f"model.{name}" if name.startswith(("layers.", "norm.")) else name] = tensor
    expected.load_state_dict(weights)
    return found, expected.eval()


@installed
@pytest.mark.parametrize(
    "changed",
    [{}, {"tie_word_embeddings": True}, {"head_dim": 24}, {"num_key_value_heads": 4}],
    ids=["untied", "tied", "heads of another width", "a key for each query"],
)
def test_logits_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch, changed: dict[str, object]) -> None:
    found, expected = both_models(workload_of(monkeypatch, **changed))
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(found(tokens), expected(tokens).logits, rtol=1e-5, atol=1e-5)


@installed
def test_examples_of_a_packed_row_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torchtitan.models.common import attention

    # Uncompiled, because compiling takes longer than all other tests of this file.
    monkeypatch.setattr(attention.FlexAttention, "_compiled_flex_attn", staticmethod(flex_attention))
    monkeypatch.setattr(attention, "_compiled_create_block_mask", create_block_mask)
    found, expected = both_models(workload_of(monkeypatch), "flex")
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(5))
    lengths = [[20, 12], [7, 25]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    with torch.no_grad():
        logits = found(tokens, positions=positions, attention_masks=found.get_attention_masks(positions))
        for index, row in enumerate(lengths):
            alone = [expected(example[None]).logits[0] for example in tokens[index].split(row)]
            torch.testing.assert_close(logits[index], torch.cat(alone), rtol=1e-5, atol=1e-5)


@installed
def test_loss_and_gradients_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of the sequence, divided by the targets of the whole step."""
    found, expected = both_models(workload_of(monkeypatch))
    generator = torch.Generator().manual_seed(6)
    tokens, labels = torch.randint(0, 256, (2, 2, 32), generator=generator)
    labels[:, ::3] = -100
    targets = 2 * int((labels != -100).sum())  # of two micro-batches
    loss = torchtitan.make_step(found, CPU, "never")(tokens, labels, torch.tensor(targets), {})
    whole = torch.nn.functional.cross_entropy(expected(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (whole / targets).backward()
    torch.testing.assert_close(loss.detach(), (whole / targets).detach())
    for made, wanted in (
        (found.lm_head.weight, expected.lm_head.weight),
        (found.tok_embeddings.weight, expected.model.embed_tokens.weight),
        (found.layers["1"].feed_forward.w2.weight, expected.model.layers[1].mlp.down_proj.weight),
    ):
        torch.testing.assert_close(made.grad, wanted.grad, rtol=1e-4, atol=1e-6)


@installed
@pytest.mark.parametrize("shape", ["1b", "3b", "8b", "70b", "llama2-7b"])
def test_a_named_shape_has_the_parameters_of_transformers(shape: str) -> None:
    workload = Workload(shape=shape, data="full", seq_length=4096, rows=1)
    with torch.device("meta"):
        made = torchtitan.model_config(workload, "sdpa").build()
        config = transformers.AutoConfig.for_model(**workload.model_config)
        expected = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in expected.parameters())
    assert made.enable_weight_tying == config.tie_word_embeddings


@installed
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_under_fsdp_are_those_without_it(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """It computes in bf16, and the loss takes the output layer's weights apart from all others."""
    workload = workload_of(monkeypatch, tie_word_embeddings=tied)
    found, whole = (torchtitan.build_model(workload, "sdpa", "fp32", CPU) for _ in range(2))
    torchtitan._join(CPU)
    try:
        found = torchtitan.shard(found, CPU, 1)
        tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(5))
        for model in (found, whole):
            torchtitan.make_step(model, CPU, "never")(tokens, tokens.roll(-1, 1), torch.tensor(64), {})
        for (name, made), wanted in zip(found.named_parameters(), whole.parameters(), strict=True):
            difference = (made.grad.full_tensor() - wanted.grad).norm() / wanted.grad.norm()
            assert difference < 5e-2, name
    finally:
        torch.distributed.destroy_process_group()


@installed
def test_it_trains_under_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workload_of(monkeypatch)
    try:
        result = torchtitan.run_torchtitan(
            workload, weights="fp32", attention="auto", micro_batches=2, warmup=1, steps=2
        )
    finally:
        torch.distributed.destroy_process_group()
    assert result.loss == pytest.approx(torch.tensor(256.0).log().item(), abs=0.1)
    assert result.settings == {"weights": "fp32", "rows": 2, "attention": "sdpa"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "qwen2"}, "models of type llama here, not qwen2"),
        ({"attention_bias": True}, "attention_bias False here, not True"),
        ({"hidden_act": "gelu"}, "hidden_act silu here, not gelu"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_type default here, not linear"),
    ],
)
def test_a_model_that_it_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        torchtitan.refuse(workload_of(monkeypatch, **changed))


def test_lora_and_attention_kernels_of_others_are_refused() -> None:
    adapted = Workload(shape="1b", data="full", seq_length=64, rows=1, lora_rank=8)
    whole = Workload(shape="1b", data="full", seq_length=64, rows=1)
    for workload, attention, message in ((adapted, "auto", "without LoRA"), (whole, "flash4", "not flash4")):
        with pytest.raises(ValueError, match=message):
            torchtitan.run_torchtitan(workload, weights="fp32", attention=attention, micro_batches=1, warmup=0, steps=1)


def test_packed_rows_are_refused_where_torch_cannot_mask_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11, whose create_block_mask lacks the argument."""
    monkeypatch.setattr(torchtitan.flex_attention, "create_block_mask", lambda mask_mod, B, H, Q_LEN, KV_LEN: None)
    workload = Workload(shape="1b", data="ragged", seq_length=64, rows=1)
    with pytest.raises(ValueError, match=r"no separate_full_blocks.*use --data full"):
        torchtitan.run_torchtitan(workload, weights="fp32", attention="auto", micro_batches=1, warmup=0, steps=1)
