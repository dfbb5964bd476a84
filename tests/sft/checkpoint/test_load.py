"""What is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.contract.errors import CheckpointError
from sft.checkpoint import load
from sft.checkpoint.contents import TrainerState


@pytest.mark.parametrize(
    ("writer", "reader", "refused"),
    [
        ("0.19.2", "0.18.2", True),
        ("0.19.2+1a2b3c", "0.16.1", True),
        ("0.19.2", "0.19.0", False),
        ("0.16.1", "0.19.2", False),
        ("0.18.2", "0.16.1", False),
    ],
)
def test_checkpoints_of_other_versions(
    writer: str, reader: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with the real ones in tests/parity/test_other_megatron.py."""
    state = TrainerState(lightning={}, topology={}, data_key={}, versions={"megatron_core": writer})
    monkeypatch.setattr(load, "megatron_version", reader)
    if not refused:
        load._check_version(Path("step-00000002"), state)
        return
    with pytest.raises(CheckpointError, match=rf"step-00000002 was written with Megatron-core {writer.split('+')[0]}"):
        load._check_version(Path("step-00000002"), state)
