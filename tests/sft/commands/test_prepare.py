"""What `python -m sft prepare` refuses before a rank is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.contract.errors import ConfigError
from launcher.contract.spec import DataSpec, ModelSpec, OptimizerSpec, RunSpec, TrainSpec, to_yaml
from sft.commands.prepare import prepare
from tests.tiny_model import make_material


def test_a_schedule_that_the_steps_of_the_epochs_are_too_few_for(tmp_path: Path) -> None:
    """Its arithmetic is known when the examples are counted: 2 epochs of 10 examples, 4 a step, have 6 steps."""
    model, rows = make_material(tmp_path, 10)

    def prepare_with(**optimizer: int) -> None:
        spec = RunSpec(
            name="run",
            model=ModelSpec(path=str(model), init="random"),
            data=DataSpec(train=[str(rows)], seq_length=128, workers=1),
            train=TrainSpec(epochs=2, global_batch_size=4, optimizer=OptimizerSpec(lr=1e-3, **optimizer)),
        )
        (tmp_path / "config.yaml").write_text(to_yaml(spec))
        prepare(tmp_path / "config.yaml")

    prepare_with(warmup_steps=6)
    with pytest.raises(ConfigError) as caught:
        prepare_with(warmup_steps=10)
    assert list(caught.value.problems) == [
        "train.optimizer.warmup_steps: 10 is more than the 6 steps of the run, whose last would have a learning rate "
        "of 0.0005 in place of 0.001; lower it, or give train.optimizer.warmup_ratio (train.epochs 2 comes to 6 steps)"
    ]
