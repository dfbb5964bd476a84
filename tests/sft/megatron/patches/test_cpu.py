"""The rewriting of Megatron-core finds what it found in the releases it was tried with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sft.megatron import core
from sft.megatron.patches import cpu

NAMES = (
    "current_device",
    "device_literal",
    "synchronize",
    "tensor_type",
    "to_cuda",
    "current_stream",
    "rng_state",
    "device_type",
    "manual_seed",
    "rng_of_device",
    "autocast",
    "jit_fuser",
    "rng_warning",
)
EXPECTED_HITS = {
    "0.16.1": (116, 43, 19, 13, 9, 8, 8, 7, 3, 2, 2, 1, 1),
    "0.17.1": (144, 44, 21, 13, 10, 7, 8, 8, 3, 2, 2, 1, 1),
    "0.18.2": (136, 46, 24, 13, 10, 12, 8, 8, 3, 2, 2, 1, 1),
    "0.19.2": (150, 48, 25, 13, 10, 16, 8, 8, 3, 2, 2, 1, 1),
}
"""Rewrites while importing what sft.megatron.core imports, by version of Megatron-core and in the order of NAMES."""

needs_rewriting = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is rewritten where CUDA exists")


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)


@needs_rewriting
@pytest.mark.skipif(core.__version__ not in EXPECTED_HITS, reason=f"nobody has counted in {core.__version__}")
def test_each_idiom_is_found_as_often_as_when_it_was_counted() -> None:
    found = run("import json, sft.megatron.core; from sft.megatron.patches.cpu import hits; print(json.dumps(+hits))")
    assert json.loads(found.stdout) == dict(zip(NAMES, EXPECTED_HITS[core.__version__], strict=True)), found.stderr


@needs_rewriting
def test_late_installation_is_refused() -> None:
    found = run("import megatron.core\nfrom sft.megatron.patches import cpu\ncpu.install()")
    assert "was imported before sft.megatron.core; import Megatron-core only through sft.megatron.core" in found.stderr


@needs_rewriting
def test_installed_files_and_their_caches_stay_as_they_are() -> None:
    """A program that does not use sft gets Megatron-core's own code, also after sft has run."""
    run("import sft.megatron.core")
    name = "r._get_cuda_rng_state.__code__.co_names"
    found = run(f"import megatron.core.tensor_parallel.random as r; print('cuda' in {name})")
    assert found.stdout.strip() == "True"


def test_rewrites_have_names_of_their_own() -> None:
    names = [rewrite.name for rewrite in cpu.REWRITES]
    assert len(set(names)) == len(names)
