"""trainer.json as a value: format 3 as it stands on disk since that format exists."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launcher.contract.errors import CheckpointError
from launcher.contract.topology import Topology
from sft.checkpoint.contents import EarlyStoppingState, RankedStep, TrainerState

WRITTEN = {
    "format": 3,
    "lightning": {
        "epoch": 0,
        "global_step": 4,
        "callbacks": {
            "guard": {"gradient_norms": [1.5, 0.5, 4.0]},
            "evaluation": {"best": 2.25, "best_step": 2, "waited": 1},
            "checkpoints": {"run": "/runs/a", "best": [{"step": 2, "value": 2.25}, {"step": 4, "value": 3}]},
        },
    },
    "topology": {"world_size": 2, "tensor_parallel": 2},
    "data_key": {"data.cache": "sha256:ab", "train.seed": 1},
    "versions": {"torch": "2.13.0", "megatron_core": "0.16.1"},
}


def test_files_of_earlier_runs_are_read_and_written_alike() -> None:
    text = json.dumps(WRITTEN, indent=1)
    state = TrainerState.from_json(text)
    assert state.best.best == (RankedStep(2, 2.25), RankedStep(4, 3))
    assert state.early_stopping == EarlyStoppingState(2.25, 2, 1)
    assert state.to_json() == text


def topology_of(*layers: int) -> Topology:
    return Topology(
        world_size=2,
        ranks_per_node=2,
        tensor_parallel=1,
        pipeline_parallel=2,
        virtual_pipeline=1,
        context_parallel=1,
        data_parallel=1,
        sequence_parallel=False,
        micro_batch_size=1,
        global_batch_size=8,
        expert_parallel=1,
        expert_tensor_parallel=1,
        layers_per_stage=layers,
    )


def saved_under(topology: Topology) -> TrainerState:
    state = TrainerState(lightning={}, topology=dataclasses.asdict(topology), data_key={})
    return TrainerState.from_json(state.to_json())


def test_another_split_of_layers_is_another_topology() -> None:
    """Random generators go on under the same one alone."""
    assert saved_under(topology_of(17, 15)).is_of(topology_of(17, 15))
    assert not saved_under(topology_of(17, 15)).is_of(topology_of(16, 16))


def test_a_checkpoint_that_names_no_split_had_equal_stages() -> None:
    values = dataclasses.asdict(topology_of(16, 16))
    for later in ("layers_per_stage", "expert_parallel", "expert_tensor_parallel"):
        del values[later]
    earlier = TrainerState(lightning={}, topology=values, data_key={})
    assert earlier.is_of(topology_of(16, 16))
    assert not earlier.is_of(topology_of(17, 15))
    assert not earlier.is_of(topology_of(17, 16))  # which no equal stages add up to


def test_callbacks_that_a_run_did_not_have() -> None:
    state = TrainerState(lightning={"global_step": 1}, topology={}, data_key={})
    assert state.best.best == ()
    assert state.early_stopping == EarlyStoppingState()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Expecting property name"),
        ("[]", "it is not an object"),
        ('{"format": 2}', "format 2, and this version reads 3"),
        ('{"format": 3, "lightning": {}, "topology": {}}', "data_key is None"),
    ],
)
def test_a_damaged_file_is_named(text: str, problem: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000004"
    checkpoint.mkdir()
    (checkpoint / "trainer.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        TrainerState.read(checkpoint)
    message = str(caught.value)
    assert message.startswith(f"{checkpoint}/trainer.json cannot be used: {problem}")
    assert message.endswith("; remove step-00000004 to go on from an older checkpoint")


@pytest.mark.parametrize("broken", [{"best": 1.0, "best_step": "2", "waited": 0}, {"best": 1.0, "best_step": 2}])
def test_a_state_of_another_form_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is "):
        EarlyStoppingState.from_json(broken)
