"""On one CUDA device: kernels compile where their sources are in a run's archive of code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launcher.contract.resources import checkout_root
from launcher.contract.spec import RunSpec
from launcher.submission.code_snapshot import take_snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

PROGRAM = """
import torch
from sft.kernels import norm
from sft.kernels.triton import norm as triton_norm

x, weight = torch.randn(64, 512, device="cuda").bfloat16(), torch.rand(512, device="cuda").bfloat16()
expected = torch.nn.functional.rms_norm(x.double(), (512,), weight.double(), 1e-5)
assert (norm.rms_norm(x, weight, 1e-5).double() - expected).norm() < 5e-3 * expected.norm()
print(triton_norm.__file__)
"""


@pytest.mark.skipif(checkout_root() is None, reason="only a checkout is packed")
def test_a_kernel_is_compiled_from_the_archive(tmp_path: Path) -> None:
    archive = tmp_path / "code.zip"
    take_snapshot(RunSpec(), archive)
    environment = {**os.environ, "PYTHONPATH": str(archive), "TRITON_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{archive}/sft/kernels/triton/norm.py\n"), done.stderr
