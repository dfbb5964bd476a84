"""The cost model, compared with what was measured and published."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path

import pytest

from benchmarks.measured_rows import ROWS, Row, all_rows, measured_files
from benchmarks.planning import memory_table, scaling_table, speed_table
from launcher.planning.choice import MODEL_ERROR

DOCS = Path(__file__).resolve().parents[1] / "docs" / "explanation" / "planning.md"
OWN = ("sft", "sft-flash2")
rows = cache(all_rows)


def test_every_measurement_is_a_row_or_says_why_not() -> None:
    assert set(ROWS["older"]) <= set(measured_files())
    shown = {f"{row.source}.json" for row in rows()}
    assert set(measured_files()) == {name for name in shown if name in measured_files()} | set(ROWS["older"])


def test_speed() -> None:
    """Of the code that runs now within a tenth, of others within a fifth."""
    compared = [row for row in rows() if row.tokens_per_second is not None and row.use != "not comparable"]
    assert sum(row.use == "predicted" and row.implementation.name in OWN for row in compared) >= 30
    for row in compared:
        tolerance = 0.1 if row.implementation.name in OWN else 0.2
        assert row.predicted_tokens_per_second == pytest.approx(row.tokens_per_second, rel=tolerance), row.what


def test_memory() -> None:
    """Of the code that runs now within 4 % but for very long rows."""
    for row in rows():
        if row.gib is not None and row.use != "missed":
            usual = row.implementation.name in OWN and row.workload.seq_length <= 32_768
            tolerance = 0.04 if usual else 0.1
            assert row.predicted_gib == pytest.approx(row.gib, rel=tolerance), row.what


def test_speeds_of_two_layouts_compare_within_the_error_that_choices_allow() -> None:
    """Root mean square over all pairs of layouts of one model, number of GPUs and length of examples."""
    groups: dict[object, list[Row]] = {}
    for row in rows():
        if row.implementation.name in OWN and row.tokens_per_second and row.layout.topology.world_size > 1:
            work, ranks = row.workload, row.layout.topology.world_size
            groups.setdefault((work.shape, work.precision, work.attended, ranks), []).append(row)
    pairs = [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
    assert len(pairs) >= 11
    errors = [math.log(_error(one) / _error(other)) for one, other in pairs]
    found = math.sqrt(sum(error**2 for error in errors) / len(errors))
    assert MODEL_ERROR - 0.01 < found < MODEL_ERROR


def _error(row: Row) -> float:
    assert row.tokens_per_second is not None
    return row.predicted_tokens_per_second / row.tokens_per_second


def test_tables_in_the_docs_are_what_the_script_prints() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for table in (speed_table(), memory_table(), scaling_table()):
        assert table in text
