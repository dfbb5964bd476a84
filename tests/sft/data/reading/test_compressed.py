"""Files that are compressed, and tables in every form that Arrow writes."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import DataError
from sft.data.reading.files import expand
from sft.data.reading.tables import holds_lines, read_rows

ROWS = [{"prompt": "a\u2028b", "completion": "c"}, {"prompt": "d", "completion": "\u6f22"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(content: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [dict(row) for _, row in read_rows(path)]


@pytest.mark.parametrize("way", WAYS)
def test_compressed_files_are_read_by_what_they_hold(tmp_path: Path, way: str) -> None:
    compress = WAYS[way]
    table = "prompt,completion\na\u2028b,c\nd,\u6f22\n".encode()
    for name, content in (("a.jsonl", LINES), ("a.json", json.dumps(ROWS).encode()), ("a.csv", table)):
        for file in (tmp_path / f"{name}.{way}", tmp_path / name):  # a name without the ending, too
            file.write_bytes(compress(content))
            assert not holds_lines(file)
            assert rows_of(file) == ROWS
    plain = tmp_path / f"plain.jsonl.{way}"
    plain.write_bytes(LINES)
    assert holds_lines(plain), "not compressed in spite of its name"


@pytest.mark.parametrize("way", WAYS)
def test_several_members_one_after_the_other_are_one_file(tmp_path: Path, way: str) -> None:
    file = tmp_path / f"a.jsonl.{way}"
    file.write_bytes(WAYS[way](LINES) + WAYS[way](LINES))
    assert rows_of(file) == ROWS * 2


@pytest.mark.parametrize("way", WAYS)
def test_errors_in_compressed_files_have_file_and_line(tmp_path: Path, way: str) -> None:
    file = tmp_path / f"a.jsonl.{way}"
    file.write_bytes(WAYS[way](LINES + b"{]\n"))
    with pytest.raises(DataError, match=rf"a\.jsonl\.{way}:3: malformed JSON at column 2"):
        rows_of(file)
    whole = WAYS[way](LINES * 2000)
    for cut in (len(whole) // 2, 7):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"a\.jsonl\.{way}.*(damaged|cannot be read)"):
            rows_of(file)


def test_an_archive_is_refused_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"PK\x03\x04....")
    with pytest.raises(DataError, match=r"a\.jsonl is a zip archive; unpack it"):
        rows_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize("form", ["stream", "file", "feather", "parquet", "parquet.gz"])
def test_every_form_of_a_table(tmp_path: Path, form: str) -> None:
    """An Arrow file and Feather were seen to be called damaged."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.feather
    import pyarrow.parquet

    table = pa.Table.from_pylist(ROWS)
    file = tmp_path / {"stream": "a.arrow", "file": "a.arrow", "feather": "a.feather"}.get(form, "a.parquet")
    if form == "feather":
        pyarrow.feather.write_feather(table, file)
    elif form.startswith("parquet"):
        pyarrow.parquet.write_table(table, file)
    else:
        open_writer = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with pa.OSFile(str(file), "wb") as sink, open_writer(sink, table.schema) as writer:
            writer.write_table(table)
    if form == "parquet.gz":
        file = file.rename(tmp_path / "a.parquet.gz")
        file.write_bytes(gzip.compress(file.read_bytes()))
    assert rows_of(file) == ROWS


def test_feathers_first_format_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.feather").write_bytes(b"FEA1....")
    with pytest.raises(DataError, match="Feather's first format"):
        rows_of(tmp_path / "a.feather")


def test_times_that_python_has_no_type_for_are_in_nobodys_way(tmp_path: Path) -> None:
    """Nanoseconds in a column that nobody reads were seen to end in a traceback without a file."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    instant = pa.array([1, 10**18 + 1], pa.timestamp("ns"))
    nested = pa.array([[{"at": 5}], []], pa.list_(pa.struct([("at", pa.timestamp("ns", "UTC"))])))
    far = pa.array([2_000_000_000, 0], pa.int32()).cast(pa.date32())  # in five million years
    columns = {"prompt": ["a", "b"], "when": instant, "nested": nested, "far": far}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    assert [row["prompt"] for row in rows] == ["a", "b"]
    assert [row["when"] for row in rows] == [1, 10**18 + 1]
    assert rows[0]["nested"] == [{"at": 5}]
    kept = pa.table({"day": pa.array([datetime.date(2026, 1, 2)])})
    pyarrow.parquet.write_table(kept, tmp_path / "b.parquet")
    assert rows_of(tmp_path / "b.parquet") == [{"day": datetime.date(2026, 1, 2)}]


def test_a_text_that_is_no_utf_8_in_a_table_is_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    text = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"prompt": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: damaged after row 0: .*(?i:utf-?8)"):
        rows_of(tmp_path / "a.parquet")


def test_latin_1_and_what_follows_an_array_are_found_at_their_lines(tmp_path: Path) -> None:
    """The line before was named, and what followed an array was left out without a word."""
    (tmp_path / "a.csv").write_bytes("prompt,completion\na,b\nc\u00e9,d\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv:3: not UTF-8 \(byte 2 of the line\)"):
        rows_of(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text('[{"a": 1}]\n\n[{"a": 2}]')
    with pytest.raises(DataError, match=r"a\.json:3: malformed JSON: something follows the end of the array"):
        rows_of(tmp_path / "a.json")


def test_a_directory_of_files_of_one_kind(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "README.md", ".hidden.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "below").mkdir()
    assert [path.name for path in expand([str(tmp_path)], "data.train")] == ["a.jsonl.gz", "b.jsonl"]
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"files of several kinds; name one of .*/\*\.json, .*/\*\.jsonl"):
        expand([str(tmp_path)], "data.train")
    with pytest.raises(DataError, match=r"holds no data file .* name .*/below/\*\*/\*\.jsonl"):
        expand([str(tmp_path / "below")], "data.train")
