"""Kinds of GPU with their peaks, memory and links. gpu_kinds.yaml has the figures and their sources."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import yaml

from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.resources import packaged

_FILE = "gpu_kinds.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuKind:
    """One kind of GPU. Rates are in TFLOP/s and GB/s (10^9 bytes/s), those of links for one direction of one GPU."""

    name: str
    names: tuple[str, ...]
    """Regular expressions found in the name that torch and nvidia-smi report."""
    bf16_tflops: float
    """Dense peak of bf16 matrix products."""
    fp8_tflops: float | None = None
    """Dense peak of fp8 matrix products. None: the kind has none."""
    matmul_efficiency: float
    """Part of the peak that large matrix products reach."""
    memory_gib: float
    memory_bandwidth: float
    memory_efficiency: float
    """Part of the memory bandwidth that elementwise kernels reach."""
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    collective_efficiency: float
    """Part of the links' bandwidth that large collectives reach."""


@functools.cache
def gpu_kinds() -> tuple[GpuKind, ...]:
    """Return all kinds, in the order in which `match_gpu` tries them."""
    values = yaml.safe_load(packaged(_FILE))
    return tuple(
        GpuKind(name=name, **{**figures, "names": tuple(figures["names"])}) for name, figures in values.items()
    )


def gpu_kind(name: str) -> GpuKind:
    """Return the kind of this name, or raise ConfigError that lists the known ones."""
    known = {kind.name: kind for kind in gpu_kinds()}
    if name not in known:
        raise ConfigError(f"{name!r} is not a known kind of GPU{did_you_mean(name, known)}; known: {', '.join(known)}")
    return known[name]


def match_gpu(reported: str) -> GpuKind | None:
    """Return the first kind whose names match the output of torch.cuda.get_device_name() or nvidia-smi, if one does."""
    for kind in gpu_kinds():
        if any(re.search(pattern, reported, re.IGNORECASE) for pattern in kind.names):
            return kind
    return None
