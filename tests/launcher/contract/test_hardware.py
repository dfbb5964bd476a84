"""GPU kinds are recognised by the names that drivers report."""

from __future__ import annotations

import pytest

from launcher.contract.errors import ConfigError
from launcher.contract.hardware import gpu_kind, gpu_kinds, match_gpu


@pytest.mark.parametrize(
    ("reported", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_reported_names(reported: str, kind: str | None) -> None:
    found = match_gpu(reported)
    assert (found.name if found else None) == kind


def test_figures_make_sense() -> None:
    for kind in gpu_kinds():
        assert gpu_kind(kind.name) is kind
        assert 0.5 < kind.matmul_efficiency < 1
        assert kind.inter_node_bandwidth < kind.intra_node_bandwidth < kind.memory_bandwidth
        assert kind.fp8_tflops is None or 1.9 * kind.bf16_tflops < kind.fp8_tflops < 2.1 * kind.bf16_tflops


def test_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^'h10' is not a known kind of GPU; did you mean 'h100'\?; known: h200, "):
        gpu_kind("h10")
