"""The rewriting of Megatron-core is pinned to the release it was written for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sft.megatron import core
from sft.megatron.patches import cpu

EXPECTED_HITS = {
    "current_device": 116,
    "device_literal": 43,
    "synchronize": 19,
    "tensor_type": 13,
    "to_cuda": 9,
    "current_stream": 8,
    "rng_state": 8,
    "device_type": 7,
    "manual_seed": 3,
    "rng_of_device": 2,
    "autocast": 2,
    "jit_fuser": 1,
    "rng_warning": 1,
}
"""Rewrites while importing all that sft.megatron.core imports, under Megatron-core 0.16.1."""

needs_rewriting = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is rewritten where CUDA exists")


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)


@needs_rewriting
@pytest.mark.skipif(core.__version__ != "0.16.1", reason=f"counts are of 0.16.1, this is {core.__version__}")
def test_each_idiom_is_found_as_often_as_in_the_pinned_release() -> None:
    found = run("import json, sft.megatron.core; from sft.megatron.patches.cpu import hits; print(json.dumps(+hits))")
    assert json.loads(found.stdout) == EXPECTED_HITS, found.stderr


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
