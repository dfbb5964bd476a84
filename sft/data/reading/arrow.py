"""Read tables of Arrow: Parquet, Arrow streams (what `datasets` saves), Arrow files and Feather.

pyarrow alone is needed. Values that Python has no exact type for (nanoseconds, years after 9999) become numbers: such a
column is hardly ever one that is trained on, and one that is would be refused for not being a text.

Rejected: reading Parquet by row groups in the workers (a row group can have any size).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract.errors import DataError
from sft.data.reading.compressed import compression_of, kind_of, opened
from sft.data.reading.row import Row

if TYPE_CHECKING:
    import pyarrow as pa

ARROW_FILES = (".parquet", ".arrow", ".feather")
_BATCH_ROWS = 1024
_INSTALL = "pip install 'slurm-sft-launcher[data]'"
_FILE_MAGIC, _OLD_FEATHER = b"ARROW1", b"FEA1"


def read_arrow(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a table with their numbers from 1, or raise DataError if it is damaged."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{path}: reading it needs pyarrow: {_INSTALL}") from None
    number = 0
    try:
        for batch in _batches(path):  # of any size: taken in parts, to keep few Python objects at a time
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for row in _rows(batch.slice(start, _BATCH_ROWS)):
                    number += 1
                    yield number, row
    # Beside Arrow's own errors, a damaged file leads to those of converting what it holds: texts that are no UTF-8,
    # dates that no calendar has.
    except (pa.ArrowException, OSError, ValueError, OverflowError, LookupError, TypeError) as error:
        raise DataError(f"{path}: damaged after row {number}: {error}") from error


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if compression_of(path) is not None:
        with opened(path) as file:
            source: pa.NativeFile = pa.BufferReader(file.read())
    else:
        source = pa.memory_map(str(path))
    with source:
        head = source.read(len(_FILE_MAGIC))
        source.seek(0)
        if head.startswith(_OLD_FEATHER):
            raise DataError(f"{path} is in Feather's first format; write it again with pyarrow.feather.write_feather")
        if kind_of(path) == ".parquet" or head.startswith(b"PAR1"):
            yield from pq.ParquetFile(source).iter_batches(_BATCH_ROWS)
        elif head == _FILE_MAGIC:
            file_reader = pa.ipc.open_file(source)
            yield from (file_reader.get_batch(index) for index in range(file_reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(source)


def _rows(batch: pa.RecordBatch) -> Iterator[Row]:
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise ValueError(f"columns of one name among {', '.join(names)}")
    batch.validate(full=True)  # what a damaged one holds would be read from anywhere in memory
    columns = [_values(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield {name: _without_nulls(value) for name, value in zip(names, values, strict=True)}


def _values(column: pa.Array) -> Iterable[object]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, LookupError):  # nanoseconds, or a year or time zone that Python does not know
        return list(column.cast(_without_times(column.type)).to_pylist())


def _without_times(kind: pa.DataType) -> pa.DataType:
    """Return the type with dates and times in it as numbers."""
    import pyarrow as pa

    if pa.types.is_date32(kind) or pa.types.is_time32(kind):
        return pa.int32()
    if pa.types.is_temporal(kind):
        return pa.int64()
    if pa.types.is_struct(kind):
        return pa.struct(
            [kind.field(at).with_type(_without_times(kind.field(at).type)) for at in range(kind.num_fields)]
        )
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_without_times(kind.value_type))
    return kind


def _without_nulls(value: object) -> object:
    """Leave out null keys of nested objects: Arrow gives every object every key that any of them has."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
