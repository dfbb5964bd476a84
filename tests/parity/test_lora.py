"""LoRA under every layout trains the adapters that plain PyTorch trains; exported, PEFT and transformers agree.

The reference puts A and B on transformers' own linear layers, one pair each, and shares nothing with the code under
test but A's first values.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from launcher.contract.errors import ConfigError, ModelError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import LoraSpec, RunSpec, read_resolved, to_yaml
from sft.__main__ import main
from sft.commands.export import export_run
from sft.data.batches.sampler import EMPTY_SLOT
from sft.data.prepared.prepare import open_or_build
from sft.data.prepared.schedule import batch_schedule
from sft.engine.module import SFTGPT
from sft.hf.adapter import all_targets
from sft.hf.answer import answer
from sft.hf.checks import check_model_settings
from sft.hf.loaded_model import load_transformers_model
from sft.hf.sharded_reader import ShardedReader
from sft.models.registry import SUPPORTED, read_architecture
from sft.training.trainer import train
from tests.parity.reference import RouterWatch, target_losses
from tests.parity.runs import curve, make_run, run_training
from tests.parity.test_families import family_model
from tests.ranks import run_ranks
from tests.sft.hf_cases import DISTINCT, example_ids, hf_logits
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity

STEPS = 3
ALL = LoraSpec(rank=4, alpha=6.0)
SOME = LoraSpec(rank=3, targets=["q_proj", "v_proj", "up_proj", "o_proj"])
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp1": (1, {}, {}),
    "tp2": (2, {"tensor_parallel": 2}, {}),
    "tp2_sp": (2, {"tensor_parallel": 2, "sequence_parallel": True}, {}),
    "pp2": (2, {"pipeline_parallel": 2}, {}),
    "pp2_vpp2": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, {}),
    "dp2": (2, {}, {}),
    "tp2_pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}, {}),
    "tp2_sp_packed": (2, {"tensor_parallel": 2, "sequence_parallel": True}, {"packing": True}),
    "recompute_full": (1, {}, {"recompute": "full"}),
    "recompute_norms": (1, {}, {"recompute": "norms", "kernels": "fused"}),
    "recompute_norms_plain": (1, {}, {"recompute": "norms", "kernels": "plain"}),
    "cp2_packed": (2, {"context_parallel": 2}, {"packing": True}),
}

STEADY = {"eps": 1e-3}
"""The first steps of AdamW have the size of the rate whatever the gradient's, also of an element whose gradient is
rounding: one of qwen3_5_moe_text is 2e-7 on one rank and -3e-9 on two, and moves its router past a near tie of 5e-6."""

ADAPTABLE = [name for name in SUPPORTED if name != "gpt2"]
"""Families that take adapters. GPT-2's files hold transposed matrices."""
SLOW_FAMILIES = {
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "hunyuan_v1_dense",
    "llama",
    "minimax_m2",
    "ministral3",
    "mixtral",
    "olmo3",
    "qwen3_moe",
    "smollm3",
}
LORA_BY_DEFAULT = [name for name in ADAPTABLE if name in DISTINCT and name not in SLOW_FAMILIES]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied: the frozen embedding is on two stages, whose gradients nobody must look for."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "llama", tied=True)


class LoraLinear(nn.Module):
    """A linear layer with an adapter, as the paper has it."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(torch.zeros(base.out_features, a.shape[0]))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)
        return output


def adapted(directory: Path, lora: LoraSpec, seed: int) -> PreTrainedModel:
    """The model with adapters on its targets, all else frozen."""
    made = load_transformers_model(directory, torch.float32, attn_implementation="eager")
    made.requires_grad_(False)
    assert lora.rank is not None
    architecture = read_architecture(directory)
    for target in all_targets(architecture, lora):
        module = architecture.weights.module(target.module)
        parent, _, name = module.rpartition(".")
        linear = made.get_submodule(module)
        setattr(made.get_submodule(parent), name, LoraLinear(linear, target.draw_a(lora.rank, seed), lora.scale))
    return made


@dataclasses.dataclass(frozen=True)
class Curve:
    losses: list[float]
    grad_norms: list[float]
    margins: list[float]
    """Of each step, as `tests.parity.reference.Curve` has them."""


def expected_curve(root: Path, directory: Path, chat: Path, build: Callable[[RunSpec], Any], **settings: Any) -> Curve:
    """Train the adapters of a model of our making by the definition: sum(w * nll) / sum(w), clipped, AdamW."""
    spec = read_resolved(make_run(root, directory, chat, ranks=1, max_steps=STEPS, **settings).config)
    cache = open_or_build(spec, directory, build=True).train
    schedule = batch_schedule(spec, cache, shuffle=True)
    made, rule = build(spec).train(), spec.train.optimizer
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rule.lr, (rule.beta1, rule.beta2), rule.eps, rule.weight_decay)
    losses, norms, margins, routers = [], [], [], RouterWatch(made)
    for step in range(STEPS):
        examples = [int(example) for example in schedule.examples_at(step) if example != EMPTY_SLOT]
        pairs = [target_losses(made, cache, example) for example in examples]
        margins.append(routers.take_margin())
        loss = sum((nll * weights).sum() for nll, weights in pairs) / sum(float(weights.sum()) for _, weights in pairs)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, rule.clip_grad)))
        optimizer.step()
        losses.append(float(loss.detach()))  # type: ignore[union-attr]
    return Curve(losses, norms, margins)


def lora_run(root: Path, directory: Path, chat: Path, lora: LoraSpec, **settings: Any) -> RunPaths:
    paths = make_run(root, directory, chat, **settings)
    spec = read_resolved(paths.config)
    paths.config.write_text(to_yaml(dataclasses.replace(spec, model=dataclasses.replace(spec.model, lora=lora))))
    return paths


def expect_curve(paths: RunPaths, expected: Curve) -> None:
    losses, norms = curve(paths)
    print(f"smallest margins of routers {[f'{margin:.1e}' for margin in expected.margins]}")  # shown of a failure
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=2e-5)


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, model: Path, chat: Path) -> dict[str, Curve]:
    """What both settings must give."""
    return {
        name: expected_curve(
            tmp_path_factory.mktemp(name), model, chat, lambda spec, lora=lora: adapted(model, lora, spec.train.seed)
        )
        for name, lora in (("all", ALL), ("some", SOME))
    }


@pytest.mark.parametrize(
    "name", thinned(LAYOUTS, "tp1", "tp2_pp2", "tp2_sp_packed", "recompute_full", "recompute_norms_plain")
)
def test_layout_follows_reference(name: str, tmp_path: Path, model: Path, chat: Path, curves: dict[str, Curve]) -> None:
    """Seen to fail: tp2_sp without the sequence-parallel mark on the parts that every rank holds, tp2 without the
    all-reduce of what is between A and B or without the split mark, recompute_full and recompute_norms_plain
    where the embedding's output requires no gradient."""
    ranks, topology, settings = LAYOUTS[name]
    paths = lora_run(tmp_path, model, chat, ALL, ranks=ranks, topology=topology, max_steps=STEPS, **settings)
    run_training(paths, ranks)
    expect_curve(paths, curves["all"])
    assert curves["all"].losses[-1] < curves["all"].losses[0] - 0.1


@pytest.mark.parametrize("name", thinned(["tp1", "tp2", "tp2_sp"], "tp2_sp"))
def test_some_targets_of_a_fused_linear(
    name: str, tmp_path: Path, model: Path, chat: Path, curves: dict[str, Curve]
) -> None:
    ranks, topology, settings = LAYOUTS[name]
    paths = lora_run(tmp_path, model, chat, SOME, ranks=ranks, topology=topology, max_steps=STEPS, **settings)
    run_training(paths, ranks)
    expect_curve(paths, curves["some"])


@pytest.mark.parametrize("case", thinned([*ADAPTABLE, "llama_biased"], *LORA_BY_DEFAULT))
def test_family_follows_reference_under_tp2_pp2(case: str, tmp_path: Path, chat: Path) -> None:
    """Phi-3's fused tensors have one adapter each, spread over two blocks of rows."""
    directory = family_model(tmp_path / "model", case)
    architecture = read_architecture(directory)
    lora = ALL
    if architecture.shape.num_experts:  # whose adapters are in test_expert_lora.py
        of_attention = [own.name for own in all_targets(architecture, ALL) if own.linear.startswith("self_attention.")]
        lora = dataclasses.replace(ALL, targets=list(dict.fromkeys(of_attention)))
    expected = expected_curve(
        tmp_path / "reference", directory, chat, lambda spec: adapted(directory, lora, spec.train.seed), **STEADY
    )
    topology = {"tensor_parallel": 2, "pipeline_parallel": 2}
    paths = lora_run(tmp_path, directory, chat, lora, ranks=4, topology=topology, max_steps=STEPS, **STEADY)
    run_training(paths, 4)
    expect_curve(paths, expected)


def test_peft_trains_the_same(tmp_path: Path, model: Path, chat: Path, curves: dict[str, Curve]) -> None:
    peft = pytest.importorskip("peft")

    def build(spec: RunSpec) -> Any:
        base = load_transformers_model(model, torch.float32, attn_implementation="eager")
        targets = all_targets(read_architecture(model), SOME)
        made = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=3, target_modules=SOME.targets))
        with torch.no_grad():
            for target in targets:
                weight = made.get_parameter(f"base_model.model.{target.module}.lora_A.default.weight")
                weight.copy_(target.draw_a(3, spec.train.seed))
        return made

    found = expected_curve(tmp_path, model, chat, build)
    assert found.losses == pytest.approx(curves["some"].losses, rel=1e-6)
    assert found.grad_norms == pytest.approx(curves["some"].grad_norms, rel=1e-6)


def test_only_adapters_have_gradients_and_are_saved(tmp_path: Path, model: Path, chat: Path) -> None:
    paths = lora_run(tmp_path, model, chat, ALL, ranks=2, topology={"tensor_parallel": 2}, max_steps=2)
    assert run_ranks(2, trained_names, paths.config) == [True, True]
    reader = ShardedReader(paths.checkpoint(2) / "sharded")
    weights = [key for key in sorted(reader.keys()) if not key.startswith("optimizer.")]
    assert weights
    assert all(".lora." in key for key in weights)
    assert reader.shape("decoder.layers.self_attention.linear_qkv.lora.k_proj.lora_B.0") == (4, 32, 4)


def trained_names(config: Path) -> bool:
    """Runs on a rank: whether gradient buffers hold the adapters and nothing else."""
    right: list[bool] = []
    wrap = SFTGPT.wrap_chunks

    def spy(self: SFTGPT) -> None:
        wrap(self)
        held = {id(parameter) for chunk in self.model_chunks for buffer in chunk.buffers for parameter in buffer.params}
        lora = {
            id(value) for chunk in self.model_chunks for name, value in chunk.named_parameters() if ".lora." in name
        }
        right.append(held == lora and bool(lora))

    SFTGPT.wrap_chunks = spy  # type: ignore[method-assign]
    train(config)
    return right == [True]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, chat: Path) -> RunPaths:
    """Six steps on tp2 x dp2 with sequence parallel, a checkpoint after the third."""
    topology = {"tensor_parallel": 2, "sequence_parallel": True}
    root = tmp_path_factory.mktemp("finished")
    paths = lora_run(root, model, chat, ALL, ranks=4, topology=topology, max_steps=6, every=3, keep_last=9)
    run_training(paths, 4)
    return paths


@pytest.mark.parametrize(
    ("ranks", "topology"),
    [
        (4, {"tensor_parallel": 2, "sequence_parallel": True}),
        (1, {}),
        (2, {"pipeline_parallel": 2}),
        (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),  # was refused as of other weights
    ],
    ids=["same", "tp1", "pp2", "pp2_vpp2"],
)
def test_resume(
    ranks: int, topology: dict[str, Any], tmp_path: Path, model: Path, chat: Path, finished: RunPaths
) -> None:
    paths = lora_run(tmp_path, model, chat, ALL, ranks=ranks, topology=topology, max_steps=6, every=3, keep_last=9)
    shutil.copytree(finished.checkpoint(3), paths.checkpoint(3))
    shutil.copy(finished.metrics, paths.metrics)
    run_training(paths, ranks)
    if ranks == 4:
        assert curve(paths) == curve(finished)
    else:
        assert curve(paths)[0] == pytest.approx(curve(finished)[0], rel=1e-5)
        assert curve(paths)[1] == pytest.approx(curve(finished)[1], rel=3e-5)


def test_adapters_of_other_weights_are_not_resumed(tmp_path: Path, chat: Path, finished: RunPaths) -> None:
    """The frozen weights are not in the checkpoint: of the same shape, they would go unnoticed."""
    other = make_tiny_model(tmp_path / "other", tied=True, seed=1)
    paths = lora_run(tmp_path, other, chat, ALL, ranks=1, max_steps=6, every=3, keep_last=9)
    shutil.copytree(finished.checkpoint(3), paths.checkpoint(3))
    assert "trained on other weights than those in model.path" in run_ranks(1, error_of_train, paths.config)[0]


def test_fewer_adapters_than_a_checkpoint_holds_are_not_resumed(
    tmp_path: Path, model: Path, chat: Path, finished: RunPaths
) -> None:
    """Seen to go on without those that are not among the targets any more, with exit code 0."""
    fewer = dataclasses.replace(ALL, targets=["q_proj", "v_proj"])
    paths = lora_run(tmp_path, model, chat, fewer, ranks=1, max_steps=6, every=3, keep_last=9)
    shutil.copytree(finished.checkpoint(3), paths.checkpoint(3))
    error = run_ranks(1, error_of_train, paths.config)[0]
    assert 'model.lora.targets was ["q_proj", "k_proj"' in error
    assert 'is ["q_proj", "v_proj"]' in error


def error_of_train(config: Path) -> str:
    """Runs on a rank: the message that training ends with."""
    with pytest.raises(ConfigError) as caught:
        train(config)
    return str(caught.value)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [("weights", "trained on other weights than those in model.path now"), ("config.json", "layernorm_epsilon was ")],
)
def test_an_adapter_is_exported_for_its_own_model_alone(
    changed: str, message: str, merged: bool, tmp_path: Path, model: Path, finished: RunPaths
) -> None:
    """Seen to be exported for, and merged into, whatever model.path held by then."""
    path = model / ("config.json" if changed == "config.json" else "model.safetensors")
    before = path.read_bytes()
    if changed == "config.json":
        path.write_text(json.dumps({**json.loads(before), "rms_norm_eps": 0.01}))
    else:
        shutil.copy(make_tiny_model(tmp_path / "other", tied=True, seed=1) / path.name, path)
    try:
        with pytest.raises(ConfigError, match=message):
            exported(finished, tmp_path, merged=merged)
    finally:
        path.write_bytes(before)


def exported(paths: RunPaths, root: Path, *, merged: bool) -> Path:
    """A copy of the run, exported."""
    copy = RunPaths(root / "merged" if merged else root / "adapter")
    shutil.copytree(paths.root, copy.root)
    spec = read_resolved(copy.config)
    copy.config.write_text(
        to_yaml(dataclasses.replace(spec, checkpoint=dataclasses.replace(spec.checkpoint, export_merged=merged)))
    )
    export_run(copy.root)
    return copy.export


def test_adapter_and_merged_model_agree(tmp_path: Path, model: Path, finished: RunPaths) -> None:
    adapter, merged = exported(finished, tmp_path, merged=False), exported(finished, tmp_path, merged=True)

    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 4 * 7 * 2
    base = load_transformers_model(model, torch.float32, attn_implementation="eager").eval()
    ids = example_ids(vocab=331)
    with torch.no_grad():
        before = base(ids).logits
        for name in [name for name in tensors if ".lora_A." in name]:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            change = 1.5 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            base.get_parameter(f"{module}.weight").add_(change)
        by_hand = base(ids).logits
    assert (hf_logits(merged, ids) - by_hand).abs().max() < 1e-5
    assert (before - by_hand).abs().max() > 0.05
    assert load_file(merged / "adapter/adapter_model.safetensors").keys() == tensors.keys()
    assert (adapter / "tokenizer.json").is_file()
    assert not (adapter / "config.json").exists()
    assert answer(adapter, ["How many otters?"], 8) == answer(merged, ["How many otters?"], 8)


def test_peft_loads_the_adapter(tmp_path: Path, model: Path, finished: RunPaths) -> None:
    peft = pytest.importorskip("peft")
    adapter, merged = exported(finished, tmp_path, merged=False), exported(finished, tmp_path, merged=True)
    base = load_transformers_model(model, torch.float32, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(base, adapter).eval()
    ids = example_ids(vocab=331)
    with torch.no_grad():
        assert (loaded(ids).logits - hf_logits(merged, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("recompute", thinned(["none", "full"], "full"))
def test_dropout_is_the_same_on_all_tensor_ranks_that_share_an_input(
    recompute: str, tmp_path: Path, model: Path, chat: Path
) -> None:
    """Were it not, the copies of A on both ranks would drift apart (seen, with one generator for all inputs);
    recomputed layers must drop the same again."""
    lora = dataclasses.replace(ALL, dropout=0.2)
    paths = lora_run(tmp_path, model, chat, lora, ranks=2, topology={"tensor_parallel": 2}, recompute=recompute)
    found = run_ranks(2, whole_parts, paths.config)
    assert found[0] == found[1]
    assert curve(paths)[0][-1] < curve(paths)[0][0]


def whole_parts(config: Path) -> list[float]:
    """Runs on a rank: sums of what both tensor ranks hold, after training."""
    modules: list[SFTGPT] = []
    wrap = SFTGPT.wrap_chunks

    def spy(self: SFTGPT) -> None:
        modules.append(self)
        wrap(self)

    SFTGPT.wrap_chunks = spy  # type: ignore[method-assign]
    train(config)
    return [
        float(parameter.detach().double().abs().sum())
        for chunk in modules[0].model_chunks
        for name, parameter in chunk.named_parameters()
        if ".lora." in name and not getattr(parameter, "tensor_model_parallel", False)
    ]


@pytest.mark.parametrize(
    ("tensor_parallel", "lora", "message"),
    [
        (
            2,
            LoraSpec(rank=4, targets=["q_proj", "qkv_proj"]),
            "model.lora.targets: a llama model has no linear layer qkv_proj; it has q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj",
        ),
        (
            4,
            LoraSpec(rank=4, targets=["v_proj", "o_proj"]),
            "model.lora.targets: adapters of v_proj need topology.tensor_parallel 4 to be at most the 2 KV heads; with "
            "more, ranks hold unequal parts of them",
        ),
    ],
)
def test_refusals(tensor_parallel: int, lora: LoraSpec, message: str, tmp_path: Path, model: Path, chat: Path) -> None:
    paths = lora_run(tmp_path, model, chat, lora, ranks=tensor_parallel, topology={"tensor_parallel": tensor_parallel})
    with pytest.raises(ModelError) as caught:
        check_model_settings(read_resolved(paths.config), read_architecture(model))
    assert list(caught.value.problems) == [message]
    assert run_ranks(tensor_parallel, exit_code, paths.config) == [ExitCode.BAD_INPUT] * tensor_parallel


def exit_code(config: Path) -> int:
    """Runs on a rank: the exit code of the rank main."""
    return main(["train", str(config)])
