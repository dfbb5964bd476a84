"""A checkpoint from elsewhere runs no code: each kind of pickle in it is looked at before anything is loaded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from launcher.contract.errors import CheckpointError
from sft.checkpoint.pickles import refuse_code


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    write(directory, {"step": 3, "names": ["a"], "rng": torch.zeros(4)})
    return directory


def write(directory: Path, values: dict[str, Any]) -> None:
    dcp.save({"weight": torch.ones(2, 2), **values}, checkpoint_id=directory, no_dist=True)
    index = read_own(directory)
    index.storage_meta = None  # torch's own writer notes the directory there; Megatron-core's does not
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    torch.save({"counts": [1, 2]}, directory / "common.pt")


def read_own(directory: Path) -> Any:
    """The index that the test itself has written."""
    return pickle.loads((directory / ".metadata").read_bytes())  # noqa: S301


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        refuse_code(directory)
    return str(caught.value)


def test_what_we_write_is_accepted(sharded: Path) -> None:
    refuse_code(sharded)


@pytest.mark.parametrize("place", ["index", "object", "common", "old common"])
def test_code_is_refused_wherever_it_is(sharded: Path, tmp_path: Path, place: str) -> None:
    bomb = Bomb(tmp_path / "ran")
    if place == "index":
        (sharded / ".metadata").write_bytes(pickle.dumps(bomb))
    elif place == "object":
        write(sharded, {"state": bomb})
    elif place == "common":
        torch.save({"state": bomb}, sharded / "common.pt")
    else:
        (sharded / "common.pt").write_bytes(pickle.dumps(bomb))
    said = refusal(sharded)
    assert "does not belong into an index" in said if place == "index" else "loading it could run code" in said
    assert not (tmp_path / "ran").exists()


def test_an_index_cannot_name_files_elsewhere(sharded: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, {"step": 4})
    index = read_own(sharded)
    for stored in index.storage_data.values():
        stored.relative_path = f"../elsewhere/{stored.relative_path}"
    for path in sharded.glob("*.distcp"):
        path.unlink()
    (sharded / ".metadata").write_bytes(pickle.dumps(index))
    assert "its index names a file elsewhere, ../elsewhere/__0_0.distcp" in refusal(sharded)
