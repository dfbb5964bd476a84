"""Which attention kernel a run gets. The GPU is simulated: the rule reads only its name and numbers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from launcher.contract.errors import ModelError
from sft.kernels import attention
from sft.megatron.kernel_choice import attention_kernel, choose_kernels
from sft.models.registry import read_architecture
from tests.sft.hf_cases import run_spec, save_config
from tests.tiny_model import make_tiny_model


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(attention, "has_flash4", lambda: True)


@pytest.mark.parametrize(
    ("head_dim", "kernel"),
    [(64, "flash4"), (96, "flash4"), (128, "flash4"), (72, "flash2"), (80, "flash2"), (112, "flash2"), (256, "flash2")],
)
@pytest.mark.usefixtures("hopper")
def test_heads_with_wrong_gradients_do_not_go_to_flash4(head_dim: int, kernel: str) -> None:
    assert attention.fastest_kernel(head_dim) == kernel


@pytest.mark.usefixtures("hopper")
def test_flash4_is_not_for_runs_that_must_be_repeatable() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert attention.fastest_kernel(128) == "flash2"
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_gpu_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention.fastest_kernel(128) == "flash2"


@pytest.mark.usefixtures("hopper")
def test_asked_for_by_name_it_is_refused(tmp_path: Path) -> None:
    spec = run_spec(make_tiny_model(tmp_path / "model"), 1)
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, attention="flash4"))
    architecture = read_architecture(Path(spec.model.path))

    def kernel(head_dim: int) -> str:
        shape = dataclasses.replace(architecture.shape, head_dim=head_dim)
        return attention_kernel(spec, dataclasses.replace(architecture, shape=shape))

    assert kernel(64) == "flash4"
    with pytest.raises(ModelError, match="takes heads of 32, 64, 96 or 128; this model's are 80"):
        kernel(80)


@pytest.mark.usefixtures("hopper")
def test_plain_layers_refuse_it(tmp_path: Path) -> None:
    """They have no place for it, and trained with torch's attention."""
    spec = run_spec(save_config("llama", tmp_path), 1)
    architecture = read_architecture(tmp_path)
    for kernels, dropout, why in (("plain", 0.0, "kernels are plain here"), ("fused", 0.1, "model.hidden_dropout")):
        train = dataclasses.replace(spec.train, attention="flash4", kernels=kernels)  # type: ignore[arg-type]
        own = dataclasses.replace(spec, train=train, model=dataclasses.replace(spec.model, hidden_dropout=dropout))
        with pytest.raises(ModelError, match=f"is a kernel of fused layers, and .*{why}; set it to auto"):
            choose_kernels(own, architecture, on_gpu=True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kernel", ["flash2", "flash4"])
def test_a_kernel_that_would_compute_nothing_is_refused(tmp_path: Path, kernel: str) -> None:
    """Padded rows without a window were trained with torch's attention, whichever was asked for."""
    spec = run_spec(make_tiny_model(tmp_path / "model", head_dim=64), 1)
    train = dataclasses.replace(spec.train, attention=kernel, kernels="fused", precision="bf16")  # type: ignore[arg-type]
    spec = dataclasses.replace(spec, train=train, data=dataclasses.replace(spec.data, packing=False))
    architecture = read_architecture(Path(spec.model.path))
    with pytest.raises(ModelError, match=rf"attention {kernel} would compute nothing: rows are neither packed, nor"):
        choose_kernels(spec, architecture, on_gpu=True)
    packed = dataclasses.replace(spec, data=dataclasses.replace(spec.data, packing=True))
    assert f"attention {kernel}" in choose_kernels(packed, architecture, on_gpu=True).describe()
    plain = dataclasses.replace(packed, train=dataclasses.replace(train, kernels="plain"))
    with pytest.raises(ModelError, match=f"attention {kernel} is a kernel of fused layers, and kernels are plain here"):
        choose_kernels(plain, architecture, on_gpu=True)


@pytest.mark.usefixtures("hopper")
def test_capped_scores_go_to_flash4_or_to_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is asked for by name and has no gradients of them, that is said; else the run's log names none."""
    monkeypatch.setattr(attention, "flash4_has_gradients_of", lambda option: option != "softcap")
    spec = run_spec(save_config("gemma2", tmp_path), 1)
    spec = dataclasses.replace(
        spec,
        train=dataclasses.replace(spec.train, kernels="fused"),
        data=dataclasses.replace(spec.data, packing=True),
    )
    architecture = read_architecture(tmp_path)
    shape = dataclasses.replace(architecture.shape, head_dim=128)
    architecture = dataclasses.replace(architecture, shape=shape)
    assert "attention torch's" in choose_kernels(spec, architecture, on_gpu=True).describe()
    by_name = dataclasses.replace(spec, train=dataclasses.replace(spec.train, attention="flash4"))
    with pytest.raises(ModelError, match="has no gradients of scores that are capped by tanh"):
        attention_kernel(by_name, architecture)
    monkeypatch.setattr(attention, "flash4_has_gradients_of", lambda option: option == "softcap")
    assert attention_kernel(by_name, architecture) == "flash4"
    unpacked = dataclasses.replace(spec, data=dataclasses.replace(spec.data, packing=False, seq_length=8))
    for each in (spec, unpacked):
        assert "attention flash4" in choose_kernels(each, architecture, on_gpu=True).describe()


@pytest.mark.usefixtures("hopper")
def test_heads_that_no_kernel_takes_go_to_torchs(tmp_path: Path) -> None:
    """By kind of layer. That reads lengths on the host, which CUDA graphs cannot."""
    for size, text in ((128, "attention flash4,"), (512, "attention flash2 (torch's for heads of 512),")):
        spec = run_spec(save_config("gemma4_text", tmp_path, head_dim=64, global_head_dim=size), 1, "bf16")
        train = dataclasses.replace(spec.train, kernels="fused")
        spec = dataclasses.replace(spec, train=train, data=dataclasses.replace(spec.data, packing=True))
        kernels = choose_kernels(spec, read_architecture(tmp_path), on_gpu=True)
        assert text in kernels.describe()
        assert kernels.graphs is (size == 128)
    by_name = dataclasses.replace(spec, train=dataclasses.replace(train, attention="flash4"))
    with pytest.raises(ModelError, match="this model's are 64 and 512"):
        attention_kernel(by_name, read_architecture(tmp_path))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("length", "text"), [(25, "attention flash2"), (24, "attention torch's")])
def test_padded_rows_longer_than_a_window_go_to_the_kernel(length: int, text: str, tmp_path: Path) -> None:
    spec = run_spec(save_config("mistral", tmp_path), 1)
    spec = dataclasses.replace(
        spec,
        train=dataclasses.replace(spec.train, kernels="fused"),
        data=dataclasses.replace(spec.data, seq_length=length),
    )
    assert text in choose_kernels(spec, read_architecture(tmp_path), on_gpu=True).describe()


def test_half_installed_flash4_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler is another package: where that is missing, the import fails that find_spec does not try."""
    package = tmp_path / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("import the_compiler_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    attention.broken_flash4.cache_clear()
    try:
        assert not attention.has_flash4()
        assert attention.broken_flash4() == "ModuleNotFoundError: No module named 'the_compiler_that_is_missing'"
        spec = run_spec(make_tiny_model(tmp_path / "model"), 1)
        spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, attention="flash4"))
        with pytest.raises(ModelError, match=r"which cannot be imported .*the_compiler_that_is_missing"):
            attention_kernel(spec, read_architecture(Path(spec.model.path)))
    finally:
        attention.broken_flash4.cache_clear()
        sys.modules.pop("flash_attn", None)


@pytest.mark.usefixtures("hopper")
def test_sinks_go_to_flash4_where_it_trains_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions take sinks, too, and would leave them as they are."""
    spec = run_spec(save_config("gpt_oss", tmp_path, head_dim=64), 1)
    by_name = dataclasses.replace(spec, train=dataclasses.replace(spec.train, attention="flash4"))
    architecture = read_architecture(tmp_path)
    monkeypatch.setattr(attention, "flash4_has_gradients_of", lambda option: option == "learnable_sink")
    assert attention_kernel(spec, architecture) == attention_kernel(by_name, architecture) == "flash4"
    monkeypatch.setattr(attention, "flash4_has_gradients_of", lambda option: option != "learnable_sink")
    assert attention_kernel(spec, architecture) == "flash2"
    with pytest.raises(ModelError, match="no gradients of this model's trained sinks"):
        attention_kernel(by_name, architecture)
