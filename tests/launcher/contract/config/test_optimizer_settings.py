"""Rules about the learning rate: what has no effect or cannot be is refused, with the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.contract.config.checks import spec_problems
from launcher.contract.config.conversion import typed_spec
from launcher.contract.config.yaml_leaves import read_yaml
from launcher.contract.spec import DataSpec, OptimizerSpec, RunSpec, TrainSpec, read_resolved, to_yaml
from launcher.contract.steps import warmup_remark

PREFIX = "train.optimizer."


def problems(steps: int | None = 100, **optimizer: Any) -> list[tuple[str, str]]:
    length: dict[str, Any] = {"epochs": 1.5} if steps is None else {"max_steps": steps}
    train = TrainSpec(**length, optimizer=OptimizerSpec(**optimizer))
    spec = RunSpec(name="run", data=DataSpec(train=["chat.jsonl"]), train=train)
    return [(key.removeprefix(PREFIX), text) for key, text in spec_problems(spec) if key.startswith(PREFIX)]


def test_rates_by_name_and_words_for_all_layers_are_read_from_yaml(tmp_path: Path) -> None:
    """The order of patterns counts, also in the run's own config."""
    text = """
train:
  epochs: 2.5
  optimizer:
    lr_by_name: {"*.layers.1.*": 1e-6, "*": 0, "*.embed_tokens.*": 3.0e-5}
model: {lora: {rank: 4, targets: all-linear}}
"""
    leaves = read_yaml(text, "cfg.yaml", RunSpec, "file")
    spec = typed_spec(leaves)
    assert leaves.problems == []
    (tmp_path / "config.yaml").write_text(to_yaml(spec))
    for read in (spec, read_resolved(tmp_path / "config.yaml")):
        assert list(read.train.optimizer.lr_by_name.items()) == [
            ("*.layers.1.*", "1e-6"),
            ("*", "0"),
            ("*.embed_tokens.*", "3.0e-5"),
        ]
        assert (read.train.epochs, read.model.lora.targets, read.model.lora.names) == (2.5, ["all-linear"], [])


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup_ratio": 0.1},
        {"warmup_ratio": 0.1, "decay_steps": 11},
        {"schedule": "wsd"},
        {"schedule": "wsd", "wsd_steps": 95, "wsd_decay": "1-sqrt", "warmup_steps": 5},
        {"schedule": "polynomial", "power": 2.0},
        {"schedule": "inverse_sqrt", "warmup_steps": 5},
        {"schedule": "inverse_sqrt", "warmup_ratio": 0.1},
        {"schedule": "cosine_with_restarts", "cycles": 1},
        {"schedule": "constant", "warmup_steps": 5, "initial_lr": 1e-6},
        {"warmup_ratio": 0.1, "initial_lr": 1e-6},
        {"warmup_steps": 100},
        {"warmup_steps": 101, "decay_steps": 102},
        {"warmup_steps": 101, "steps": None},
        {"warmup_steps": 101},
        {"grad_reduce": "bf16"},
        {"lr_by_name": {"*.embed_tokens.*": "1e-6", "lm_head.*": "0"}},
    ],
)
def test_what_can_be(settings: dict[str, Any]) -> None:
    assert problems(**settings) == []


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        (
            {"warmup_ratio": 0.1, "warmup_steps": 3},
            "warmup_ratio",
            "0.1 and train.optimizer.warmup_steps 3 exclude each other; drop one",
        ),
        (
            {"warmup_ratio": 0.1, "decay_steps": 10},
            "warmup_ratio",
            "0.1 of 100 steps is a warm-up of 10, which train.optimizer.decay_steps 10 includes and must be above",
        ),
        (
            {"warmup_ratio": 0.1, "decay_steps": 50, "steps": None},
            "warmup_ratio",
            "0.1 with train.optimizer.decay_steps needs train.max_steps; give train.optimizer.warmup_steps",
        ),
        ({"warmup_ratio": 1.0}, "warmup_ratio", "1 is not in [0, 1)"),
        ({"wsd_steps": 5}, "wsd_steps", "5 belongs to schedule wsd, and schedule is cosine"),
        ({"wsd_decay": "linear"}, "wsd_decay", "'linear' belongs to schedule wsd, and schedule is cosine"),
        ({"power": 2.0}, "power", "2 belongs to schedule polynomial, and schedule is cosine"),
        ({"schedule": "polynomial"}, "power", "missing; schedule polynomial needs it"),
        ({"schedule": "cosine_with_restarts"}, "cycles", "missing; schedule cosine_with_restarts needs it"),
        (
            {"schedule": "wsd", "wsd_steps": 96, "warmup_steps": 5},
            "wsd_steps",
            "96 is more than the 95 steps after the warm-up",
        ),
        (
            {"schedule": "wsd", "wsd_steps": 91, "warmup_ratio": 0.1},
            "wsd_steps",
            "91 is more than the 90 steps after the warm-up",
        ),
        (
            {"schedule": "inverse_sqrt"},
            "schedule",
            "inverse_sqrt is measured by the warm-up; give train.optimizer.warmup_steps",
        ),
        (
            {"schedule": "inverse_sqrt", "warmup_steps": 5, "decay_steps": 50},
            "decay_steps",
            "50: inverse_sqrt has no end; drop it",
        ),
        ({"schedule": "constant", "min_lr": 1e-6}, "min_lr", "1e-06: schedule constant does not decay; drop one"),
        ({"schedule": "constant", "decay_steps": 50}, "decay_steps", "50: schedule constant does not decay; drop one"),
        (
            {"initial_lr": 1e-6},
            "initial_lr",
            "1e-06 begins a warm-up, and there is none; give train.optimizer.warmup_steps",
        ),
        ({"lr_by_name": {"*": "fast"}}, "lr_by_name", "'fast' is not a number, at least 0"),
        ({"lr_by_name": {"*": "-1"}}, "lr_by_name", "'-1' is not a number, at least 0"),
        ({"loraplus_ratio": 16.0}, "loraplus_ratio", "16.0 needs model.lora.rank, which is unset"),
    ],
)
def test_what_cannot(settings: dict[str, Any], key: str, message: str) -> None:
    assert problems(**settings) == [(key, message)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_steps": 100}, None),
        ({"warmup_steps": 101, "decay_steps": 102}, None),
        (
            {"warmup_steps": 198, "lr": 2e-5},
            "warm-up of 198 steps is longer than the run of 100, whose last has 1e-05 in place of 2e-05",
        ),
        (
            {"warmup_steps": 101, "schedule": "constant", "initial_lr": 1e-6, "lr": 1.01e-4},
            "warm-up of 101 steps is longer than the run of 100, whose last has 9.9e-05",
        ),
    ],
)
def test_a_warm_up_longer_than_the_run_is_told(settings: dict[str, Any], said: str | None) -> None:
    """The rate that was asked for never comes; a trial of a few steps may have it so."""
    remark = warmup_remark(OptimizerSpec(**settings), 100)
    assert (remark is None) == (said is None)
    if said is not None and remark is not None:
        assert remark.replace("a learning rate of ", "").startswith(said)
