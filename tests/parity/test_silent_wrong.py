"""Places where Megatron-core gives wrong numbers without an error, each avoided by a setting or fixed by a patch.

Each patch or setting is also taken out once, to see that the wrong result is still there: when one of these tests
fails after an upgrade, the patch can go. sft.megatron.patches.catalogue says which test belongs to which patch.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sft.megatron.config
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import read_resolved
from launcher.contract.topology import build_topology
from sft.megatron.config import transformer_config
from sft.megatron.core import DistributedOptimizer, TransformerConfig, parallel_state
from sft.megatron.kernel_choice import choose_kernels
from sft.megatron.patches import adamw_state
from sft.models.registry import read_architecture
from sft.training.trainer import train
from tests.parity.runs import curve, make_run, run_training
from tests.ranks import RankFailure, run_ranks
from tests.tiny_model import make_material

pytestmark = pytest.mark.parity

INTERLEAVED = {"pipeline_parallel": 2, "virtual_pipeline": 2}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 36)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]) -> RunPaths:
    """Five steps on one rank, a checkpoint after the third."""
    paths = make_run(tmp_path_factory.mktemp("plain"), *material, ranks=1, every=3, keep_last=9)
    run_training(paths, 1)
    return paths


def test_s1_two_stage_interleaving_is_right(tmp_path: Path, material: tuple[Path, Path], plain: RunPaths) -> None:
    paths = make_run(tmp_path, *material, ranks=2, topology=INTERLEAVED)
    run_training(paths, 2)
    assert curve(paths)[0] == pytest.approx(curve(plain)[0], rel=1e-5)


def test_s1_batched_sends_would_be_wrong(tmp_path: Path, material: tuple[Path, Path], plain: RunPaths) -> None:
    paths = make_run(tmp_path, *material, ranks=2, topology=INTERLEAVED)
    assert run_training(paths, 2, function=train_with_batched_sends) == [ExitCode.OK] * 2
    assert abs(curve(paths)[1][0] / curve(plain)[1][0] - 1) > 1e-2


def train_with_batched_sends(config: Path) -> ExitCode:
    """Runs on a rank: Megatron-core's default for the interleaved schedule."""
    settings = sft.megatron.config._parallel_settings
    batched = {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    sft.megatron.config._parallel_settings = lambda *args: settings(*args) | batched
    return train(config)


def test_s2_gloo_keeps_stage_outputs(material: tuple[Path, Path]) -> None:
    """The wrong result itself is a race; what avoids it is this setting."""
    assert not megatron_config(material, on_gpu=False).deallocate_pipeline_outputs
    assert megatron_config(material, on_gpu=True).deallocate_pipeline_outputs


def test_s3_resume_of_distributed_optimizer_is_right(
    tmp_path: Path, material: tuple[Path, Path], plain: RunPaths
) -> None:
    paths = resumed(tmp_path, material, plain)
    run_training(paths, 1)
    assert curve(paths) == curve(plain)


def test_s3_shared_steps_would_be_wrong(tmp_path: Path, material: tuple[Path, Path], plain: RunPaths) -> None:
    paths = resumed(tmp_path, material, plain)
    assert run_training(paths, 1, function=train_with_shared_steps) == [ExitCode.OK]
    assert abs(curve(paths)[0][4] - curve(plain)[0][4]) > 1e-4


@pytest.mark.parametrize("function", ["train_without_priming", "train_without_own_copy"])
def test_s3_load_would_fail(function: str, tmp_path: Path, material: tuple[Path, Path], plain: RunPaths) -> None:
    paths = resumed(tmp_path, material, plain)
    with pytest.raises(RankFailure):
        run_training(paths, 1, function=globals()[function])


def train_with_shared_steps(config: Path) -> ExitCode:
    """Runs on a rank."""
    adamw_state.unshare_steps = lambda optimizer: None
    return train(config)


def train_without_priming(config: Path) -> ExitCode:
    """Runs on a rank."""
    adamw_state.prime_states = lambda optimizer: None
    return train(config)


def train_without_own_copy(config: Path) -> ExitCode:
    """Runs on a rank: Megatron-core's own way to copy loaded states, which looks for torch's `step` among them."""

    def stock(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        for key in {"param": main_param, **self.optimizer.state[main_param]}:
            tensors[key]

    DistributedOptimizer._set_main_param_and_optimizer_states = stock
    return train(config)


def test_s4_fused_cross_entropy_is_off(material: tuple[Path, Path]) -> None:
    """It rounds the gradient to bf16, which is 3e-3 off in fp32."""
    assert not megatron_config(material, on_gpu=True).cross_entropy_loss_fusion
    assert run_ranks(1, fused_gradient_is_rounded, init=True) == [True]


def fused_gradient_is_rounded() -> bool:
    """Runs on a rank: whether Megatron-core's fused cross-entropy gives bf16 numbers for fp32 logits."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel()
    logits = torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
    group = parallel_state.get_tensor_model_parallel_group()
    fused_vocab_parallel_cross_entropy(logits, labels, group).sum().backward()
    gradient = logits.grad
    return gradient is not None and torch.equal(gradient, gradient.bfloat16().float())


def megatron_config(material: tuple[Path, Path], *, on_gpu: bool) -> TransformerConfig:
    """The configuration of an interleaved run."""
    model, chat = material
    paths = make_run(chat.parent, model, chat, ranks=2, topology=INTERLEAVED, name="config-only")
    spec, architecture = read_resolved(paths.config), read_architecture(model)
    kernels = choose_kernels(spec, architecture, on_gpu=on_gpu)
    return transformer_config(spec, architecture, build_topology(spec, architecture.shape), kernels, on_gpu=on_gpu)


def resumed(root: Path, material: tuple[Path, Path], plain: RunPaths) -> RunPaths:
    """A run that stands after the third step of `plain`."""
    paths = make_run(root, *material, ranks=1, every=3, keep_last=9)
    shutil.copytree(plain.checkpoint(3), paths.checkpoint(3))
    shutil.copy(plain.metrics, paths.metrics)
    return paths
