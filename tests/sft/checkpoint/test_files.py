"""A sealed directory is whole or found out; removal never leaves half a checkpoint."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from launcher.contract.checksum import crc32
from launcher.contract.rundir import COMPLETE, RunPaths, complete_checkpoints
from launcher.contract.spec import CheckpointSpec, RunSpec
from sft.checkpoint.files import changed_bytes, check_space, damage, remove_all_but, remove_leftovers, seal


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    return make(tmp_path / "step-00000003")


def make(directory: Path) -> Path:
    (directory / "sharded").mkdir(parents=True)
    (directory / "sharded" / "__0_0.distcp").write_bytes(b"weights" * 1000)
    (directory / "sharded" / "empty").touch()
    (directory / "trainer.json").write_text("{}")
    seal(directory, {})
    return directory


def test_whole(sealed: Path) -> None:
    assert damage(sealed) is None
    assert changed_bytes(sealed) is None
    files = json.loads((sealed / COMPLETE).read_text())["files"]
    assert files["trainer.json"] == {"bytes": 2, "crc32": f"{zlib.crc32(b'{}'):08x}"}
    assert set(files) == {"sharded/__0_0.distcp", "sharded/empty", "trainer.json"}


def test_checksum_over_several_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    (tmp_path / "big").write_bytes(content)
    assert crc32(tmp_path / "big") == f"{zlib.crc32(content):08x}"


def test_checksums_of_the_writers_are_taken_over(tmp_path: Path) -> None:
    """What a writer meant to write counts, also where the file system made something else of it."""
    directory = tmp_path / "step-00000001"
    directory.mkdir()
    (directory / "a").write_text("other")
    seal(directory, {"a": f"{zlib.crc32(b'meant'):08x}"})
    assert "a has changed" in str(changed_bytes(directory))


def test_damage_is_named(sealed: Path) -> None:
    shard = sealed / "sharded" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes().replace(b"w", b"v", 1))
    assert damage(sealed) is None
    assert str(changed_bytes(sealed)).startswith("sharded/__0_0.distcp has changed: its CRC-32 is ")
    shard.write_bytes(b"short")
    assert damage(sealed) == "sharded/__0_0.distcp has 5 bytes, written were 7000"
    shard.unlink()
    assert damage(sealed) == "sharded/__0_0.distcp is missing"
    assert "cannot be read" in str(changed_bytes(sealed))
    (sealed / COMPLETE).write_text("{")
    assert damage(sealed) == "COMPLETE is not readable"


def test_sizes_alone_are_another_version(sealed: Path) -> None:
    (sealed / COMPLETE).write_text('{"files": {"trainer.json": 2}}')
    assert damage(sealed) == "its COMPLETE is from another version, without checksums"


def test_ranks_share_the_reading(sealed: Path) -> None:
    (sealed / "trainer.json").write_text("[]")
    found = [changed_bytes(sealed, share=share, shares=3) for share in range(3)]
    assert [problem is not None for problem in found] == [False, False, True]


def test_the_newest_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path / f"step-{step:08d}")
    checkpoints = complete_checkpoints(tmp_path)
    remove_all_but(checkpoints, [checkpoints[1]])
    assert complete_checkpoints(tmp_path) == [checkpoints[1], checkpoints[3]]
    remove_all_but(complete_checkpoints(tmp_path), [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_no_space_says_how_much(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"it needs about [\d,]+ MiB, and [\d,]+ MiB are free in "):
        check_space(tmp_path, 1 << 60)


def test_folder_of_checkpoints_gives_its_newest_whole_one(tmp_path: Path) -> None:
    """What a run that starts after another resumes from: the step is not known when it is submitted."""
    from sft.training.resume_point import resume_point

    for step in (3, 12, 9):
        make(tmp_path / "before" / "checkpoints" / f"step-{step:08d}")
    (tmp_path / "before" / "checkpoints" / "step-00000012" / "trainer.json").write_text("longer")
    spec = RunSpec(checkpoint=CheckpointSpec(resume_from=str(tmp_path / "before" / "checkpoints")))
    with pytest.warns(UserWarning, match="damaged and skipped"):
        found = resume_point(spec, RunPaths(tmp_path / "behind"))
    assert found == tmp_path / "before" / "checkpoints" / "step-00000009"


MARKERS = ["", "{}", "[]", "5", "null", '{"files": {}}', '{"files": [1]}', '{"files": {"a": 5}}', "\x00", "[" * 100_000]
MARKERS += ['{"files": {"a": {"bytes": 1}}}', '{"files": {"a\\u0000": {"bytes": 1, "crc32": ""}}}']


@pytest.mark.parametrize("text", MARKERS)
def test_a_marker_of_any_damage_is_told(sealed: Path, text: str) -> None:
    """Each was seen to be a traceback, and the older checkpoint not to be tried."""
    (sealed / COMPLETE).write_text(text)
    assert damage(sealed) is not None
    assert changed_bytes(sealed) is not None
    (sealed / COMPLETE).write_bytes(b"\xff\xfe")
    assert damage(sealed) == f"{COMPLETE} is not readable"


def test_a_changed_trainer_state_is_told_before_it_is_used(sealed: Path) -> None:
    """With a flipped byte a run was said to have ended early."""
    (sealed / "trainer.json").write_text("[]")
    assert str(damage(sealed)).startswith("trainer.json has changed: its CRC-32 is ")


def test_what_killed_processes_left_is_removed(sealed: Path) -> None:
    for name in (".step-00000001.removed", ".step-00000002.partial"):
        (sealed.parent / name / "sharded").mkdir(parents=True)
    (sealed.parent / ".other").mkdir()
    remove_leftovers(sealed.parent)
    assert sorted(path.name for path in sealed.parent.iterdir()) == [".other", "step-00000003"]
