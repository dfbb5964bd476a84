"""What `python -m sft prepare` refuses or tells before a rank is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import ConfigError, DataError
from launcher.contract.spec import DataSpec, ModelSpec, OptimizerSpec, RunSpec, TrainSpec, to_yaml
from sft.commands.prepare import prepare
from tests.tiny_model import CHAT_TEMPLATE, make_material


def test_a_schedule_that_the_steps_of_the_epochs_are_too_few_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its arithmetic is known when the examples are counted: 2 epochs of 10 examples, 4 a step, have 6 steps."""
    model, rows = make_material(tmp_path, 10)

    def prepare_with(**optimizer: Any) -> None:
        spec = RunSpec(
            name="run",
            model=ModelSpec(path=str(model), init="random"),
            data=DataSpec(train=[str(rows)], seq_length=128, workers=1),
            train=TrainSpec(epochs=2, global_batch_size=4, optimizer=OptimizerSpec(lr=1e-3, **optimizer)),
        )
        (tmp_path / "config.yaml").write_text(to_yaml(spec))
        prepare(tmp_path / "config.yaml")

    prepare_with(warmup_steps=6)
    assert "warm-up" not in capsys.readouterr().out
    prepare_with(warmup_steps=10)
    said = "warm-up of 10 steps is longer than the run of 6, whose last has a learning rate of 0.0005 in place of 0.001"
    assert said in capsys.readouterr().out
    with pytest.raises(ConfigError) as caught:
        prepare_with(schedule="wsd", warmup_steps=4, wsd_steps=3)
    assert list(caught.value.problems) == [
        "train.optimizer.wsd_steps: 3 is more than the 2 steps after the warm-up (train.epochs 2 comes to 6 steps)"
    ]


def test_the_template_of_the_data_is_kept(tmp_path: Path) -> None:
    model, rows = make_material(tmp_path, 10)
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE)
    spec = RunSpec(
        name="run",
        model=ModelSpec(path=str(model), init="random"),
        data=DataSpec(train=[str(rows)], seq_length=128, workers=1, chat_template=str(template)),
        train=TrainSpec(max_steps=1, global_batch_size=4),
    )
    (tmp_path / "config.yaml").write_text(to_yaml(spec))
    prepare(tmp_path / "config.yaml")
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_an_ignored_key_of_one_held_out_set_alone(tmp_path: Path) -> None:
    model, rows = make_material(tmp_path, 10)
    held = tmp_path / "held.jsonl"
    held.write_text(rows.read_text().replace('{"messages"', '{"context": "c", "messages"'))

    def prepare_with(*ignored: str) -> None:
        data = {"train": [str(rows)], "validation_sets": {"held": str(held)}, "ignore_keys": list(ignored)}
        spec = RunSpec(
            name="run",
            model=ModelSpec(path=str(model), init="random"),
            data=DataSpec(**data, seq_length=128, workers=1),
            train=TrainSpec(max_steps=1, global_batch_size=4),
        )
        (tmp_path / "config.yaml").write_text(to_yaml(spec))
        prepare(tmp_path / "config.yaml")

    prepare_with("context")
    with pytest.raises(DataError, match=r"data\.ignore_keys: no row has a key 'contxt' .*; did you mean 'context'"):
        prepare_with("context", "contxt")
