"""Adapters of tensors that hold all experts (gpt-oss, Qwen3.5): PEFT trains, loads and merges the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from launcher.contract.exit_codes import ExitCode
from launcher.contract.spec import LoraSpec, RunSpec
from sft.__main__ import main
from sft.commands.export import export_run
from sft.hf.adapter import AdapterTensors, all_targets, target_names
from sft.hf.adapter_export import add_adapter
from sft.hf.expert_adapter import ExpertTarget, all_expert_targets
from sft.hf.joined_experts import joined, of_both, separated, wrappers
from sft.hf.loaded_model import load_transformers_model
from sft.models.registry import read_architecture
from sft.models.weight_map import canonical_name
from tests.parity.gradients import train_and_keep
from tests.parity.runs import expect_same_end, run_training
from tests.parity.test_expert_lora import LAYOUTS
from tests.parity.test_families import family_model
from tests.parity.test_linear_attention import as_published
from tests.parity.test_lora import STEADY, STEPS, Curve, expect_curve, expected_curve, lora_run
from tests.sft.hf.test_exporter import weights
from tests.sft.hf.test_mxfp4 import SIZES, quantized
from tests.sft.hf_cases import example_ids, hf_logits
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, write_jsonl

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.parity

LORA = LoraSpec(rank=4, alpha=6.0)
CASES = ("gemma4_text_experts", "gpt_oss", "qwen3_5_moe_text")
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
"""What users may give PEFT as `target_parameters`."""


def peft_model(directory: Path, seed: int, rank: int = 4) -> Any:
    """transformers' model in PEFT's hands, with A as a run begins."""
    base = load_transformers_model(directory, torch.float32, attn_implementation="eager")
    architecture = read_architecture(directory)
    names = target_names(architecture, LORA)
    made = peft.get_peft_model(
        base, peft.LoraConfig(r=rank, lora_alpha=6, target_modules=names, target_parameters=PARAMETERS)
    )
    with torch.no_grad():
        for target in all_targets(architecture, LORA):
            parameter(made, target.module, "A").copy_(target.draw_a(rank, seed))
        for of_experts, module in wrapped(directory):
            drawn = [of_experts.draw_a(expert, rank, seed) for expert in range(len(of_experts.modules))]
            parameter(made, module, "A").copy_(torch.cat(drawn))
    return made


def parameter(model: Any, module: str, half: str) -> torch.nn.Parameter:
    """A or B of a module."""
    found = model.get_parameter(f"base_model.model.{module}.lora_{half}.default.weight")
    assert isinstance(found, torch.nn.Parameter)
    return found


def wrapped(directory: Path) -> Iterator[tuple[ExpertTarget, str]]:
    """The adapters of experts, and what PEFT calls their modules."""
    targets = all_expert_targets(read_architecture(directory), LORA)
    modules = wrappers([str(target.tensor) for target in targets])
    return ((target, modules[str(target.tensor)]) for target in targets)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {case: family_model(tmp_path_factory.mktemp("model") / case, case) for case in CASES}
    as_published(made["qwen3_5_moe_text"])  # transformers writes a tensor for each expert
    return made


class Expected:
    """What PEFT's training gives: losses, norms, and the gradients of the experts' adapters, step by step, and all
    adapters at its end by the names of files."""

    def __init__(self, root: Path, directory: Path, chat: Path) -> None:
        self.gradients: dict[str, list[torch.Tensor]] = {}
        self.trained: dict[str, torch.Tensor] = {}

        def build(spec: RunSpec) -> Any:
            made = peft_model(directory, spec.train.seed)
            self.trained = adapters_of(made)  # which are those that will be trained
            for target, module in wrapped(directory):
                for half in "AB":
                    self._watch(target.parameter(f"lora_{half}"), parameter(made, module, half))
            return made

        self.curve: Curve = expected_curve(root, directory, chat, build, **STEADY)

    def _watch(self, name: str, trained: torch.nn.Parameter) -> None:
        seen = self.gradients.setdefault(name, [])

        def keep(parameter: torch.nn.Parameter) -> None:
            assert parameter.grad is not None
            seen.append(parameter.grad.clone())

        trained.register_post_accumulate_grad_hook(keep)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], chat: Path) -> dict[str, Expected]:
    return {case: Expected(tmp_path_factory.mktemp("reference"), models[case], chat) for case in CASES}


def train_and_keep_adapters(config: Path) -> list[dict[str, NDArray[np.float32]]]:
    """Runs on a rank: the gradients of its adapters in each step."""
    return train_and_keep(config, _gradients)


def _gradients(chunks: list[Any]) -> dict[str, NDArray[np.float32]]:
    named = {canonical_name(name): own for chunk in chunks for name, own in chunk.named_parameters()}
    return {name: own.main_grad.numpy().copy() for name, own in named.items() if own.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_one_rank_trains_what_peft_trains(
    case: str, tmp_path: Path, models: dict[str, Path], chat: Path, expected: dict[str, Expected]
) -> None:
    """The gradients of A are zero until B is not: from the second step on."""
    paths = lora_run(tmp_path, models[case], chat, LORA, ranks=1, max_steps=STEPS, **STEADY)
    (steps,) = run_training(paths, 1, function=train_and_keep_adapters)
    expect_curve(paths, expected[case].curve)
    for target, _ in wrapped(models[case]):
        for step in range(2):
            a, b = (torch.from_numpy(steps[step][target.parameter(half)]) for half in ("lora_A", "lora_B"))
            expect_gradient(a, expected[case].gradients[target.parameter("lora_A")][step], nonzero=step > 0)
            whole = torch.stack([in_order(target, own) for own in b.chunk(len(target.modules))], dim=-1)
            expect_gradient(whole.flatten(1), expected[case].gradients[target.parameter("lora_B")][step])


def in_order(target: ExpertTarget, rows: torch.Tensor) -> torch.Tensor:
    """The rows of an expert's B in the order of the files."""
    if target.tensor is not None and target.tensor.endswith("gate_up_proj") and target.transposed:  # gpt-oss
        return torch.stack(rows.chunk(2), dim=1).flatten(0, 1)
    return rows


def expect_gradient(found: torch.Tensor, expected: torch.Tensor, *, nonzero: bool = True) -> None:
    assert bool(expected.any()) == nonzero
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def _cells() -> list[Any]:
    """By default each family once, the second where `test_peft_loads_and_merges_what_is_exported` runs it."""
    cells = [(case, layout) for case in CASES for layout in LAYOUTS]
    return [pytest.param(*cell, marks=pytest.mark.slow) for cell in cells]


@pytest.mark.parametrize(("case", "layout"), _cells())
def test_layouts_follow_peft(
    case: str, layout: str, tmp_path: Path, models: dict[str, Path], chat: Path, expected: dict[str, Expected]
) -> None:
    ranks, topology, settings = LAYOUTS[layout]
    settings = {"max_steps": STEPS, **settings, **STEADY}
    paths = lora_run(tmp_path, models[case], chat, LORA, ranks=ranks, topology=topology, **settings)
    run_training(paths, ranks)
    expect_curve(paths, expected[case].curve)


@pytest.mark.parametrize("case", thinned(CASES, "gpt_oss"))
def test_peft_loads_and_merges_what_is_exported(
    case: str, tmp_path: Path, models: dict[str, Path], chat: Path, expected: dict[str, Expected]
) -> None:
    """From ranks that hold half of the experts each."""
    topology, settings = {"expert_parallel": 2}, {"export_merged": True, "packing": True, **STEADY}
    paths = lora_run(tmp_path, models[case], chat, LORA, ranks=2, topology=topology, max_steps=STEPS, **settings)
    run_training(paths, 2)
    expect_curve(paths, expected[case].curve)
    export_run(paths.root)
    adapter = paths.export / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["target_parameters"] == [
        name if case.startswith("gemma4") else f"mlp.{name}" for name in PARAMETERS
    ]
    base = load_transformers_model(models[case], torch.float32, attn_implementation="eager")
    loaded, ids = peft.PeftModel.from_pretrained(base, adapter).eval(), example_ids(vocab=331)
    tensors, trained = load_file(adapter / "adapter_model.safetensors"), expected[case].trained
    assert tensors.keys() == trained.keys() == adapters_of(loaded).keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-4, atol=1e-5)
    expect_logits(loaded, paths.export, ids)
    assert (hf_logits(paths.export, ids) - hf_logits(models[case], ids)).abs().max() > 0.05
    merged, ours = loaded.merge_and_unload().state_dict(), load_transformers_model(paths.export, torch.float32)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
    added = load_transformers_model(models[case], torch.float32)
    add_adapter(added, adapter)
    for name, tensor in added.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def expect_logits(loaded: Any, merged: Path, ids: torch.Tensor) -> None:
    """A model in PEFT's hands says what the merged one says."""
    with torch.no_grad():
        found, expected = loaded(ids).logits, hf_logits(merged, ids)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def adapters_of(model: Any) -> dict[str, torch.Tensor]:
    """The adapters of a model in PEFT's hands, as files name them."""
    named = {name.replace(".default", ""): own for name, own in model.named_parameters() if ".lora_" in name}
    return {name: own.detach() for name, own in named.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_goes_on_with_other_owners(case: str, tmp_path: Path, models: dict[str, Path], chat: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9}
    topology = {"expert_parallel": 2}
    full = lora_run(tmp_path / "full", models[case], chat, LORA, ranks=2, topology=topology, **settings)
    run_training(full, 2)
    paths = lora_run(tmp_path / "other", models[case], chat, LORA, ranks=1, **settings)
    expect_same_end(full, paths, 1)


def test_one_of_the_two_tensors_alone(tmp_path: Path, models: dict[str, Path], chat: Path) -> None:
    """PEFT then has one wrapper, whichever it is."""
    lora = LoraSpec(rank=2, targets=["experts.gate_up_proj"])
    paths = lora_run(tmp_path, models["gpt_oss"], chat, lora, ranks=1, max_steps=2, export_merged=True)
    run_training(paths, 1)
    export_run(paths.root)
    base = load_transformers_model(models["gpt_oss"], torch.float32, attn_implementation="eager")
    loaded, ids = peft.PeftModel.from_pretrained(base, paths.export / "adapter").eval(), example_ids(vocab=331)
    expect_logits(loaded, paths.export, ids)
    found, source = weights(paths.export), weights(models["gpt_oss"])
    changed = {name for name in source if not torch.equal(found[name], source[name])}
    assert changed == {f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(4)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT looks for modules of these names
@pytest.mark.parametrize("published", [True, False])
def test_those_inside_a_multimodal_model(published: bool, tmp_path: Path, chat: Path) -> None:
    """Qwen3.5 as it is published, or as transformers writes it, each expert by itself: what is adapted has the names of
    its language model's modules. In the second form PEFT was seen to pass over the adapters of all experts."""
    model = family_model(tmp_path / "model", "qwen3_5_moe")
    model = as_published(model) if published else model
    paths = lora_run(tmp_path, model, chat, LORA, ranks=1, max_steps=2, export_merged=True)
    run_training(paths, 1)
    export_run(paths.root)
    base, ids = load_transformers_model(model, torch.float32, attn_implementation="eager"), example_ids(vocab=331)
    loaded = peft.PeftModel.from_pretrained(base, paths.export / "adapter").eval()
    names = load_file(paths.export / "adapter" / "adapter_model.safetensors").keys()
    assert adapters_of(loaded).keys() == names
    assert "base_model.model.model.language_model.layers.0.mlp.experts.base_layer.lora_A.weight" in names
    expect_logits(loaded, paths.export, ids)
    added = load_transformers_model(model, torch.float32)
    add_adapter(added, paths.export / "adapter")
    expect_logits(added.eval(), paths.export, ids)


def test_adapters_over_published_files_are_merged_into_bf16(tmp_path: Path, chat: Path) -> None:
    """The matrices are square: a transpose would fit. What is added is PEFT's product, on numbers dequantized."""
    directory = quantized(family_model(tmp_path / "model", "gpt_oss", **SIZES))
    settings = {"export_merged": True, "precision": "bf16"}
    paths = lora_run(tmp_path, directory, chat, LORA, ranks=1, max_steps=2, **settings)
    run_training(paths, 1)
    export_run(paths.root)
    base = load_transformers_model(directory, torch.float32)
    merged = peft.PeftModel.from_pretrained(base, paths.export / "adapter").merge_and_unload().state_dict()
    start = load_transformers_model(directory, torch.float32).state_dict()
    found = weights(paths.export)
    assert found.keys() == merged.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, merged[name].to(tensor.dtype)), name
        assert (".experts." in name and "bias" not in name) <= (not torch.equal(merged[name], start[name])), name


def test_two_adapters_as_one_of_the_matrix_that_holds_both() -> None:
    gate, up = (AdapterTensors(torch.randn(2, 3), torch.randn(5, 2)) for _ in range(2))
    both = of_both(gate, up)
    torch.testing.assert_close(both.b @ both.a, torch.cat([gate.b @ gate.a, up.b @ up.a]))


def test_the_expert_changes_fastest_in_b() -> None:
    of_expert = [[torch.randn(2, 3), torch.randn(5, 2)] for _ in range(4)]
    adapters = [AdapterTensors(a, b) for a, b in of_expert]
    whole = joined(adapters)
    assert (whole.a.shape, whole.b.shape) == ((8, 3), (5, 8))
    assert whole.b[4, 1 * 4 + 3] == adapters[3].b[4, 1]
    for one, other in zip(separated(whole, 4), adapters, strict=True):
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)


@pytest.mark.parametrize(
    ("lora", "topology", "said"),
    [
        (LORA, {"tensor_parallel": 2}, "set topology.expert_tensor_parallel to 1"),
        (
            LoraSpec(rank=2, dora=True),
            {},
            "model.lora.dora: adapters of experts (experts.gate_up_proj, experts.down_proj)",
        ),
        (LoraSpec(rank=2, targets=["gate_up_proj"]), {}, "v_proj, o_proj, experts.gate_up_proj, experts.down_proj"),
    ],
)
def test_what_adapters_of_experts_cannot_do_is_refused(
    lora: LoraSpec, topology: dict[str, Any], said: str, tmp_path: Path, models: dict[str, Path], chat: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    paths = lora_run(tmp_path, models["gpt_oss"], chat, lora, ranks=2, topology=topology)
    assert main(["prepare", str(paths.config)]) == ExitCode.BAD_INPUT
    assert said in capfd.readouterr().err
