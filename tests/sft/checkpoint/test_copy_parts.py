"""The files of copies in a node's memory: what counts as a part, and what is left when a writer dies."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from launcher.contract.checksum import crc32
from sft.checkpoint.copy_parts import (
    Part,
    damage,
    data_path,
    describe,
    open_new,
    parts_in,
    remove_copies,
    remove_part,
)


def written(folder: Path, step: int = 4, rank: int = 0, attempt: str = "7.0", identity: str = "run") -> Part:
    """A part whose description is not written yet."""
    path = data_path(folder, step, rank)
    path.write_bytes(b"tensors of step %d" % step)
    return Part(identity=identity, attempt=attempt, step=step, rank=rank, bytes=path.stat().st_size, crc32=crc32(path))


def test_a_part_counts_once_it_is_described(tmp_path: Path) -> None:
    part = written(tmp_path)
    assert parts_in(tmp_path, "run") == []
    describe(tmp_path, part)
    assert parts_in(tmp_path, "run") == [part]
    assert damage(tmp_path, part) is None


def test_parts_of_another_run_layout_or_start_are_not_seen(tmp_path: Path) -> None:
    describe(tmp_path, written(tmp_path, identity="another"))
    assert parts_in(tmp_path, "run") == []


def test_damage_is_found(tmp_path: Path) -> None:
    part = written(tmp_path)
    path = data_path(tmp_path, 4, 0)
    path.write_bytes(b"tensors of step 5")
    assert "has changed: its CRC-32 is" in str(damage(tmp_path, part))
    path.write_bytes(b"tensors")
    assert str(damage(tmp_path, part)).endswith("has 7 bytes, written were 17")
    path.unlink()
    assert str(damage(tmp_path, part)).endswith("cannot be read: No such file or directory")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"step": 4}', '{"no": "part"}', "[" * 100_000],
    ids=["empty", "torn", "list", "null", "nothing", "half", "else", "deep"],
)
def test_a_description_that_is_none_is_left_out(text: str, tmp_path: Path) -> None:
    described = written(tmp_path)
    describe(tmp_path, described)
    data_path(tmp_path, 4, 1).with_suffix(".json").write_text(text)
    assert parts_in(tmp_path, "run") == [described]


def test_a_description_must_be_that_of_its_file(tmp_path: Path) -> None:
    """A flipped bit in a step or a rank would make another part of it."""
    describe(tmp_path, written(tmp_path))
    path = data_path(tmp_path, 4, 0).with_suffix(".json")
    for wrong in ({"step": 6}, {"rank": 1}, {"rank": "0"}, {"bytes": None}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
        assert parts_in(tmp_path, "run") == []


def test_a_writer_that_dies_leaves_the_copy_before(tmp_path: Path) -> None:
    """Whether in the middle of the data or before the description."""
    before = written(tmp_path, step=2)
    describe(tmp_path, before)
    data_path(tmp_path, 4, 0).write_bytes(b"ten")
    assert parts_in(tmp_path, "run") == [before]
    data_path(tmp_path, 4, 0).with_suffix(".new").write_text("{")
    assert parts_in(tmp_path, "run") == [before]
    assert damage(tmp_path, before) is None


def test_what_is_removed(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("/runs/a")
    for step in (2, 4, 6):
        describe(tmp_path, written(tmp_path, step=step))
    data_path(tmp_path, 4, 0).with_suffix(".new").write_text("of a writer that died")
    remove_copies(tmp_path, but=4, before=6)
    assert [part.step for part in parts_in(tmp_path, "run")] == [4, 6]
    remove_copies(tmp_path, but=4)
    assert [part.step for part in parts_in(tmp_path, "run")] == [4]
    remove_part(tmp_path, 4, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_data_can_be_read_by_nobody_else_and_follow_no_link(tmp_path: Path) -> None:
    target = tmp_path / "of the user"
    target.write_text("precious")
    path = data_path(tmp_path, 4, 0)
    path.symlink_to(target)
    with os.fdopen(open_new(path), "wb") as file:
        file.write(b"tensors")
    assert target.read_text() == "precious"
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
