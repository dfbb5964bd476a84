"""Data files as bytes: patterns, digests, and ranges that end at line ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.contract.errors import DataError
from sft.data.reading import files as data_files
from sft.data.reading.files import ByteRange, cut, digest, expand, read_lines


def test_patterns_keep_their_order_and_each_is_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "odd[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    patterns = [f"{tmp_path}/sub/*.jsonl", f"{tmp_path}/odd[1].jsonl", f"{tmp_path}/?.jsonl"]
    names = [path.name for path in expand(patterns, "data.train")]
    assert names == ["c.jsonl", "odd[1].jsonl", "a.jsonl", "b.jsonl"]


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        expand([f"{tmp_path}/x.jsonl", str(tmp_path), f"{tmp_path}/*.json"], "data.train")
    assert caught.value.problems == (
        f"data.train: no file '{tmp_path}/x.jsonl'",
        f"data.train: '{tmp_path}' is no data set that `datasets` saved, and holds no data file (.jsonl, .json, .csv, "
        f".tsv, .parquet, .arrow, .feather); for files in folders below it name {tmp_path}/**/*.jsonl, say",
        f"data.train: no file '{tmp_path}/*.json'",
    )


@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=12), st.integers(1, 40))
def test_ranges_hold_every_line_once_with_its_number(lines: list[bytes], size: int) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        for ending in (b"", b"\n"):
            path.write_bytes(b"\n".join(lines) + ending)
            found = [row for part in cut(path, size) for row in read_lines(part)]
            expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
            assert [(number, line.rstrip(b"\n")) for number, line in found] == expected


def test_ranges_are_about_as_long_as_asked(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"123456789\n" * 100)
    ranges = list(cut(file, 95))
    assert ranges[:2] == [ByteRange(file, 0, 100, 1), ByteRange(file, 100, 200, 11)]
    assert len(ranges) == 10


def test_a_digest_is_noted_and_holds_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, notes = tmp_path / "a", tmp_path / "notes"
    file.write_bytes(b"one")
    first = digest(file, notes, write=True)
    assert not notes.exists(), "times of a file that was just written prove nothing"
    monkeypatch.setattr(data_files, "_SETTLED_SECONDS", -1.0)
    assert digest(file, notes, write=False) == first
    assert not notes.exists()
    assert digest(file, notes, write=True) == first
    monkeypatch.setattr(data_files, "sha256_of", lambda _: "read again")
    assert digest(file, notes, write=False) == first
    os.utime(file, ns=(0, 0))
    assert digest(file, notes, write=False) == "read again"
