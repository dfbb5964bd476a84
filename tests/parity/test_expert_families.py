"""Layers that differ, shared experts and the tensors around them: checkpoints, exports and adapters.

Logits and gradients of each family are in test_families.py, which finds them in the registry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from launcher.contract.spec import LoraSpec, RunSpec
from sft.commands.export import export_run
from sft.hf import exporter
from sft.hf.adapter import target_names
from sft.hf.adapter_export import add_adapter
from sft.hf.expert_adapter import all_expert_targets
from sft.hf.sharded_reader import ShardedReader
from sft.hf.trained_routers import router_problems
from sft.models.registry import read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.runs import curve, expect_same_end, make_run, reference_curve, run_training
from tests.parity.test_expert_lora import with_expert_adapters
from tests.parity.test_experts import LAYOUTS
from tests.parity.test_families import RATE, family_model
from tests.parity.test_grid import assert_gradients_equal
from tests.parity.test_lora import STEPS, adapted, expect_curve, expected_curve, lora_run
from tests.sft.hf.test_exporter import expect_equal, weights
from tests.sft.hf_cases import example_ids, hf_logits, save_config
from tests.tiny_model import make_chat_rows, write_jsonl

pytestmark = pytest.mark.parity

ROUTERS = {
    "ernie4_5_moe": ("mlp.gate.weight",),
    "gpt_oss": ("mlp.router.weight", "mlp.router.bias"),
    "minimax_m2": ("block_sparse_moe.gate.weight",),
    "mixtral": ("block_sparse_moe.gate.weight",),
}
"""What the files of families with names of their own call routers' tensors."""
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a layer that predicts a further token, in number types of its own, as the published files have it."""
    directory = family_model(tmp_path_factory.mktemp("model") / "glm", "glm4_moe")
    path = directory / "model.safetensors"
    further = {
        "model.layers.4.eh_proj.weight": torch.randn(64, 128).bfloat16(),
        "model.layers.4.mlp.gate.e_score_correction_bias": torch.randn(8),
        "model.layers.4.shared_head.head.weight_scale_inv": torch.arange(5, dtype=torch.uint8),
    }
    save_file(load_file(path) | further, path, metadata={"format": "pt"})
    return directory


def _cells() -> list[Any]:
    """By default one, with biases that some ranks add for others: test_families.py trains every case under two more."""
    cases = ("gemma4_text_experts", "glm4_moe", "gpt_oss", "qwen3_moe_dense_layers")
    cells = [(case, layout) for case in cases for layout in LAYOUTS]
    by_default = ("gpt_oss", "ep2_tp2_sp_etp1")
    return [cell if cell == by_default else pytest.param(*cell, marks=pytest.mark.slow) for cell in cells]


@pytest.mark.parametrize(("case", "layout"), _cells())
def test_layout_follows_reference(case: str, layout: str, tmp_path: Path, chat: Path) -> None:
    model = family_model(tmp_path / "model", case)
    expected = reference_curve(tmp_path / "reference", model, chat, steps=2, **RATE)
    ranks, topology, settings = LAYOUTS[layout]
    paths = make_run(tmp_path, model, chat, ranks=ranks, topology=topology, max_steps=2, **RATE, **settings)
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=2e-5)
    assert_gradients_equal(join(by_rank, read_architecture(model))[0], expected.gradients[0])


@pytest.mark.parametrize(
    ("ranks", "topology"),
    [
        pytest.param(2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, id="pp2_vpp2"),
        pytest.param(1, {}, id="tp1", marks=pytest.mark.slow),
        pytest.param(2, {}, id="dp2", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_unequal_layers_goes_on_under_another_topology(
    ranks: int, topology: dict[str, Any], tmp_path: Path, chat: Path, glm: Path
) -> None:
    """Each layer has keys of its own, and the optimizer's state follows them."""
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9, **RATE}
    full = make_run(tmp_path / "full", glm, chat, ranks=2, topology={"tensor_parallel": 2}, **settings)
    run_training(full, 2)
    keys = ShardedReader(full.checkpoint(2) / "sharded").keys()
    assert {"decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.3.mlp.router.bias"} <= keys
    paths = make_run(tmp_path / "other", glm, chat, ranks=ranks, topology=topology, **settings)
    expect_same_end(full, paths, ranks)


@pytest.mark.parametrize(
    ("ranks", "topology"),
    [
        pytest.param(2, {"expert_parallel": 2}, id="ep2"),
        pytest.param(1, {}, id="tp1", marks=pytest.mark.slow),
        pytest.param(4, {"pipeline_parallel": 2, "tensor_parallel": 2}, id="tp2_pp2", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_biases_and_sinks_goes_on_under_another_topology(
    ranks: int, topology: dict[str, Any], tmp_path: Path, chat: Path
) -> None:
    """From ranks that share heads and experts, and each have a copy of the second bias."""
    model = family_model(tmp_path / "model", "gpt_oss")
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9, "distributed": True, **RATE}
    full = make_run(tmp_path / "full", model, chat, ranks=2, topology={"tensor_parallel": 2}, **settings)
    run_training(full, 2)
    paths = make_run(tmp_path / "other", model, chat, ranks=ranks, topology=topology, **settings)
    expect_same_end(full, paths, ranks)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
def test_a_stage_without_experts_saves_the_step_of_the_others(distributed: bool, tmp_path: Path, chat: Path) -> None:
    """Of four layers the first two are dense, so that rank 0, which saves what is no tensor, has no experts."""
    model = family_model(tmp_path / "model", "qwen3_moe", mlp_only_layers=[0, 1])
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9, "distributed": distributed, **RATE}
    full = make_run(tmp_path / "full", model, chat, ranks=2, topology={"pipeline_parallel": 2}, **settings)
    run_training(full, 2)
    paths = make_run(tmp_path / "other", model, chat, ranks=1, **settings)
    expect_same_end(full, paths, 1)


def test_what_is_not_trained_comes_out_as_it_was(
    tmp_path: Path, chat: Path, glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a bf16 run, which would round the bias, and into several files."""
    paths = make_run(tmp_path, glm, chat, ranks=1, max_steps=1, precision="bf16")
    run_training(paths, 1)
    monkeypatch.setattr(exporter, "MAX_FILE_BYTES", 100_000)
    export_run(paths.root)
    found, source = weights(paths.export), weights(glm)
    assert len(list(paths.export.glob("*.safetensors"))) > 2
    assert found.keys() == source.keys()
    kept = {name for name in source if name.startswith("model.layers.4.") or name.endswith("correction_bias")}
    assert len(kept) == 3 + 3
    expect_equal({name: found[name] for name in kept}, {name: source[name] for name in kept})
    assert not torch.equal(found["model.layers.2.mlp.gate.weight"], source["model.layers.2.mlp.gate.weight"])


def test_another_number_type_is_for_what_is_trained(tmp_path: Path, chat: Path, glm: Path) -> None:
    paths = make_run(tmp_path, glm, chat, ranks=1, max_steps=1)
    run_training(paths, 1)
    exporter.export_checkpoint(paths.checkpoint(1) / "sharded", glm, tmp_path / "export", dtype=torch.bfloat16)
    found, source = weights(tmp_path / "export"), weights(glm)
    assert found["model.layers.2.mlp.gate.weight"].dtype == torch.bfloat16
    expect_equal({BIAS: found[BIAS]}, {BIAS: source[BIAS]})
    assert '"dtype": "bfloat16"' in (tmp_path / "export" / "config.json").read_text()


def test_adapters_of_attention_and_of_all_kinds_of_mlps(tmp_path: Path, chat: Path, glm: Path) -> None:
    """Dense, shared and chosen, under two stages; the merged export has what was carried, too."""
    lora = LoraSpec(rank=2, targets=["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert target_names(read_architecture(glm), lora) == lora.targets
    every = {"global_batch_size": 12}  # all examples in three steps: each expert has tokens
    expected = expected_curve(
        tmp_path / "reference", glm, chat, lambda spec: with_expert_adapters(glm, lora, spec.train.seed), **every
    )
    settings: dict[str, Any] = {"topology": {"pipeline_parallel": 2}, "max_steps": STEPS, "export_merged": True}
    paths = lora_run(tmp_path, glm, chat, lora, ranks=2, **settings, **every)
    run_training(paths, 2)
    expect_curve(paths, expected)
    export_run(paths.root)
    found, source = weights(paths.export), weights(glm)
    assert found.keys() == source.keys()
    changed = {name for name in source if not torch.equal(found[name], source[name])}
    of_experts = [module for target in all_expert_targets(read_architecture(glm), lora) for module in target.modules]
    assert {name for name in changed if ".experts." in name} == {f"{module}.weight" for module in of_experts}
    assert len(changed) == 4 * len(lora.targets) + len(of_experts)
    assert not [name for name in changed if name.startswith("model.layers.4.")]
    config = json.loads((paths.export / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == lora.targets


@pytest.mark.parametrize("family", ["glm4_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in ROUTERS)])
def test_routers_are_trained_beside_adapters_where_asked_for(family: str, tmp_path: Path, chat: Path) -> None:
    """Under sequence parallel, where each rank routes a part. PEFT gives the exported adapter's logits, routers
    included; Mixtral's files have another name for them than transformers, and those of gpt-oss have a bias."""
    peft = pytest.importorskip("peft")
    model = family_model(tmp_path / "model", family)
    lora = LoraSpec(rank=2, targets=["q_proj"], router=True)

    def build(spec: RunSpec) -> PreTrainedModel:
        made = adapted(model, lora, spec.train.seed)
        for name, parameter in made.named_parameters():
            if name.endswith(("mlp.gate.weight", "mlp.router.weight", "mlp.router.bias")):
                parameter.requires_grad_(True)
        return made

    expected = expected_curve(tmp_path / "reference", model, chat, build)
    topology = {"tensor_parallel": 2, "sequence_parallel": True}
    paths = lora_run(tmp_path, model, chat, lora, ranks=2, topology=topology, max_steps=STEPS, export_merged=True)
    run_training(paths, 2)
    expect_curve(paths, expected)
    export_run(paths.root)
    found, source = weights(paths.export), weights(model)
    routers = {name for name in source if name.endswith(ROUTERS.get(family, ("mlp.gate.weight",)))}
    assert len(routers) == (8 if family == "gpt_oss" else 4 if family in ("minimax_m2", "mixtral") else 3)
    assert {name for name in source if not torch.equal(found[name], source[name])} == routers | {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(4)
    }
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(base, paths.export / "adapter").eval()
    ids = example_ids(vocab=331)
    with torch.no_grad():
        assert (loaded(ids).logits - hf_logits(paths.export, ids)).abs().max() < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    add_adapter(plain, paths.export / "adapter")
    with torch.no_grad():
        assert (plain(ids).logits - hf_logits(paths.export, ids)).abs().max() < 1e-5


def test_a_model_without_routers_is_refused(tmp_path: Path) -> None:
    architecture = read_architecture(save_config("llama", tmp_path))
    assert router_problems(LoraSpec(rank=2, router=True), architecture) == [
        "model.lora.router: a llama model has no routers; leave it out"
    ]
