"""docs/config.md agrees with the field docstrings of the spec."""

from __future__ import annotations

from pathlib import Path

from launcher.contract.config.reference import config_reference
from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import leaf_types


def test_page_is_up_to_date() -> None:
    """Renew it with `python -m launcher reference > docs/config.md`."""
    assert (Path(__file__).parents[4] / "docs" / "config.md").read_text() == config_reference()


def test_a_section_is_described_in_full() -> None:
    assert "Errors in code, data or\nsettings are never retried." in config_reference()


def test_every_key_is_there_with_a_meaning() -> None:
    rows = [line.split(" | ") for line in config_reference().splitlines() if line.startswith("| `")]
    assert {row[0].strip("|` ") for row in rows} == {key for key, _ in leaf_types(RunSpec)}
    assert all(len(row[-1]) > 5 for row in rows)
