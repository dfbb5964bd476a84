"""Some layers of each pipeline stage computed again, and no others: the same training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.megatron.core import TransformerLayer
from sft.megatron.layers.fused import FusedTransformerLayer
from sft.training.trainer import train
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.tiny_model import make_material

pytestmark = pytest.mark.parity

STEPS = 3
MICRO_BATCHES = 4
OF_STAGES = {"pipeline_parallel": 2}
OF_CHUNKS = {"pipeline_parallel": 2, "virtual_pipeline": 2}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 40)


def train_and_count(config: Path) -> Counter[int]:
    """Train, and return how often each layer of this rank was computed with gradients, by its number from 1."""
    calls: Counter[int] = Counter()
    for kind in (TransformerLayer, FusedTransformerLayer):
        forward = kind.forward

        def counted(self: Any, *args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            if self.training:
                calls[self.layer_number] += 1
            return _forward(self, *args, **kwargs)

        kind.forward = counted  # type: ignore[method-assign]
    train(config)
    return calls


@pytest.mark.parametrize("kernels", ["plain", "fused"])
@pytest.mark.parametrize(
    ("ranks", "topology", "layers", "again"),
    [
        (1, {}, 3, {1, 2, 3}),
        (1, {}, 4, {1, 2, 3, 4}),
        (2, OF_STAGES, 1, {1, 3}),
        pytest.param(2, OF_CHUNKS, 1, {1, 2, 3, 4}, marks=pytest.mark.slow),
    ],
)
def test_the_first_layers_of_each_stage_are_computed_twice(
    ranks: int,
    topology: dict[str, int],
    layers: int,
    again: set[int],
    kernels: str,
    tmp_path: Path,
    material: tuple[Path, Path],
) -> None:
    settings = {"max_steps": STEPS, "global_batch_size": MICRO_BATCHES, "kernels": kernels}
    paths = make_run(
        tmp_path, *material, ranks=ranks, topology=topology, recompute="full", recompute_layers=layers, **settings
    )
    counts = sum(run_training(paths, ranks, function=train_and_count), Counter())
    once = STEPS * MICRO_BATCHES
    assert counts == {layer: once * (2 if layer in again else 1) for layer in range(1, 5)}
    expected = reference_curve(tmp_path / "reference", *material, steps=STEPS, global_batch_size=MICRO_BATCHES)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=2e-5)


def test_adapters_of_layers_that_are_kept_get_gradients(tmp_path: Path, material: tuple[Path, Path]) -> None:
    """Frozen embeddings give no gradient to the first layers, which are recomputed."""
    from launcher.contract.spec import LoraSpec
    from tests.parity.test_lora import lora_run

    found = []
    for name, layers in (("all", None), ("some", 2)):
        settings: dict[str, Any] = {"ranks": 1, "recompute": "full", "recompute_layers": layers, "max_steps": STEPS}
        paths = lora_run(tmp_path, *material, LoraSpec(rank=4), name=name, **settings)
        run_training(paths, 1)
        found.append(curve(paths))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert torch.tensor(found[0][1]).min() > 0
