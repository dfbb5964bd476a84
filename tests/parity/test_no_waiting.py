"""No step reads a tensor on the host, which on a GPU would wait for the device (measured there by tests/gpu).

On a CPU such a read is an operation like others: `_local_scalar_dense`, which is behind item(), float(), bool(), int(),
tolist() of single values and format(). From the third step on it raises.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sft.engine.module
from launcher.contract.exit_codes import ExitCode
from sft.training.trainer import train
from tests.parity.runs import make_run
from tests.ranks import RankFailure, run_ranks
from tests.tiny_model import make_material

pytestmark = pytest.mark.parity

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise AssertionError(f"a step reads a tensor on the host: {func}")
        return func(*args, **(kwargs or {}))


def train_without_reads(config: Path, reading: bool = False) -> ExitCode:
    """Runs on a rank."""
    training_step = sft.engine.module.SFTGPT.training_step

    def step(self: sft.engine.module.SFTGPT, batch: Any, batch_idx: int) -> None:
        if batch_idx < 2:
            return training_step(self, batch, batch_idx)
        with _NoReads():
            training_step(self, batch, batch_idx)
            if reading:
                assert self.last_step is not None
                float(self.last_step.loss)
        return None

    sft.engine.module.SFTGPT.training_step = step  # type: ignore[method-assign]
    return train(config)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 40)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_no_step_reads_a_tensor(packing: bool, tmp_path: Path, material: tuple[Path, Path]) -> None:
    settings = {"kernels": "fused", "precision": "bf16", "packing": packing, "spike_factor": 100.0}
    paths = make_run(tmp_path, *material, ranks=1, max_steps=4, **settings)
    assert run_ranks(1, train_without_reads, paths.config) == [ExitCode.OK]


def test_a_read_is_found(tmp_path: Path, material: tuple[Path, Path]) -> None:
    paths = make_run(tmp_path, *material, ranks=1, max_steps=4, kernels="fused", precision="bf16")
    with pytest.raises(RankFailure, match="a step reads a tensor on the host"):
        run_ranks(1, train_without_reads, paths.config, True)
